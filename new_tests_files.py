"""Addresses of bytes, faults of the disk, and the cache of a bucket's files."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import errno
import io
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

import pypi_ae
from test_pypi_ae import (  # noqa: F401 - fixtures
    BYTES,
    FILE,
    FOLDER,
    OTHER,
    PASSWORD,
    USER,
    WHEEL,
    WHEEL2,
    Answer,
    Client,
    Clients,
    Cloud,
    Directory,
    Log,
    Patch,
    Server,
    Store,
    _alone,
    afterwards,
    begin,
    call,
    change_body,
    client,
    clients,
    each_installer,
    emulator,
    facts,
    large_wheel,
    local,
    make_app,
    make_old,
    make_wheel,
    patience,
    played,
    root,
    server,
    sha256,
    shared_server,
    snapshot,
    store,
    stores,
    url,
    write_wheel,
)

W2 = make_wheel(version="2.0")
disked = stores("played", "directory")


# Addresses of bytes.


def address(client: Client, name: str = WHEEL) -> str:
    """The URL of a file, as the page of acme links to it."""
    return urljoin("/simple/acme/", str(client.page()["files"][name]["url"]))


def test_address_is_of_bytes_and_a_name_of_what_has_it_now(store: Store) -> None:
    client = store.with_wheel(sync_seconds=0)
    old = address(client)
    assert old == f"/packages/acme/{sha256(BYTES)[:16]}/{WHEEL}"
    link = client.get("/simple/acme/").links()[WHEEL]["href"]
    assert urljoin("/simple/acme/", link).partition("#")[0] == old
    release = client.get("/pypi/acme/json").json()["urls"][0]
    assert release["url"].endswith(old)
    tag = client.get(old).headers["etag"]
    assert client.get(url(WHEEL), if_none_match=tag).status == 304
    assert client.remove("1.0").status == 200
    assert client.get(old).status == 404
    assert client.upload(WHEEL, OTHER).status == 200
    for suffix in ("", ".metadata"):
        assert client.get(old + suffix).status == 404
        for at, lifetime in ((address(client), "immutable"), (url(WHEEL), "no-cache")):
            answer = client.get(at + suffix)
            assert (answer.status, answer.body == OTHER) == (200, not suffix)
            assert lifetime in answer.headers["cache-control"]
    assert client.get(url(WHEEL), if_none_match=tag).status == 200


def test_link_made_before_the_facts_still_works(played: Cloud) -> None:
    played.put(f"acme/{WHEEL}", BYTES)
    client = played.instance(sync_seconds=0)
    by_md5 = address(client)
    assert client.get(by_md5).body == BYTES  # this computes its sha256
    assert address(client) != by_md5
    for at in (by_md5, address(client)):
        assert client.get(at).body == BYTES
        assert client.get(f"{at}.metadata").status == 200


def test_address_that_another_instance_made_is_found(played: Cloud) -> None:
    one, two = played.with_wheel(), played.instance("two")
    old = address(two)
    assert one.remove("1.0").status == one.upload(WHEEL, OTHER).status == 200
    new = address(one)
    with played.calls() as sent:
        assert two.get(new).body == OTHER
    assert sent == [FOLDER, f"read packages/acme/{WHEEL}"]
    assert two.get(old).status == 404


def test_wrong_digests_cost_no_more_than_unknown_files(
    disked: Store, monkeypatch: Patch
) -> None:
    """A directory whose look is current is not scanned; a list call is shared."""
    client, looks = disked.with_wheel(), list[str]()
    for _ in range(3 * isinstance(disked, Directory)):
        client.page()  # the first two make folders for facts
        make_old(disked.folder / "remote")
    client.page()
    index = client.app.index
    look = index.store.look

    def slow(project: Any, find_root: Any, last: Any) -> Any:
        looks.append(project)
        time.sleep(0.2)  # the others come in this time
        return look(project, find_root, last)

    monkeypatch.setattr(index.store, "look", slow)
    barrier = threading.Barrier(8, timeout=20)

    def ask(_: int) -> int:
        barrier.wait()
        return client.get(f"/packages/acme/{'0' * 16}/{WHEEL}").status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {404}
    assert len(looks) <= (2 if isinstance(disked, Cloud) else 0)


@each_installer
def test_reinstalling_a_version_with_other_bytes(
    server: Server, clients: Clients, install: str
) -> None:
    """A cache does not hide the new bytes; a lock of the old ones fails loudly."""
    name = f"acme-again-{install}"
    path = write_wheel(clients.home / "dist", name)
    clients.run("twine", "upload", path)
    command = ("uv", "pip") if install == "uv" else ("pip",)
    lock = f"{name}==1.0 --hash=sha256:{sha256(path.read_bytes())}\n"
    (clients.home / "lock").write_text(lock)
    project = f'name = "x"\nversion = "1"\ndependencies = ["{name}"]\n'
    (clients.home / "pyproject.toml").write_text(f"[project]\n{project}")
    clients.run("uv", "lock")
    clients.run(*command, "install", "--target", "one", name)
    form = {":action": "remove_pkg", "name": name, "version": "1.0"}
    removal = server.ask("POST", "/", data=form, auth=(USER, PASSWORD))
    assert removal.status_code == 200
    write_wheel(clients.home / "dist", name, "1.0", "Keywords: new")
    clients.run("twine", "upload", path)
    clients.run(*command, "install", "--target", "two", name)
    module = path.name.split("-")[0]
    text = (clients.home / "two" / f"{module}-1.0.dist-info" / "METADATA").read_text()
    assert "Keywords: new" in text
    locked = ("--target", "three", "--require-hashes", "-r", "lock")
    assert "hash" in clients.run(*command, "install", *locked, fails=True).lower()
    frozen = ("uv", "sync", "--frozen", "--no-cache", "--no-install-project")
    assert "404" in clients.run(*frozen, fails=True)


# Faults of the disk, as the system tells of them.

FAULTS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
WRITES = {  # functions of os that fail
    "full": ("mkdir", "link"),
    "read-only": ("mkdir", "link", "unlink", "utime", "rmdir", "replace", "open"),
}


def break_disk(patch: Patch, fault: str, *names: str) -> None:
    """Let functions of os fail, and what is written to files if none are named."""
    code = FAULTS[fault]
    real = os.open

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    def fail_to_create(path: Any, flags: int, *more: Any, **options: Any) -> int:
        return fail() if flags & os.O_CREAT else real(path, flags, *more, **options)

    class Broken(io.FileIO):
        write = fail

    def open_broken(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not set(mode) & set("xwa"):
            return open(path, mode, *more, **options)
        if fault == "read-only":
            fail()
        return io.BufferedWriter(Broken(path, mode.replace("b", "")))

    for name in names or WRITES[fault]:
        patch.setattr(os, name, fail_to_create if name == "open" else fail)
    if not names:
        patch.setattr(pypi_ae, "open", open_broken, raising=False)


DISKS = {  # what fails, and the status of an upload
    "full": ("full", (), 507),
    "read-only": ("read-only", (), 503),
    "full, at the name": ("full", ("link",), 507),
    "full, at the folder": ("full", ("mkdir",), 507),
    "full, at the last": ("full", ("fsync",), 507),
}


NEW = "new_one-1.0-py3-none-any.whl"


def break_sync(patch: Patch) -> None:
    """Let it fail for folders: a file has its name by then."""
    real = os.fsync

    def sync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    patch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("case", DISKS)
def test_upload_to_a_broken_disk(
    disked: Store, monkeypatch: Patch, caplog: Log, case: str
) -> None:
    """A sentence, no traceback, no trace; the rest works, and trying again does."""
    fault, names, status = DISKS[case]
    client = disked.with_wheel()
    assert client.upload(WHEEL2, W2).status == 200  # so that there is a staging folder
    assert client.get(url(WHEEL)).body == BYTES
    before = [*snapshot(client.root), *disked.all()]
    with monkeypatch.context() as patch:
        if names == ("fsync",):
            break_sync(patch)
        else:
            break_disk(patch, fault, *names)
        answer = client.upload(NEW, make_wheel("new_one"))
        if isinstance(disked, Cloud) and names:  # it needs none of these
            assert answer.status == 200
            return
        assert (answer.status, "disk" in answer.text) == (status, True)
        assert client.get(url(WHEEL)).body == BYTES
        assert client.get(f"{FILE}.metadata").status == 200
        assert client.page("new-one")["files"] == {}
    assert [*snapshot(client.root), *disked.all()] == before
    assert not any(record.exc_info for record in caplog.records)
    assert "bucket" not in caplog.text
    assert client.upload(NEW, make_wheel("new_one")).status == 200
    assert set(client.page("new-one")["files"]) == {NEW}


@pytest.mark.parametrize("fault", FAULTS)
def test_cache_never_fails_a_request(
    played: Cloud, monkeypatch: Patch, fault: str
) -> None:
    """What is cached is served, what cannot be cached streams past."""
    client, wheel = played.with_wheel(), large_wheel()
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    assert client.get(url(WHEEL)).body == BYTES
    with monkeypatch.context() as patch:
        break_disk(patch, fault)
        with played.calls() as sent:
            assert client.get(url(WHEEL)).body == BYTES
            assert client.get(url(WHEEL2)).body == wheel
            assert client.get(url(WHEEL2), range="bytes=5-8").body == wheel[5:9]
            assert client.get(url(WHEEL2) + ".metadata").status == 200
            assert client.remove("1.0").status == 200
        assert f"read packages/acme/{WHEEL}" not in sent
    assert set(played.all()) == {f"acme/{WHEEL2}"}
    assert all(WHEEL2 not in name for name in local(client))
    assert os.listdir(client.root / ".pypi_ae" / "parts") == []
    assert client.get(url(WHEEL2)).body == wheel
    assert len([name for name in local(client) if WHEEL2 in name]) == 1


def test_cache_gives_way_to_uploads(played: Cloud, monkeypatch: Patch) -> None:
    client = played.with_wheel()
    assert client.get(url(WHEEL)).body == BYTES
    assert len(local(client)) == 1
    usage = shutil.disk_usage(client.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert client.upload(WHEEL2, W2).status == 200
    assert all(WHEEL not in name for name in local(client))
    assert client.get(url(WHEEL)).body == BYTES


def test_own_folder_is_made_anew(disked: Store) -> None:
    """Cleaners of /tmp remove it while the server runs."""
    client = disked.with_wheel()
    played = isinstance(disked, Cloud)
    assert client.get(url(WHEEL)).body == BYTES
    folder = client.app.index.store.staging.parent
    steps: list[Callable[[], Answer]] = [
        lambda: client.upload(WHEEL2, W2),
        lambda: client.get(url(WHEEL)),
        lambda: client.get(f"{FILE}.metadata"),
        lambda: client.remove("2.0"),
    ]
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        assert step().status == 200
        assert set(client.page()["files"]) >= {WHEEL}
    shutil.rmtree(folder, ignore_errors=True)
    for reads in (1, 0):  # it is cached again
        with disked.calls() as sent:
            assert client.get(url(WHEEL)).body == BYTES
        reading = [call for call in sent if call.startswith("read")]
        assert len(reading) == (reads if played else 0)


def on_disk(client: Client) -> int:
    files = (path for path in client.root.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def test_cold_downloads_of_one_file_fill_one_copy(played: Cloud) -> None:
    """The others stream past, and push nothing out."""
    client, wheel = played.with_wheel(cache_mb=25), large_wheel()
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    assert client.get(url(WHEEL)).body == BYTES
    bodies = [begin(client, url(WHEEL2)) for _ in range(8)]
    streams = [iter(body) for body in bodies]
    firsts = [next(stream) for stream in streams]
    assert on_disk(client) == len(BYTES) + len(wheel)
    for first, stream in zip(firsts, streams, strict=True):
        assert first + b"".join(stream) == wheel
    for body in bodies:
        body.close()
    assert on_disk(client) == len(BYTES) + len(wheel)
    with played.calls() as sent:
        assert client.get(url(WHEEL)).body == BYTES
        assert client.get(url(WHEEL2)).body == wheel
    assert sent == []


def test_workers_together_keep_the_bound(played: Cloud) -> None:
    names = [f"acme-{n}.0-py3-none-any.whl" for n in range(60)]
    for n, name in enumerate(names):
        wheel = make_wheel(version=f"{n}.0", code=os.urandom(50_000))
        played.put(f"acme/{name}", wheel, **facts(wheel, f"{n}.0"))
    one, two = played.instance(cache_mb=1), played.instance(cache_mb=1)
    most = 0
    for worker, some in ((one, 1), (two, 2), (one, 30), (two, 60), (one, 60)):
        for name in names[:some]:
            assert worker.get(url(name)).status == 200
            most = max(most, on_disk(one))
    assert 700_000 < most <= 1_000_000


COPIES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "damaged": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("case", COPIES)
def test_copy_that_a_power_cut_damaged_is_not_served(played: Cloud, case: str) -> None:
    client = played.with_wheel()
    assert client.get(url(WHEEL)).body == BYTES
    (copy,) = (path for path in (client.root / ".pypi_ae" / "cache").iterdir())
    copy.write_bytes(COPIES[case](BYTES))
    if case == "damaged":  # its digest is checked on first use after a start
        client = played.instance()
    for span in ("bytes=0-9", ""):
        answer = client.get(url(WHEEL), **{"range": span} if span else {})
        assert answer.body == (BYTES[:10] if span else BYTES)
    assert copy.read_bytes() == BYTES


def test_small_download_is_checked_before_it_is_sent(played: Cloud) -> None:
    client = played.with_wheel()
    played.wire.on("read", change_body(lambda data: data[:-1] + b"?"))
    answer = client.get(url(WHEEL))
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    assert local(client) == []
    played.wire.heal()
    assert client.get(url(WHEEL)).body == BYTES


def test_loser_of_a_race_is_told_what_helps(played: Cloud) -> None:
    """And the page shows what it lost against, with a long SYNC_SECONDS, too."""
    one, two = played.instance("one"), played.instance("two")
    assert two.page()["files"] == {}
    assert one.upload(WHEEL, BYTES).status == 200
    refused = two.upload(WHEEL, OTHER)
    assert (refused.status, "--overwrite" in refused.text) == (409, True)
    assert two.sha256() == sha256(BYTES)
    three, rivals = played.instance("three", overwrite="yes"), iter(range(9))

    def rival() -> None:
        played.put(f"acme/{WHEEL}", make_wheel(code=b"%d" % next(rivals)))

    played.wire.on(FOLDER, afterwards(rival))
    refused = three.upload(WHEEL, OTHER)
    assert (refused.status, "--overwrite" in refused.text) == (409, False)
    assert "Try again" in refused.text


# Only regular files inside the root.


def stray(folder: Path, root: Path) -> dict[str, Callable[[], object]]:
    """What is no file of the root, by its name there."""
    out = folder / "out"
    out.mkdir()
    (out / WHEEL).write_bytes(BYTES)
    return {
        "acme/acme-7.0.tar.gz": lambda: (root / "acme/acme-7.0.tar.gz").symlink_to(
            out / WHEEL
        ),
        "acme/acme-8.0.tar.gz": lambda: os.mkfifo(root / "acme/acme-8.0.tar.gz"),
        "away": lambda: (root / "away").symlink_to(out),
        "pipe-1.0.zip": lambda: os.mkfifo(root / "pipe-1.0.zip"),
        "link-1.0.zip": lambda: (root / "link-1.0.zip").symlink_to(out / WHEEL),
    }


@pytest.mark.parametrize("later", [False, True], ids=["at start", "later"])
def test_only_regular_files_inside_the_root_are_served(
    tmp_path: Path, client: Client, caplog: Log, patience: None, later: bool
) -> None:
    root = client.root
    client.drop(f"acme/{WHEEL}", BYTES)
    (root / "acme" / WHEEL2).symlink_to(WHEEL)  # inside the root: as good as a file
    (root / "inside").symlink_to("acme")
    if later:
        make_old(root)
        assert set(client.get("/simple/").links()) == {"acme", "inside"}
    for make in stray(tmp_path, root).values():
        make()
    if not later:
        client = Client(make_app(root))
    assert set(client.get("/simple/").links()) == {"acme", "inside"}
    assert set(client.page()["files"]) == {WHEEL, WHEEL2}
    listed = set(client.get("/packages/").links())
    assert listed == {WHEEL, WHEEL2}
    for name in ("acme-7.0.tar.gz", "acme-8.0.tar.gz"):
        assert client.get(f"/packages/acme/{name}").status == 404
    assert client.get("/simple/away/").status == 404
    assert client.get("/packages/away/" + WHEEL).status == 404
    found = client.send("POST", "/RPC2", call({"name": ["a", "pipe", "link"]}))
    assert b"away" not in found.body
    assert b"7.0" not in found.body
    assert caplog.text.count("away is left out") == 1
    refused = client.upload("away-1.0-py3-none-any.whl", make_wheel("away"))
    assert refused.status == 503  # a 200 would be of a file that nobody sees
    assert os.listdir(tmp_path / "out") == [WHEEL]


def test_unreadable_folder_is_left_out(
    client: Client, monkeypatch: Patch, caplog: Log
) -> None:
    client.drop(f"acme/{WHEEL}", BYTES)
    client.drop("secret/secret-1.0-py3-none-any.whl", make_wheel("secret"))
    access, scan = os.access, os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/secret"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read all

    def may(path: Any, mode: int) -> bool:
        return not str(path).endswith("/secret") and access(path, mode)

    monkeypatch.setattr(os, "access", may)
    for _ in range(3):
        client.drop(f"other{_}/x", b"")  # so that the root is scanned again
        assert "secret" not in client.get("/simple/").links()
        assert client.get("/simple/secret/").status == 404
        assert set(client.page()["files"]) == {WHEEL}
        assert set(client.get("/packages/").links()) == {WHEEL}
        client.drop("loose-1.0.zip", b"").unlink()
    assert caplog.text.count("secret is left out") == 1

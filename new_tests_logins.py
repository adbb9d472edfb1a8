"""New tests of logins, settings, the app and the command line, to be pasted."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import getpass
import io
import os
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pypi_ae
from pypi_ae import Settings, SettingsError, get_app, hash_password, main
from test_pypi_ae import (  # noqa: F401 - fixtures
    ADA,
    FILE,
    SHA,
    VECTORS,
    WHEEL,
    Client,
    Log,
    Output,
    Patch,
    _alone,
    basic,
    call,
    client,
    make_app,
    make_wheel,
    now,
    patience,
    root,
    snapshot,
    stocked,
    upload_form,
)

# ---- 2. Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "says"), [
    ("AUTHENTICATE", "list,download", "anonymous-update"),
    ("AUTHENTICATE", "list", "anonymous-update"),
    ("AUTHENTICATE", "update,anonymous-update", "anonymous-update"),
    ("BUCKET_NAME", "gs://b/x", "REMOTE_PACKAGE_DIRECTORY"),
    ("BUCKET_NAME", "b/x", "REMOTE_PACKAGE_DIRECTORY"),
    ("FALLBACK_URL", "https://index.example", "/simple"),
    ("FALLBACK_URL", "https://index.example//", "/simple"),
    ("BEHIND_PROXY", "perhaps", "yes or no"), ("HEALTH_ENDPOINT", "/RPC2", "free"),
    ("OVERWRITE", "x" * 10_000, "yes or no"),
])  # fmt: skip
def test_bad_setting_says_what_it_takes(name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is ") as caught:
        Settings({name: value})
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_anybody_may_upload_if_it_is_said_in_so_many_words(root: Path) -> None:
    app = get_app(root=root, users=SHA, authenticate="list,anonymous-update")
    assert Client(app).upload(WHEEL, make_wheel()).status == 200
    assert Client(app).get("/simple/").status == 401
    assert pypi_ae.start_message(app, "", 1).endswith("anybody")


@pytest.mark.parametrize("wrong", [
    {"overwrite": {"yes": True}}, {"fallback_url": b"http://x/y"}, {"root": object()},
    {"authenticate": ["list", b"update"]}, {"health_endpoint": lambda: None},
    {"users": "htpasswd.txt"}, {"users": ["ada"]}, {"fallback_url": ["x", None, {}]},
], ids=str)  # fmt: skip
def test_keywords_of_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="it takes"):
        get_app(**wrong)


# ---- 4. Requests and responses -------------------------------------------------------

FORWARDED = {"x_forwarded_host": "pkg.example/", "x_forwarded_proto": "https"}
FORWARDED |= {"x_forwarded_prefix": "/a/b/", "x_forwarded_for": "1.1.1.1, 203.0.113.9"}


@pytest.mark.parametrize(("environ", "url", "address"), [
    ({}, "http://127.0.0.1/", "192.0.2.7"),
    ({"BEHIND_PROXY": "yes"}, "https://pkg.example/a/b/", "203.0.113.9"),
    ({"K_SERVICE": "x"}, "https://pkg.example/a/b/", "203.0.113.9"),
    ({"GAE_ENV": "x"}, "https://pkg.example/a/b/", "203.0.113.77"),
    ({"GAE_ENV": "x", "BEHIND_PROXY": "no"}, "http://127.0.0.1/", "192.0.2.7"),
], ids=str)  # fmt: skip
def test_proxy_is_believed_when_a_setting_says_so(
    root: Path,
    monkeypatch: Patch,
    caplog: Log,
    environ: dict[str, str],
    url: str,
    address: str,
) -> None:
    """No slash is doubled, and nobody but the proxy says what a client's address is."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    client = Client(get_app(root=root, users=SHA), login="eve:x")
    more = {**FORWARDED, "x_appengine_user_ip": "203.0.113.77"}
    assert f"--index-url {url}simple/ " in client.get("/", **more).text
    assert client.post(upload_form(WHEEL, b""), **more).status == 401
    assert f"by {address}: refused with 401" in caplog.text


def test_host_is_repeated_without_its_slash_and_its_excess(client: Client) -> None:
    assert "http://pkg.example/simple/ " in client.get("/", host="pkg.example/").text
    assert len(client.get("/", host="x" * 60_000).body) < 3000


# ---- 5. Users and passwords ----------------------------------------------------------


def count_checks(app: pypi_ae.App) -> list[str]:
    """From now on, note the user whose hash is computed."""
    seen: list[str] = []
    checks = app.users.logins().checks
    for user, check in list(checks.items()):

        def counted(password: bytes, user: str = user, check: Any = check) -> bool:
            seen.append(user)
            return bool(check(password))

        checks[user] = counted
    return seen


def test_wrong_passwords_are_bounded_by_address_and_user(
    root: Path, now: list[float]
) -> None:
    """A refused guess computes no hash; a login that is remembered is never refused."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    ada, guesser = Client(app, login=ADA), Client(app, login="ada:x")
    assert ada.get("/simple/").status == 200
    seen = count_checks(app)
    assert [guesser.get("/simple/").status for _ in range(12)] == [401] * 10 + [429] * 2
    assert len(seen) == 10
    answer = guesser.get("/simple/")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert ada.get("/simple/").status == 200
    for other in (
        {"hostile": {"REMOTE_ADDR": "192.0.2.8"}},
        {"authorization": basic("bob:x")},
        {"authorization": basic("eve:x")},
    ):
        assert guesser.get("/simple/", **other).status == 401
    now[0] += int(answer.headers["retry-after"])
    assert [guesser.get("/simple/").status for _ in range(2)] == [401, 429]
    now[0] += 120
    assert [guesser.get("/simple/").status for _ in range(12)] == [401] * 10 + [429] * 2


def test_right_login_that_is_new_waits_with_its_guesser(
    root: Path, now: list[float]
) -> None:
    """Otherwise an eleventh guess would tell whether it is right."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    for _ in range(10):
        assert Client(app, login="ada:x").get("/simple/").status == 401
    assert Client(app, login=ADA).get("/simple/").status == 429
    now[0] += 60
    assert Client(app, login=ADA).get("/simple/").status == 200


def test_guesses_take_no_memory(root: Path) -> None:
    """However many addresses and users guess, and however a login is spelled."""
    users = get_app(root=root, users=SHA).users

    def guess(count: int) -> None:
        for n in range(count):
            with pytest.raises(pypi_ae.HTTPError):
                users.verify(basic(f"{n}:x"), f"10.0.{n}")
            assert users.verify("basic " + " " * n + basic(ADA)[6:], "") == "ada"

    guess(100)
    tracemalloc.start()
    try:
        guess(2000)
        assert tracemalloc.get_traced_memory()[0] < 300_000
    finally:
        tracemalloc.stop()


@pytest.fixture
def busy(root: Path) -> Iterator[tuple[Client, list[bytes]]]:
    """A server whose checks do not end; and the passwords that it began to check."""
    app = get_app(root=root, users=SHA, authenticate="download,update")
    begun: list[bytes] = []
    end = threading.Event()

    def check(password: bytes) -> bool:
        begun.append(password)
        return end.wait(30)

    app.users.logins().checks["ada"] = check
    yield Client(app), begun
    end.set()


def test_busy_checker_refuses_at_once(
    busy: tuple[Client, list[bytes]], monkeypatch: Patch
) -> None:
    """Four logins wait, however many ask; each request for a bounded time."""
    client, begun = busy
    monkeypatch.setattr(pypi_ae, "MAX_CHECK_SECONDS", 1)

    def ask(login: str) -> int:
        answer = client.get(FILE, authorization=basic(login))
        assert answer.headers["retry-after"] == "5"
        return answer.status

    logins = [f"ada:{n}" for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, login) for login in logins * 2]
        statuses = [it.result(20) for it in waiting]
    assert statuses == [503] * 8  # each after its second
    start = time.perf_counter()
    assert [ask(f"ada:more {n}") for n in range(100)] == [503] * 100
    assert client.get("/simple/").status == 200
    assert time.perf_counter() - start < 20  # a wait for each would take 100 s
    assert len(begun) == 1


def test_requests_with_one_login_share_one_check(root: Path) -> None:
    """As when an installer opens many connections at once."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    seen, together = count_checks(app), threading.Barrier(16)
    slow = app.users.logins().checks["ada"]
    checks = app.users.logins().checks

    def check(password: bytes) -> bool:
        time.sleep(1)
        return slow(password)

    checks["ada"] = check

    def ask(_: int) -> int:
        together.wait(20)
        return Client(app, login=ADA).get("/simple/").status

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [200] * 16
    assert len(seen) <= 2  # one who came late may find it done and not yet noted


def test_one_check_stands_in_for_all_unknown_users(root: Path) -> None:
    """Else names would differ by the time of the hash that they happen to get."""
    users = {**SHA, "zoe": hash_password("x"), "max": VECTORS[1][1]}
    app = get_app(root=root, users=users)
    seen = count_checks(app)
    for n in range(40):
        with pytest.raises(pypi_ae.HTTPError):
            app.users.verify(basic(f"nobody{n}:x"), f"192.0.2.{n}")
    assert len(seen) == 40
    assert len(set(seen)) == 1


SCRYPT = VECTORS[-5][1]
CUT = [
    SCRYPT[:-41], SCRYPT[:-1], SCRYPT + "A",
    SCRYPT.replace("$+vv8/f7/c2FsdFNBTFT//g", "$AA"),
    "$apr1$$QQmxliqYSjlltaZE79l/Q.", "$apr1$saltSALT$QQmxliqYSjlltaZE79l/Q",
    "$5$$u/314SzN8SelHcI00mt9a.VUnATbeYrD2hZoXJcQsT9", "$6$saltSALT$short",
    "{SHA}2oguq15ANCGsJCWKX31fllw=",
    "$2b$04$abcdefghijklmnopqrst_uFcV8WPKEefLKdOWfX8pW1yTVya21P7a",
]  # fmt: skip


@pytest.mark.parametrize("stored", CUT)
def test_hash_that_was_cut_is_refused_at_start(root: Path, stored: str) -> None:
    """A scrypt digest of two letters is right for one password in 256."""
    assert SCRYPT.startswith("$scrypt$")
    with pytest.raises(SettingsError, match="user 'ada'"):
        get_app(root=root, users={"ada": stored})


@pytest.mark.parametrize("stored", ["$ecret$word", "{secret}", "$secret", "$2secret$x"])
def test_message_has_no_part_of_a_secret(root: Path, stored: str) -> None:
    Path("htpasswd.txt").write_text(f"ada:{stored}\n")
    with pytest.raises(SettingsError, match="line 1") as caught:
        get_app(root=root)
    assert "ecret" not in str(caught.value)


def test_users_file_rewritten_within_one_tick_is_read(
    root: Path, monkeypatch: Patch
) -> None:
    """In place, with the same size and mtime."""
    file, written = Path("htpasswd.txt"), time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: written + 1_000_000)
    client = Client(get_app(root=root), login=ADA)
    for stored, status in ((SHA["ada"], 400), (SHA["bob"], 401), (SHA["ada"], 400)):
        with open(file, "r+" if file.exists() else "w") as opened:
            opened.write(f"ada:{stored}\n")
        os.utime(file, ns=(written, written))
        assert client.post([]).status == status  # 400: it has no action


# ---- 14. Other answers ---------------------------------------------------------------


def test_start_page_and_health_wait_for_nothing(
    stocked: Client, monkeypatch: Patch
) -> None:
    """Neither for a look at the store nor for the file of users."""
    page = stocked.drop("welcome.html", b"{{NUMPKGS}} projects")
    app = get_app(root=stocked.root, users=SHA, welcome_file=page)
    monkeypatch.setattr(app.index, "root", None)  # a call would be a 500
    monkeypatch.setattr(app.users, "logins", None)
    assert Client(app).get("/").text == "1 projects"
    assert Client(app).get("/health").status == 200


# ---- 15. Routes and the app ----------------------------------------------------------


@pytest.mark.parametrize(("url", "headers", "status"), [
    ("/", {}, 200), ("/simple/", {}, 200), ("/simple/acme/", {}, 200), (FILE, {}, 200),
    (FILE, {"range": "bytes=0-1"}, 206), (FILE, {"range": "bytes=999999-"}, 416),
    (f"{FILE}.metadata", {}, 200), ("/packages/", {}, 200), ("/acme/json", {}, 200),
    ("/simple/acme/", {"if_none_match": "*"}, 304), (FILE, {"if_none_match": "*"}, 304),
    ("/acme/", {}, 302), ("/simple/Acme/", {}, 301), ("/no/such/thing", {}, 404),
    ("/health", {}, 200), ("/simple/acme/", {"accept": "image/png"}, 406),
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_answer_has_the_headers_of_safety(
    stocked: Client, method: str, url: str, headers: Any, status: int
) -> None:
    answer = stocked.send(method, url, **headers)
    assert answer.status == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = answer.headers.get("content-type", "").startswith("text/html")
    assert ("content-security-policy" in answer.headers) == page
    assert ("referrer-policy" in answer.headers) == page
    if page:
        policy = answer.headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        for name in ("default-src", "frame-ancestors", "base-uri"):
            assert rules.pop(name) == "'none'"
        assert rules.pop("form-action") == "'self'"
        assert set(rules) == {"style-src", "img-src"}


SITES: list[tuple[dict[str, str], int]] = [
    ({}, 200), ({"sec_fetch_site": "none"}, 200),
    ({"sec_fetch_site": "same-origin"}, 200),
    ({"sec_fetch_site": "cross-site"}, 403), ({"sec_fetch_site": "same-site"}, 403),
    ({"origin": "http://127.0.0.1"}, 200), ({"origin": "https://127.0.0.1"}, 200),
    ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"origin": "http://127.0.0.1:81"}, 403), ({"origin": "http://127.0.0.1.x"}, 403),
    ({"origin": "https://evil.example", "sec_fetch_site": "same-origin"}, 200),
    ({"origin": "http://127.0.0.1", "sec_fetch_site": "cross-site"}, 403),
    ({"origin": "http://PKG.example:81", "host": "pkg.EXAMPLE:81"}, 200),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), SITES, ids=str)
def test_post_of_another_site_changes_nothing(
    root: Path, headers: dict[str, str], status: int
) -> None:
    """A browser adds remembered Basic credentials to the forms of any page."""
    client = Client(get_app(root=root, users=SHA), login=ADA)
    answer = client.post(upload_form(WHEEL, make_wheel()), **headers)
    assert answer.status == status
    assert (snapshot(root) == {}) is (status == 403)
    answer = client.send("POST", "/RPC2", call({"name": "acme"}), **headers)
    assert answer.status == status
    assert client.get("/simple/", **headers).status == 200


@pytest.mark.parametrize("url", ["/favicon.ico", "/robots.txt"])
def test_what_browsers_ask_for_is_no_project(root: Path, url: str) -> None:
    client = Client(make_app(root, fallback_url="https://index.example/simple"))
    assert client.get("/nobody").status == 301
    for method in ("GET", "HEAD"):
        assert client.send(method, url).status == 404


LONG = "a/b;q=0.1," * 20_000


@pytest.mark.parametrize(("headers", "status"), [
    ({"accept": f"text/html,{LONG}"}, 200), ({"accept": LONG}, 406),
    ({"accept_encoding": f"gzip,{LONG}"}, 200), ({"if_none_match": f'{LONG}"x"'}, 200),
    ({"authorization": "Basic " + "A" * 200_000}, 401), ({"range": LONG}, 200),
    ({"x_forwarded_host": LONG}, 200), ({"user_agent": LONG}, 200),
    ({"x_cloud_trace_context": LONG}, 200), ({"x_forwarded_for": LONG}, 200),
], ids=lambda it: "-".join(it) if isinstance(it, dict) else None)  # fmt: skip
def test_long_header_is_neither_parsed_nor_kept(
    root: Path, headers: dict[str, str], status: int
) -> None:
    users = "update" if status != 401 else "list,update"
    app = get_app(root=root, users=SHA, authenticate=users, behind_proxy=True)
    Client(app).drop(WHEEL)
    name, value = next(iter(headers.items()))
    url = FILE if name == "range" else "/simple/acme/"
    asked = [{name: f"{value},{n}"} for n in range(30)]
    answers = [Client(app).get(url, **more).status for more in asked[:2]]
    tracemalloc.start()
    try:
        answers += [Client(app).get(url, **more).status for more in asked[2:]]
        assert tracemalloc.get_traced_memory()[0] < 2_000_000  # 28 of 200 KB: 5.6 MB
    finally:
        tracemalloc.stop()
    assert set(answers) == {status}


def test_long_words_of_a_request_are_not_repeated(client: Client, caplog: Log) -> None:
    client.app.verbose = True
    for status, words in (
        (405, {"REQUEST_METHOD": "A" * 60_000}), (414, {"PATH_INFO": "/a" * 30_000}),
        (404, {"PATH_INFO": f"/simple/-{'a' * 999}"}),
        (404, {"PATH_INFO": "/a/" * 300}),
    ):  # fmt: skip
        answer = client.get("/simple/", hostile=words)
        assert (answer.status, len(answer.body) < 400) == (status, True)
    assert len(caplog.text) < 20_000
    query = "&".join(f"a{n}=b" for n in range(10_000))
    assert client.get(f"/simple/?{query}&format=text/plain").status == 200


# ---- 16. Command line ----------------------------------------------------------------


@pytest.mark.parametrize(("line", "says"), [
    ("--log-file x", "2>FILE"), ("--server-base-url /x", "BEHIND_PROXY"),
    ("one two", "second DIR"), ("--hash-algo md5 -p 99999", "--hash-algo"),
    ("--cache-control 60 -p 99999", "change nothing"), ("-p 99999", "99999"),
    ("--backend auto --server gunicorn -p 99999", "change nothing"),
    ("-i 192.0.2.1", "192.0.2.1"), ("-p x", "'x'"), ("-a list,download", "anonymous"),
])  # fmt: skip
def test_flags_of_pypiserver_are_answered(capsys: Output, line: str, says: str) -> None:
    """Those that change nothing are taken; the port then ends the start."""
    assert main(line.split()) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.out == ""


def test_port_in_use_is_named(capsys: Output) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["-p", port]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert port in message
    assert "in use" in message
    assert "-p" in message


def test_no_users_names_the_file_of_this_server(root: Path, capsys: Output) -> None:
    file = Path("users.txt").absolute()
    file.write_text("")
    app = get_app(root=root, password_file=file)
    command = f"python pypi_ae.py passwd {file} USER"
    assert command in Client(app).upload(WHEEL, make_wheel()).text
    assert command in pypi_ae.start_message(app, "", 1)
    assert main(["-P", str(file), "-a", "list,update"]) == 2
    assert command in capsys.readouterr().err


def test_read_only_directory_is_served_with_a_warning(
    stocked: Client, monkeypatch: Patch, caplog: Log
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as for root
    client = Client(make_app(stocked.root))
    assert f"{stocked.root} cannot be written" in caplog.text
    assert client.get(FILE).status == 200


class Stopped:
    """A terminal at which Ctrl-C is pressed."""

    def readline(self, *_: Any) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("line", "stdin"), [
    ("users ada --stdin", None), ("users ada --stdin", Stopped()),
    ("users ada", None), ("users ada", io.StringIO("")), ("users ada", Stopped()),
    ("ada htpasswd.txt --stdin", io.StringIO("x\n")),
    ("ada old --stdin", io.StringIO("x\n")),
], ids=repr)  # fmt: skip
@pytest.mark.filterwarnings("ignore::getpass.GetPassWarning")
def test_passwd_that_is_stopped_changes_nothing(
    monkeypatch: Patch, capsys: Output, line: str, stdin: Any
) -> None:
    """Ctrl-C, Ctrl-D, no standard input, and FILE and USER in the wrong order."""
    old = {"old": b"ada:x\n"}
    Path("old").write_bytes(old["old"])
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("getpass.getpass", getattr(getpass, "fallback_getpass"))  # noqa: B009
    assert main(["passwd", *line.split()]) == 2
    message = capsys.readouterr().err
    assert "nothing was changed" in message or "cannot be USER" in message
    assert snapshot(Path.cwd()) == old


def test_passwd_writes_into_no_file_of_others(monkeypatch: Patch) -> None:
    """Its temporary file is a new one, even if somebody knew its name."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    Path("target").write_text("kept")
    Path(f"users.{bytes(8).hex()}.new").symlink_to("target")
    assert main(["passwd", "users", "ada", "--stdin"]) == 2
    assert Path("target").read_text() == "kept"
    assert not Path("users").exists()

"""Tests of README.md and SECURITY.md: every command is run as it stands there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gcs_rest
import pypi_ae
from test_pypi_ae import (
    MODULE,
    NONE,
    SDIST,
    SERVERS,
    WHEEL,
    Client,
    Env,
    Patch,
    Server,
    Start,
    basic,
    clean_environ,
    make_app,
    make_wheel,
    running,
    start,
    write_sdist,
    write_wheel,
)

assert start  # a fixture

# ---- README: every command -----------------------------------------------------------
# A command is taken out of README.md by its first words, and run by bash. Only the host
# and the port are replaced, the port only if 8080 is taken.

README = MODULE.with_name("README.md").read_text("utf-8")
SECURITY = MODULE.with_name("SECURITY.md").read_text("utf-8")
PROGRAM = re.compile(
    r"([A-Z_]+=\S+ )*(python3|pip|uv|twine|hatch|poetry|pdm|flit|curl|read|gcloud"
    r"|gunicorn|granian) \S"
)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


def find_commands() -> list[str]:
    """Each command, once: lines of blocks without a language, and code in the text."""
    lines = "".join(blocks("")).replace("\\\n", "").splitlines()
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return sorted({line for line in lines if PROGRAM.match(line)})


COMMANDS = find_commands()
PUBLISHING = {
    "twine": ["TWINE_PASSWORD="],
    "uv": ["UV_PUBLISH_PASSWORD="],
    "hatch": ["HATCH_INDEX_AUTH="],
    "poetry": ["poetry config", "POETRY_HTTP_BASIC"],
    "pdm": ["PDM_PUBLISH_PASSWORD="],
    "flit": ["FLIT_INDEX_URL="],
}
INSTALLING = {  # commands, and what they find when only a stranger has a project acme
    "uv-add": (["uv add"], "acme-9.0"),
    "uv-pip": (["uv pip install --index"], "acme-9.0"),
    "poetry": (["poetry source", "poetry add"], ""),
    "pdm": (["pdm add"], ""),
    "pip": (["pip install --index-url http://127"], ""),
    "pip-extra": (["pip install --extra-index-url"], "acme-9.0"),
}
RUN, FALLBACK = "python3 pypi_ae.py", "FALLBACK_URL="
PASSWD, TIDY, READ = f"{RUN} passwd", f"{RUN} tidy", "read "
CURL, GUNICORN = "curl ", "gunicorn -b"
CLOSED = [
    "twine upload --repository-url https://YOUR-APP",
    "PIP_INDEX_URL=",
]
NOT_RUN = {
    "python3 -m venv .venv": "this runs all tests; .ci/run takes it out of the README",
    "python3 bench/": "takes minutes, and measures other servers",
    "granian ": "only says how the figures were measured",
    "gunicorn -w 2": "the same",
    "gcloud ": "needs an account; its words are checked",
}


def command(start: str) -> str:
    """The one command that begins so; itself, if all of it is given."""
    found = [line for line in COMMANDS if line.startswith(start)]
    found = [line for line in found if line == start] or found
    assert len(found) == 1, (start, found)
    return found[0]


def test_every_command_of_the_readme_is_run() -> None:
    lists = [*PUBLISHING.values(), *(starts for starts, _ in INSTALLING.values())]
    starts = [start for each in lists for start in each] + CLOSED
    starts += [
        RUN,
        FALLBACK,
        PASSWD,
        TIDY,
        READ,
        CURL,
        GUNICORN,
        "pip install gunicorn",
    ]
    run = {command(start) for start in starts}
    others = [line for line in COMMANDS if line not in run]
    assert [line for line in others if not line.startswith(tuple(NOT_RUN))] == []
    line = command("python3 -m venv .venv")
    assert line in README.splitlines()
    assert "grep -m1 '^python3 -m venv'" in MODULE.with_name(".ci").joinpath(
        "run"
    ).read_text("utf-8")


GCLOUD = {  # flags by the words of a command; all else is a name or a path
    "app browse": "--no-launch-browser",
    "app deploy": "",
    "auth application-default login": "",
    "iam service-accounts create": "",
    "run deploy": "--source --allow-unauthenticated --service-account "
    "--set-build-env-vars --set-env-vars",
    "storage": "",
    "storage buckets add-iam-policy-binding": "--role --member",
    "storage buckets create": "--location --uniform-bucket-level-access",
    "storage cp": "",
    "storage objects update": "--update-custom-metadata",
}
A_NAME = re.compile(r"gs://BUCKET(/.*)?|dist/.*|pypi-ae|\.")


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("gcloud ")])
def test_gcloud_is_called_with_words_that_it_has(line: str) -> None:
    tokens = shlex.split(line)[1:]
    flags = [token.partition("=")[0] for token in tokens if token.startswith("--")]
    words = [t for t in tokens if not t.startswith("--") and not A_NAME.fullmatch(t)]
    assert set(flags) <= set(GCLOUD[" ".join(words)].split())


class Reader:
    """Someone who has pypi_ae.py and a project, and types what the README says."""

    def __init__(self, home: Path, monkeypatch: Patch) -> None:
        self.home, self.project, self.host = home, home / "project", ""
        self.monkeypatch = monkeypatch
        self.project.mkdir(parents=True)
        shutil.copy(MODULE, home)
        # A machine without a keyring; nothing says that nobody can be asked.
        self.environ = clean_environ(home)
        self.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
        for name in ("PIP_NO_INPUT", "TWINE_NON_INTERACTIVE", "UV_PYTHON"):
            del self.environ[name]

    def adapt(self, line: str) -> str:
        line = line.replace("127.0.0.1:8080", self.host)
        return re.sub(
            r"https://(alice:\$PASSWORD@)?YOUR-APP", rf"http://\g<1>{self.host}", line
        )

    def run(
        self,
        *starts: str,
        typed: str = "",
        folder: Path | None = None,
        fails: bool = False,
        env: Env = NONE,
    ) -> str:
        """Run commands in one bash, which has no terminal: passwords come by stdin."""
        script = "\n".join(self.adapt(command(start)) for start in starts)
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=folder or self.project,
            env=self.environ | env,
            input=typed.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=90,
            start_new_session=True,
        )
        output = done.stdout.decode("utf-8", "replace")
        assert (done.returncode != 0) == fails, f"{script}: {output}"
        return output

    @contextlib.contextmanager
    def serve(self, first: str, public: str = "", **settings: str) -> Iterator[Server]:
        """Start a server with a command of the README, in the folder `home`."""
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", 8080)) == 0
        if taken:
            settings["PORT"] = "0"
        self.host = "127.0.0.1:0" if taken else "127.0.0.1:8080"
        line = self.adapt(command(first)).replace("https://PUBLIC", public)
        bash = "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"
        self.monkeypatch.setitem(SERVERS, line, ("-c", bash, line))
        with running(line, self.home, **settings) as server:
            self.host = server.url.removeprefix("http://")
            yield server

    def add_alice(self) -> None:
        self.run(PASSWD, typed="s3cret\ns3cret\n", folder=self.home)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: Patch) -> Reader:
    return Reader(tmp_path / "reader", monkeypatch)


PYPROJECT = """\
[project]
name = "{name}"
version = "1.0"
description = "Makes all."
requires-python = ">=3.11"
"""
BUILD = '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
# To build is to copy what is there, as there may be no network.
BACKEND = """\
import shutil
def build_wheel(folder, *_):
    return shutil.copy("acme-1.0-py3-none-any.whl", folder).split("/")[-1]
def build_sdist(folder, *_):
    return shutil.copy("acme-1.0.tar.gz", folder).split("/")[-1]
"""


def make_project(folder: Path) -> None:
    """A project that any tool can build, and has built."""
    text = BUILD + PYPROJECT.format(name="acme")
    (folder / "pyproject.toml").write_text(text)
    (folder / "acme.py").write_text('"""Makes all."""\n')
    (folder / "b.py").write_text(BACKEND)
    wheel = write_wheel(folder, "acme")
    (folder / "dist").mkdir()
    for path in (wheel, write_sdist(wheel)):
        shutil.copy(path, folder / "dist")


@pytest.mark.parametrize("client", PUBLISHING)
def test_publish_as_the_readme_says(reader: Reader, client: str) -> None:
    make_project(reader.project)
    with reader.serve(RUN) as server:
        reader.add_alice()
        reader.run(READ, *PUBLISHING[client], typed="s3cret\n")
        names = server.names()
        assert SDIST in names
        assert len(names) == 2  # flit has a tag of its own for its wheel
        assert all(name.startswith("acme-1.0") for name in names)


PDM_APP = "\n[tool.pdm]\ndistribution = false\n\n"
POETRY_APP = '\n[[tool.poetry.source]]\nname = "public"\nurl = "{url}"\n'


def make_application(folder: Path, client: str, public: str) -> str:
    """A project that will need acme; return the folder in which it is installed."""
    text = PYPROJECT.format(name="app")
    if client == "pdm":
        block = blocks("toml")[0]
        text += PDM_APP + block
    if client == "poetry":  # its one public index cannot be replaced otherwise
        text += POETRY_APP.format(url=public) + "[tool.poetry]\npackage-mode = false\n"
    (folder / "pyproject.toml").write_text(text)
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return f".venv/lib/{python}/site-packages"


@pytest.mark.parametrize("acme", ["published", "not yet published"])
@pytest.mark.parametrize("client", INSTALLING)
def test_install_as_the_readme_says(
    reader: Reader,
    start: Start,
    client: str,
    acme: str,
) -> None:
    """A stranger has acme 9.0 on the public index, which is played here."""
    public = start("public", "wsgiref")
    write_wheel(public.root, "public-base")
    write_wheel(public.root, "acme", "9.0")
    index = f"{public.url}/simple/"
    env = {"UV_DEFAULT_INDEX": index, "PDM_PYPI_URL": index, "PIP_INDEX_URL": index}
    starts, otherwise = INSTALLING[client]
    folder = make_application(reader.project, client, index)
    subprocess.run(
        ["uv", "venv", "-q", "-p", sys.executable, ".venv"],
        cwd=reader.project,
        env=reader.environ,
        check=True,
    )
    if client.startswith("pip"):
        env["PIP_TARGET"] = folder
    if acme == "published":
        needs = "Requires-Dist: public-base"
        write_wheel(reader.home / "packages", "acme", "1.0", needs)
    with reader.serve(FALLBACK if client == "pip" else RUN, public.url):
        reader.run(*starts, env=env, fails=not otherwise and acme != "published")
    found = {
        path.name.removesuffix(".dist-info")
        for path in (reader.project / folder).glob("*.dist-info")
    }
    expected = {"acme-1.0", "public_base-1.0"} if acme == "published" else {otherwise}
    if client == "pip-extra":
        expected = {otherwise}
    assert found == expected - {""}


def test_the_other_commands_of_the_readme(reader: Reader) -> None:
    """pip install, gunicorn, tidy, and curl, which asks for a password."""
    write_wheel(reader.home / "packages", "acme")
    reader.add_alice()
    assert "1 done" in reader.run(TIDY, folder=reader.home)
    assert (reader.home / "packages" / "acme" / WHEEL).exists()
    assert "already" in reader.run("pip install gunicorn")
    settings = {"AUTHENTICATE": "list,update"}
    with reader.serve(GUNICORN, **settings) as server:
        headers = {"Authorization": basic("alice:s3cret")}
        page = "/simple/acme/"
        assert server.ask("GET", page, headers=headers).status_code == 200
        assert "401" not in reader.run(CURL, typed="s3cret\n")
        assert server.ask("GET", page, headers=headers).status_code == 404


def test_the_commands_for_app_engine(reader: Reader) -> None:
    """A closed index: twine and pip ask for the password of alice."""
    make_project(reader.project)
    with reader.serve(RUN, AUTHENTICATE="list,download,update"):
        reader.add_alice()
        reader.run(CLOSED[0], typed="s3cret\n")
        reader.run(READ, CLOSED[1], typed="s3cret\n", env={"PIP_TARGET": "here"})
    assert (reader.project / "here" / "acme.py").exists()


def test_the_hooks_of_the_readme(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, pypi_ae.App] = {}
    exec(blocks("python")[0], names)
    ci = Client(names["application"], login="ci:s3cret")
    assert ci.upload(WHEEL, make_wheel()).status == 200
    assert capsys.readouterr().out.startswith("Addition ")
    assert Client(make_app(tmp_path / "packages")).page()["versions"] == ["1.0"]


# ---- SECURITY: its tables agree with the code ----------------------------------------

UNITS = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20}


def limits_of(module: ModuleType, prefix: str = "") -> dict[str, float]:
    """The numbers that are constants of a module; sys.maxsize bounds nothing."""
    return {
        prefix + name: value
        for name, value in vars(module).items()
        if re.fullmatch("[A-Z][A-Z_]*", name) and type(value) in (int, float)
        if value != sys.maxsize
    }


def test_every_limit_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+)( [KM]iB)? \|", SECURITY, re.M)
    table = {name: float(number) * UNITS[unit] for name, number, unit in rows}
    assert len(table) == len(rows)
    assert table == limits_of(pypi_ae) | limits_of(gcs_rest, "gcs_rest.")


def test_every_finding_of_bandit_is_answered() -> None:
    files = ["pypi_ae.py", "gcs_rest.py"]
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-f", "json", *files],
        cwd=MODULE.parent,
        capture_output=True,
    )
    results = json.loads(done.stdout)["results"]
    found = Counter((os.path.basename(r["filename"]), r["test_id"]) for r in results)
    rows = re.findall(r"^\| `(\w+\.py)` \| (B\d+) \| (\d+) \| \w", SECURITY, re.M)
    assert found == {(file, test): int(times) for file, test, times in rows}

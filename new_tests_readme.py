"""Tests of README.md and SECURITY.md: every command is run as it stands there."""

from __future__ import annotations

import contextlib
import json
import re
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
    Output,
    Patch,
    Server,
    basic,
    clean_environ,
    make_app,
    make_wheel,
    running,
    write_sdist,
    write_wheel,
)

# ---- Clients: the README's commands --------------------------------------------------
# A command is taken out of README.md by its first words, and bash runs it as it stands
# there, but for the port, and the hosts PUBLIC and YOUR-APP. A test sees that none is
# forgotten. The keyring of these people fails, as there is none in a container.

README = MODULE.with_name("README.md").read_text("utf-8")
IS_COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(python3|pip|uv|twine|hatch|poetry|pdm|flit|curl|read|gcloud"
    r"|gunicorn|granian) \S"
)


def blocks(language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


def find_commands() -> list[str]:
    """Each command, once: lines of blocks without a language, and code in the text."""
    lines = "".join(blocks()).replace("\\\n", "").splitlines()
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    names = {"uv pip install"}  # of a measurement
    return sorted({line for line in lines if IS_COMMAND.match(line)} - names)


COMMANDS = find_commands()
RUN, PASSWD, TIDY = (
    "python3 pypi_ae.py",
    "python3 pypi_ae.py passwd",
    "python3 pypi_ae.py tidy",
)
ASK, FALLBACK, GUNICORN, CURL = "read -rs", "FALLBACK_URL=", "gunicorn -b", "curl"
INSTALL_GUNICORN = "pip install gunicorn"
PUBLISHING = {
    "twine": ["TWINE_PASSWORD="],
    "uv": ["UV_PUBLISH_PASSWORD="],
    "hatch": ["HATCH_INDEX_AUTH="],
    "poetry": ["poetry config", "POETRY_HTTP_BASIC"],
    "pdm": ["PDM_PUBLISH_PASSWORD="],
    "flit": ["FLIT_INDEX_URL="],
}
INSTALLING = {
    "poetry": ["poetry source", "poetry add"],
    "pdm": ["pdm add"],
    "uv add": ["uv add"],
    "uv pip": ["uv pip install --index"],
    "pip": ["pip install --index-url http:"],
    "unsafe pip": ["pip install --extra-index-url"],
}
APP_ENGINE = ["twine upload", "pip install --index-url https:"]
NOT_RUN = {
    "gcloud ": "needs an account of Google Cloud",
    "python3 -m venv .venv ": "runs this suite; .ci/run takes it out of the README",
    "python3 fuzz/": "takes minutes; tests of their own do the same for seconds",
    "python3 bench/": "takes minutes, and measures other servers",
    "gunicorn -w 2 ": "says how the figures were measured",
    "granian ": "the same",
}


def command(start: str) -> str:
    """The one command that begins so, or is just this."""
    found = [line for line in COMMANDS if line.startswith(start)]
    found = [line for line in found if line == start] or found
    assert len(found) == 1, (start, found)
    return found[0]


def test_every_command_of_the_readme_is_run() -> None:
    lists = [*PUBLISHING.values(), *INSTALLING.values(), APP_ENGINE]
    starts = [RUN, PASSWD, TIDY, ASK, FALLBACK, GUNICORN, CURL, INSTALL_GUNICORN]
    run = {command(start) for each in (*lists, starts) for start in each}
    others = [line for line in COMMANDS if line not in run]
    assert [line for line in others if not line.startswith(tuple(NOT_RUN))] == []
    assert all(any(map(str.startswith, others, [it] * len(others))) for it in NOT_RUN)
    ci = (MODULE.parent / ".ci/run").read_text("utf-8")
    assert "grep -m1 '^python3 -m venv' README.md" in ci
    assert command("python3 -m venv") in README.splitlines()


@pytest.mark.parametrize("script", re.findall(r"^python3 (fuzz/\w+\.py)", README, re.M))
def test_the_tools_of_developers_are_there(script: str) -> None:
    text = (MODULE.parent / script).read_text("utf-8")
    assert f"python {script}" in text.split('"""')[1]


class Reader:
    """Somebody with pypi_ae.py and a project, who types what the README says."""

    def __init__(self, home: Path, monkeypatch: Patch) -> None:
        self.home, self.project, self.host = home, home / "project", ""
        self.monkeypatch = monkeypatch
        self.project.mkdir(parents=True)
        shutil.copy(MODULE, home)
        self.environ = clean_environ(home)
        self.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
        for name in ("PIP_NO_INPUT", "TWINE_NON_INTERACTIVE"):
            del self.environ[name]

    def adapt(self, line: str) -> str:
        line = line.replace("https://YOUR-APP", f"http://{self.host}")
        return line.replace("127.0.0.1:8080", self.host)

    def run(
        self, *starts: str, typed: str = "", fails: bool = False, env: Env = NONE
    ) -> str:
        """Run commands in one bash without a terminal; `typed` is its input."""
        lines = [command(start) for start in starts]
        own = any(line.startswith(RUN) for line in lines)
        done = subprocess.run(
            ["bash", "-ec", "\n".join(map(self.adapt, lines))],
            cwd=self.home if own else self.project,
            env=self.environ | env,
            input=typed.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=90,
            start_new_session=True,
        )
        output = done.stdout.decode("utf-8", "replace")
        assert (done.returncode != 0) == fails, f"{lines}: {output}"
        return output

    @contextlib.contextmanager
    def serve(self, start: str, public: str = "", **settings: str) -> Iterator[Server]:
        """Run a command that starts a server, which has the user alice."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            settings["PORT"] = str(probe.getsockname()[1])  # free again, at once
        self.host = f"127.0.0.1:{settings['PORT']}"
        self.run(PASSWD, typed="s3cret\ns3cret\n")
        line = self.adapt(command(start)).replace("https://PUBLIC", public)
        bash = "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"
        self.monkeypatch.setitem(SERVERS, line, ("-c", bash, line))
        with running(line, self.home, **settings) as server:
            assert server.url == f"http://{self.host}"
            yield server


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: Patch) -> Reader:
    return Reader(tmp_path / "reader", monkeypatch)


TO_BUILD = """\
[build-system]
requires = []
build-backend = "b"
backend-path = ["."]
[project]
name = "acme"
version = "1.0"
description = "Makes all."
requires-python = ">=3.11"
"""
COPY = """\
import shutil
def build_wheel(folder, *_):
    return shutil.copy("acme-1.0-py3-none-any.whl", folder).split("/")[-1]
def build_sdist(folder, *_):
    return shutil.copy("acme-1.0.tar.gz", folder).split("/")[-1]
"""


def make_project(folder: Path) -> None:
    """A project that is built, and that is built again by copying the same files."""
    (folder / "pyproject.toml").write_text(TO_BUILD)
    (folder / "acme.py").write_text('"""Makes all."""\n')
    (folder / "b.py").write_text(COPY)
    wheel = write_wheel(folder, "acme")
    (folder / "dist").mkdir()
    for path in (wheel, write_sdist(wheel)):
        shutil.copy(path, folder / "dist")


@pytest.mark.parametrize("client", PUBLISHING)
def test_publishing_as_the_readme_says(reader: Reader, client: str) -> None:
    make_project(reader.project)
    with reader.serve(RUN) as server:
        reader.run(ASK, *PUBLISHING[client], typed="s3cret\n")
        assert sorted(server.names()) == [WHEEL, SDIST]


APPLICATION = """\
[project]
name = "app"
version = "1.0"
requires-python = ">=3.11"
[tool.pdm]
distribution = false
[tool.poetry]
package-mode = false
"""
# The index that poetry takes for the public one can only be set so.
OF_POETRY = '[[tool.poetry.source]]\nname = "public"\nurl = "{}"\n'
OURS, STRANGERS = {"acme-1.0", "public_base-1.0"}, {"acme-9.0"}
INSTALLED = [  # client, when acme is published here, what is installed
    ("poetry", "later", OURS),
    ("pdm", "later", OURS),
    ("pip", "later", OURS),
    ("uv add", "before", OURS),
    ("uv pip", "before", OURS),
    ("uv add", "never", STRANGERS),
    ("uv pip", "never", STRANGERS),
    ("unsafe pip", "before", STRANGERS),
]


@pytest.mark.parametrize(
    ("client", "when", "expected"),
    INSTALLED,
    ids=[" ".join(it[:2]) for it in INSTALLED],
)
def test_installing_as_the_readme_says(
    reader: Reader, tmp_path: Path, client: str, when: str, expected: set[str]
) -> None:
    """acme needs public-base of a public index, where a stranger has an acme 9.0."""
    folder, packages = reader.project, reader.home / "packages"
    needs = "Requires-Dist: public-base"
    if when == "before":
        write_wheel(packages, "acme", "1.0", needs)
    venv = ["uv", "venv", "-q", ".venv"]
    subprocess.run(venv, cwd=folder, env=reader.environ, check=True, timeout=90)
    with contextlib.ExitStack() as stack:
        public = stack.enter_context(running("wsgiref", tmp_path / "public"))
        write_wheel(public.root, "public-base")
        write_wheel(public.root, "acme", "9.0")
        index = f"{public.url}/simple/"
        env = {"PIP_INDEX_URL": index, "PIP_PREFIX": ".venv", "PDM_PYPI_URL": index}
        env |= {"UV_DEFAULT_INDEX": index, "UV_PYTHON": ".venv"}
        start = FALLBACK if client == "pip" else RUN
        stack.enter_context(reader.serve(start, public.url))
        source = OF_POETRY.format(index) if client == "poetry" else blocks("toml")[0]
        (folder / "pyproject.toml").write_text(APPLICATION + reader.adapt(source))
        reader.run(*INSTALLING[client], env=env, fails=when == "later")
        if when == "later":
            write_wheel(packages, "acme", "1.0", needs)
            reader.run(INSTALLING[client][-1], env=env)
    found = (folder / ".venv").glob("lib/python*/site-packages/*.dist-info")
    assert {path.stem for path in found} == expected


def test_the_readmes_other_commands(reader: Reader) -> None:
    write_wheel(reader.home / "packages", "acme")
    assert "1 done" in reader.run(TIDY)
    assert (reader.home / "packages" / "acme" / WHEEL).exists()
    assert "already satisfied" in reader.run(INSTALL_GUNICORN)
    with reader.serve(GUNICORN, AUTHENTICATE="list,update") as server:
        page, alice = "/simple/acme/", {"Authorization": basic("alice:s3cret")}
        assert server.ask("GET", page, headers=alice).status_code == 200
        assert "401" not in reader.run(CURL, typed="s3cret\n")
        assert server.ask("GET", page, headers=alice).status_code == 404


def test_the_readmes_commands_for_app_engine(reader: Reader) -> None:
    """A closed index: twine asks for a password, pip for a user as well."""
    make_project(reader.project)
    with reader.serve(RUN, AUTHENTICATE="list,download,update"):
        reader.run(APP_ENGINE[0], typed="s3cret\n")
        reader.run(APP_ENGINE[1], typed="alice\ns3cret\n", env={"PIP_TARGET": "here"})
    assert (reader.project / "here" / "acme.py").exists()


def test_the_readmes_hooks(tmp_path: Path, monkeypatch: Patch, capsys: Output) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, pypi_ae.App] = {}
    exec(blocks("python")[0], names)
    ci = Client(names["application"], login="ci:s3cret")
    assert ci.upload(WHEEL, make_wheel()).status == 200
    assert capsys.readouterr().out.startswith("Addition ")
    assert Client(make_app(tmp_path / "packages")).page()["versions"] == ["1.0"]


# The tables of SECURITY.md say what the code says.

SECURITY = MODULE.with_name("SECURITY.md").read_text("utf-8")
UNITS = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20}


def constants(module: ModuleType, prefix: str = "") -> dict[str, float]:
    numbers = {k: v for k, v in vars(module).items() if type(v) in (int, float)}
    return {prefix + k: v for k, v in numbers.items() if re.fullmatch("[A-Z_]+", k)}


def test_the_limits_are_as_security_says() -> None:
    """To add a limit, add a row: | `NAME` | number, or number KiB or MiB | why |"""
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+)( [KM]iB)? \|", SECURITY, re.M)
    table = {name: float(number) * UNITS[unit] for name, number, unit in rows}
    known = constants(pypi_ae) | constants(gcs_rest, "gcs_rest.")
    assert table == {name: known.get(name) for name in table}
    assert {name for name in known if "MAX" in name} - table.keys() == set()


def test_every_finding_of_bandit_is_answered() -> None:
    words = ["-m", "bandit", "-q", "-f", "json", "pypi_ae.py", "gcs_rest.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=MODULE.parent, capture_output=True, timeout=90
    )
    results = json.loads(done.stdout)["results"]
    found = Counter((Path(it["filename"]).name, it["test_id"]) for it in results)
    rows = re.findall(r"^\| `(\w+\.py)` \| (B\d+) \| (\d+) \| \w", SECURITY, re.M)
    assert found == {(file, test): int(times) for file, test, times in rows}

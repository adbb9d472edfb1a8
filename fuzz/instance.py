"""An instance of the soak, for gunicorn: pypi_ae as it is, with less patience.

Tokens come from the played metadata server of GCE_METADATA_HOST, as on App Engine. With
the real timeouts a soak would take hours, and files above 8 MiB would fill the memory.
"""

from functools import partial

import gcs_rest
import pypi_ae


def make() -> pypi_ae.App:
    gcs_rest.BACKOFF, gcs_rest.BACKOFF_MAX = 0.02, 0.2
    gcs_rest.CONNECT_TIMEOUT = gcs_rest.READ_TIMEOUT = gcs_rest.READ_TIMEOUT_MIN = 1.0
    gcs_rest.FINAL_TIMEOUT = 2.0
    gcs_rest.MULTIPART_MAX = 100 << 10  # larger files need a session
    credentials = gcs_rest.find_credentials({"K_SERVICE": "soak"})
    ours = partial(gcs_rest.Bucket, credentials=credentials, deadline=4.0)
    setattr(gcs_rest, "Bucket", ours)  # noqa: B010 - mypy: it is a class
    return pypi_ae.get_app()

"""A server that speaks S3 over HTTP, in a process of its own: what opens files by URI is tried against it."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.online.servers import free_port

#: What finds the server: Arrow and delta-rs read these variables.
_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """A server with one empty bucket for the block; gives the environment variables that lead to it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = str(Path(sys.executable).with_name("moto_server"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], **quiet) as process:
        try:
            _create(f"{url}/{bucket}", process)
            yield {**_VARIABLES, "AWS_ENDPOINT_URL": url}
        finally:
            process.kill()


def _create(bucket_url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(bucket_url, method="PUT"), timeout=10).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)

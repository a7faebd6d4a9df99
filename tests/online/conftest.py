"""One embedded server and one Debian Redis for the whole folder; each test finds them empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from spark_fs.online import server
from tests.online.servers import redis_process


@pytest.fixture(scope="session", params=["embedded", "redis"])
def server_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server: the embedded one, then Debian's Redis 7.0, both with a password."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "redis":
        with redis_process(folder, password="sesame") as url:
            yield url
        return
    yield server.start(folder).url
    server.stop(folder)


@pytest.fixture
def url(server_url: str) -> str:
    """The address of a running, empty server."""
    with redis.Redis.from_url(server_url) as client:
        client.flushall()
    return server_url


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    """A plain client to look into the server."""
    with redis.Redis.from_url(url) as plain:
        yield plain

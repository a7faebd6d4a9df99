"""The online store's server: clients, errors, what is checked before a write, marks of runs, and removal of keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from spark_fs.errors import InvalidError, translate
from spark_fs.online import codec
from spark_fs.online.trust import secure

OLDEST_SERVER = (6, 2)


def make_pool(url: str, socket_timeout_seconds: float, retry: Retry) -> redis.ConnectionPool:
    """Connections to the server, made when first used; ``password_file`` and TLS in the URL are as ``trust.secure`` says.

    Raises SFS-614 for what is no address or has options that nobody knows, SFS-631 and SFS-632 as ``secure`` does.
    """
    try:
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=socket_timeout_seconds,
            socket_connect_timeout=min(socket_timeout_seconds, 5.0),
            retry=retry,
        )
        options = pool.connection_kwargs
        secure(options, [options.get("host", "localhost")], tls=issubclass(pool.connection_class, redis.SSLConnection))
        pool.connection_class(**options)  # connects to nothing, but refuses options that it does not know
    except (ValueError, TypeError, redis.RedisError):
        # The text of the error may hold a piece of the password, so it is neither shown nor chained.
        raise InvalidError.of(
            "SFS-614",
            "online.url is no address of a Redis server.",
            fix="write redis://host:6379/0, rediss://user:password@host:6379/0, unix:///path/to/socket or embedded",
        ) from None
    return pool


def open_client(url: str, *, socket_timeout_seconds: float = 5.0) -> redis.Redis:
    """A client with a connection pool, for any number of threads; connects when first used. Raises SFS-614."""
    return redis.Redis(connection_pool=make_pool(url, socket_timeout_seconds, Retry(ExponentialBackoff(cap=0.2, base=0.02), 2)))


@contextmanager
def redis_errors() -> Iterator[None]:
    """Redis-py's errors inside become ours where we have something to add, chained to theirs."""
    try:
        yield
    except redis.RedisError as error:
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server says about itself; bytes, ``max_bytes`` 0 for no limit. ``kind`` is ``redis`` or ``valkey``."""

    kind: str
    version: str
    mode: str
    maxmemory_policy: str
    used_bytes: int
    max_bytes: int


def check_server(url: str, *, socket_timeout_seconds: float = 5.0) -> ServerReport:
    """Ask a server what it is, before anything is written to it.

    Raises SFS-604 for a server older than 6.2 and for one that silently drops features when full (any ``maxmemory-policy``
    but ``noeviction`` under a memory limit), SFS-601 where it cannot be reached, SFS-602 where it refuses the login.
    """
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        info = cast("dict[str, Any]", client.info())
    kind = "valkey" if "valkey_version" in info else "redis"
    report = ServerReport(
        kind=kind,
        version=str(info[f"{kind}_version"]),
        mode=str(info.get("server_mode") or info.get("redis_mode", "standalone")),
        maxmemory_policy=str(info.get("maxmemory_policy", "noeviction")),
        used_bytes=int(info["used_memory"]),
        max_bytes=int(info.get("maxmemory", 0)),
    )
    if tuple(int(part) for part in str(info["redis_version"]).split(".")[:2]) < OLDEST_SERVER:
        raise InvalidError.of(
            "SFS-604", f"The online store is Redis {report.version}; 6.2 or newer is needed.", fix="upgrade the server"
        )
    if report.max_bytes and report.maxmemory_policy != "noeviction":
        raise InvalidError.of(
            "SFS-604",
            f"The online store drops features when full: its maxmemory-policy is {report.maxmemory_policy}.",
            why="An evicted feature looks like one that never was, and no error tells of it.",
            fix="set maxmemory-policy noeviction on the server",
        )
    return report


def erase_keys(url: str, names: Sequence[bytes], *, socket_timeout_seconds: float = 10.0) -> None:
    """Put a tombstone that no writer can replace in the place of each of these Redis keys; safe to repeat."""
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        for name in names:
            client.set(name, codec.tombstone(codec.ERASED), px=codec.GRAVE)


def reopen_keys(url: str, names: Sequence[bytes], *, socket_timeout_seconds: float = 10.0) -> None:
    """Take away the tombstones that ``erase_keys`` has set, so that the keys can be written again."""
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        for name in names:
            # Nothing else can have come in their place, so that looking first is no race.
            if client.get(name) == codec.tombstone(codec.ERASED):
                client.delete(name)


#: So many tokens of published claims a server keeps for each view; the last few are asked for.
_TOKENS = 100


def leave_token(url: str, prefix: bytes, token: str, *, socket_timeout_seconds: float = 10.0) -> None:
    """Leave a mark in the online store, after all rows of a run and before it is noted as published.

    As long as the mark is there, so are the rows: a server that lost some of its last writes lost the mark as well.
    """
    name = b"%bruns" % prefix
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        client.lpush(name, token)
        client.ltrim(name, 0, _TOKENS - 1)


def has_token(url: str, prefix: bytes, token: str, *, socket_timeout_seconds: float = 10.0) -> bool:
    """Whether the mark that ``leave_token`` left is still there."""
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        tokens: list[bytes] = cast("Any", client.lrange(b"%bruns" % prefix, 0, -1))
    return token.encode() in tokens


def row_pattern(prefix: bytes) -> bytes:
    """What SCAN finds the rows of a view version by."""
    return b"".join(b"\\%c" % byte if byte in b"*?[]^\\" else b"%c" % byte for byte in prefix) + b"{*"


def delete_prefix(url: str, prefix: bytes, *, socket_timeout_seconds: float = 10.0) -> int:
    """Remove all rows of one view version (``codec.key_prefix``); returns how many keys were removed.

    Walks through the whole database without blocking it and touches no other key. Rows written meanwhile may survive.
    Raises ValueError for a prefix that is not one of a view version.
    """
    if not prefix.endswith(b":") or len(prefix) < 2:
        raise ValueError(f"{prefix!r} is not the key prefix of a view version")
    removed = 0
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        cursor = 0
        while True:
            found: tuple[int, list[bytes]] = cast("Any", client.scan(cursor, match=row_pattern(prefix), count=5_000))
            cursor, keys = found
            if keys:
                removed += cast("int", client.unlink(*keys))
            if cursor == 0:
                client.unlink(b"%bruns" % prefix)
                return removed

"""The online store's server: clients, errors, what is checked before a write, marks of runs, and removal of keys."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from spark_fs.errors import InvalidError, SparkFSError, translate
from spark_fs.online import codec
from spark_fs.online.address import CLUSTER, SENTINEL, STANDALONE, Address, parse_address
from spark_fs.online.codec import slot_of

OLDEST_SERVER = (6, 2)
#: How long is waited for a replica to take over, where there are some. By their defaults sentinels give a master 30 seconds and
#: clusters 15 until it counts as lost; some more go by until another one serves.
FAILOVER_SECONDS = 60.0


T = TypeVar("T")

#: Any of the clients that ``open_client`` gives.
Client = redis.Redis | redis.RedisCluster

# Any: redis-py leaves them untyped.
_SENTINEL: Any = redis.Sentinel
_SENTINEL_POOL: Any = redis.SentinelConnectionPool
_NODE: Any = redis.cluster.ClusterNode


def make_pool(url: str, socket_timeout_seconds: float, retry: Retry) -> redis.ConnectionPool:
    """Connections to the server, or to the master that the sentinels name each time; made when first used. Raises SFS-614."""
    address = parse_address(url)
    options = _options(address.options, socket_timeout_seconds, retry)
    if address.mode == STANDALONE:
        return redis.ConnectionPool(**options)
    known = {**_options(address.sentinel_options, socket_timeout_seconds, Retry(NoBackoff(), 0)), **_tls(address)}
    sentinels = (_TlsSentinels if address.tls else _SENTINEL)(address.hosts, sentinel_kwargs=known)
    pool: redis.ConnectionPool = _SENTINEL_POOL(address.service, sentinels, **options, **_tls(address))
    return pool


class _TlsSentinels(_SENTINEL):  # type: ignore[misc]  # redis-py leaves it untyped
    """Sentinels of which it is told why they are not trusted; redis-py keeps no more than the kind of each error."""

    def discover_master(self, service_name: str) -> Any:
        try:
            return super().discover_master(service_name)
        except redis.sentinel.MasterNotFoundError:
            for sentinel in self.sentinels:
                try:
                    sentinel.ping()
                except redis.RedisError as error:
                    if isinstance(translate(error), InvalidError):
                        raise error from None
            raise


def node_pool(address: Address, host: str, port: int, socket_timeout_seconds: float, retry: Retry) -> redis.ConnectionPool:
    """Connections to one node of a cluster; made when first used."""
    kind = redis.SSLConnection if address.tls else redis.Connection
    options = _options(address.options, socket_timeout_seconds, retry)
    return redis.ConnectionPool(connection_class=kind, host=host, port=port, **options)


def open_client(url: str, *, socket_timeout_seconds: float = 5.0) -> Client:
    """A client with connection pools, for any number of threads. Raises SFS-614.

    One of a server or of sentinels connects when first used. One of a cluster connects now, to learn of its nodes: raises
    redis-py's errors where it cannot, SFS-604 for a server that is in no cluster.
    """
    address = parse_address(url)
    if address.mode == CLUSTER:
        return _open_cluster(address, socket_timeout_seconds)
    return redis.Redis(connection_pool=make_pool(url, socket_timeout_seconds, _retry()))


def masters(client: Client) -> list[redis.Redis]:
    """A client for each server that holds some of the keys."""
    if isinstance(client, redis.RedisCluster):
        return [client.get_redis_connection(node) for node in cast("Any", client).get_primaries()]
    return [client]


def _open_cluster(address: Address, socket_timeout_seconds: float) -> redis.RedisCluster:
    options = _options(address.options, socket_timeout_seconds, _retry())
    retry = options.pop("retry")
    # A cluster's client calls it too late to hear what a server says of our certificate, and would log in twice.
    if options.pop("redis_connect_func", None):
        _refuse_untrusted(address, socket_timeout_seconds)
    nodes = [_NODE(host, port) for host, port in address.hosts]
    try:
        # While some slots have no master, the others are served.
        return redis.RedisCluster(startup_nodes=nodes, retry=retry, require_full_coverage=False, **options, **_tls(address))
    except redis.exceptions.RedisClusterException as error:
        cause = error.__cause__
        if "not enabled" in f"{error}{cause}":
            raise no_cluster() from None
        raise cause if isinstance(cause, redis.RedisError) else redis.ConnectionError(str(error)) from None


def _refuse_untrusted(address: Address, socket_timeout_seconds: float) -> None:
    """Raise what is wrong with TLS to the first node that is there."""
    for host, port in address.hosts:
        # Any: redis-py leaves its methods untyped
        connection: Any = node_pool(address, host, port, socket_timeout_seconds, Retry(NoBackoff(), 0)).make_connection()
        try:
            connection.connect()
            return
        except redis.RedisError as error:
            if isinstance(translate(error), InvalidError):
                raise
        finally:
            connection.disconnect()


def no_cluster() -> SparkFSError:
    """What is said where ``redis+cluster://`` is the address of a server that is in no cluster."""
    return InvalidError.of(
        "SFS-604",
        "The online store is no cluster, but online.url says so.",
        fix="write redis:// or rediss:// in the place of redis+cluster:// or rediss+cluster://",
    )


def _no_sentinel() -> SparkFSError:
    return InvalidError.of(
        "SFS-604",
        "The online store is no sentinel, but online.url says so.",
        fix="write redis:// or rediss:// in the place of redis+sentinel:// or rediss+sentinel://, and only /0 behind the host",
    )


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=0.2, base=0.02), 2)


def _tls(address: Address) -> dict[str, Any]:
    return {"ssl": True} if address.tls else {}


def _options(options: dict[str, Any], socket_timeout_seconds: float, retry: Retry) -> dict[str, Any]:
    """What connections take; what the URL says wins."""
    return {
        "protocol": 2,
        "socket_timeout": socket_timeout_seconds,
        "socket_connect_timeout": min(socket_timeout_seconds, 5.0),
        "retry": retry,
        **options,
    }


@contextmanager
def redis_errors() -> Iterator[None]:
    """Redis-py's errors inside become ours where we have something to add, chained to theirs."""
    try:
        yield
    except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


def is_transient(error: Exception) -> bool:
    """Whether waiting may mend an error of redis-py."""
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        return False
    if isinstance(error, redis.sentinel.MasterNotFoundError) and "AuthenticationError" in str(error):
        return False  # told by the sentinels
    if isinstance(translate(error), InvalidError):
        return False  # TLS that waiting does not mend
    return isinstance(error, _PASSING) or str(error).startswith(("BUSY ", "NOREPLICAS "))


_PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.SlotNotCoveredError,
)


def pause_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row: longer each time, up to a second."""
    return float(min(1.0, 0.05 * 2 ** min(failures, 10)))


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
    mode = parse_address(url).mode
    with redis_errors(), open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
        try:
            infos = [server.info() for server in masters(client)]
        except redis.ResponseError as error:
            if mode == SENTINEL and "unknown command" in str(error):
                raise _no_sentinel() from None
            raise
    for info in infos:
        _check_mode(mode, str(info.get("server_mode") or info.get("redis_mode", "standalone")))
    oldest = min(infos, key=_version)
    evicting = [info for info in infos if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction"]
    kind = "valkey" if "valkey_version" in oldest else "redis"
    report = ServerReport(
        kind=kind,
        version=str(oldest[f"{kind}_version"]),
        mode=mode,
        maxmemory_policy=str((evicting or infos)[0].get("maxmemory_policy", "noeviction")),
        used_bytes=sum(int(info["used_memory"]) for info in infos),
        max_bytes=sum(int(info.get("maxmemory", 0)) for info in infos),
    )
    if _version(oldest) < OLDEST_SERVER:
        raise InvalidError.of(
            "SFS-604", f"The online store is Redis {report.version}; 6.2 or newer is needed.", fix="upgrade the server"
        )
    if evicting:
        raise InvalidError.of(
            "SFS-604",
            f"The online store drops features when full: its maxmemory-policy is {report.maxmemory_policy}.",
            why="An evicted feature looks like one that never was, and no error tells of it.",
            fix="set maxmemory-policy noeviction on the server" if len(infos) == 1 else "set noeviction on all servers",
        )
    return report


def _version(info: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])


def _check_mode(wanted: str, found: str) -> None:
    if wanted == STANDALONE and found == CLUSTER:
        raise InvalidError.of(
            "SFS-604",
            "The online store is one node of a cluster.",
            why="It refuses the keys of all others.",
            fix="write redis+cluster://host:6379 in the place of redis://host:6379/0, or rediss+cluster for rediss",
        )
    if wanted == STANDALONE and found == SENTINEL:
        raise InvalidError.of(
            "SFS-604",
            "The online store is a sentinel, which holds no data.",
            fix="write redis+sentinel://host:26379/service/0, where service is the name that it has for the master",
        )


def erase_keys(url: str, names: Sequence[bytes], *, socket_timeout_seconds: float = 10.0) -> None:
    """Put a tombstone that no writer can replace in the place of each of these Redis keys; safe to repeat."""

    def erase(client: Client) -> None:
        for name in names:
            client.set(name, codec.tombstone(codec.ERASED), px=codec.GRAVE)

    _patiently(url, erase, socket_timeout_seconds)


def reopen_keys(url: str, names: Sequence[bytes], *, socket_timeout_seconds: float = 10.0) -> None:
    """Take away the tombstones that ``erase_keys`` has set, so that the keys can be written again."""

    def reopen(client: Client) -> None:
        for name in names:
            # Nothing else can have come in their place, so that looking first is no race.
            if client.get(name) == codec.tombstone(codec.ERASED):
                client.delete(name)

    _patiently(url, reopen, socket_timeout_seconds)


#: So many tokens of published claims a server keeps for each view; the last few are asked for.
_TOKENS = 100
#: The tags of the lists that hold the marks in a cluster: one for each 64th of its slots, so that every master has some.
_MARK_TAGS = tuple({slot_of(b"%d" % tag) // 256: tag for tag in range(2_000)}.values())


def _mark_names(client: Client, prefix: bytes) -> list[bytes]:
    if isinstance(client, redis.RedisCluster):
        return [b"%bruns:{%d}" % (prefix, tag) for tag in _MARK_TAGS]
    return [b"%bruns" % prefix]


def leave_token(url: str, prefix: bytes, token: str, *, socket_timeout_seconds: float = 10.0) -> None:
    """Leave a mark in the online store, after all rows of a run and before it is noted as published.

    As long as the mark is there, so are the rows: a server that lost some of its last writes lost the mark as well. In a
    cluster each master has marks of its own.
    """

    def leave(client: Client) -> None:
        pipeline: Any = client.pipeline(transaction=False)
        for name in _mark_names(client, prefix):
            pipeline.lpush(name, token)
            pipeline.ltrim(name, 0, _TOKENS - 1)
        pipeline.execute()

    _patiently(url, leave, socket_timeout_seconds)


def has_token(url: str, prefix: bytes, token: str, *, socket_timeout_seconds: float = 10.0) -> bool:
    """Whether the mark that ``leave_token`` left is still there, in a cluster on all masters."""

    def look(client: Client) -> bool:
        pipeline: Any = client.pipeline(transaction=False)
        for name in _mark_names(client, prefix):
            pipeline.lrange(name, 0, -1)
        return all(token.encode() in tokens for tokens in pipeline.execute())

    return _patiently(url, look, socket_timeout_seconds)


def serving(url: str, *, socket_timeout_seconds: float = 10.0) -> frozenset[str]:
    """The run ids of the servers that hold the keys: others after each restart and failover, in which writes may be lost."""

    def look(client: Client) -> frozenset[str]:
        return frozenset(str(server.info("server")["run_id"]) for server in masters(client))

    return _patiently(url, look, socket_timeout_seconds)


def served_epoch(url: str, prefix: bytes, *, socket_timeout_seconds: float = 10.0) -> int:
    """Which epoch of a view version (``codec.key_prefix``) readers see."""

    def look(client: Client) -> int:
        return int(cast("Any", client.get(codec.epoch_name(prefix))) or 0)

    return _patiently(url, look, socket_timeout_seconds)


def serve_epoch(url: str, prefix: bytes, epoch: int, *, socket_timeout_seconds: float = 10.0) -> None:
    """Let readers see this epoch of a view version, all at once: no read gives rows of two."""
    _patiently(url, lambda client: client.set(codec.epoch_name(prefix), epoch), socket_timeout_seconds)


def notes(url: str, name: bytes, *, socket_timeout_seconds: float = 10.0) -> list[bytes]:
    """The items of a list, newest first; none where there is no list."""

    def look(client: Client) -> list[bytes]:
        return cast("list[bytes]", client.lrange(name, 0, -1))

    return _patiently(url, look, socket_timeout_seconds)


def remove_key(url: str, name: bytes, *, socket_timeout_seconds: float = 10.0) -> None:
    """Remove one key of Redis, whatever it holds."""
    _patiently(url, lambda client: client.unlink(name), socket_timeout_seconds)


def _patiently(url: str, act: Callable[[Client], T], socket_timeout_seconds: float) -> T:
    """Do what may be done twice; where replicas can take over, again and again until they have."""
    until = time.monotonic() + (0.0 if parse_address(url).mode == STANDALONE else FAILOVER_SECONDS)
    for failures in itertools.count():
        try:
            with open_client(url, socket_timeout_seconds=socket_timeout_seconds) as client:
                return act(client)
        except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
            if not is_transient(error) or time.monotonic() >= until:
                with redis_errors():
                    raise
        time.sleep(pause_seconds(failures))
    raise AssertionError  # the loop has no end


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
        is_cluster = isinstance(client, redis.RedisCluster)
        for server in masters(client):
            for keys in scanned(server, prefix):
                # The keys of one command must lie in one slot of a cluster.
                removals: Any = server.pipeline(transaction=False)
                for some in [[key] for key in keys] if is_cluster else [keys]:
                    removals.unlink(*some)
                removed += sum(removals.execute())
        for name in _mark_names(client, prefix):
            client.unlink(name)
    return removed


def scanned(server: redis.Redis, prefix: bytes) -> Iterator[list[bytes]]:
    """The Redis keys of all rows of a view version that one server holds, in parts, some perhaps twice."""
    cursor = 0
    while True:
        found: Any = server.scan(cursor, match=row_pattern(prefix), count=5_000)
        cursor, keys = found
        if keys:
            yield keys
        if cursor == 0:
            return

"""``online.url`` → what to connect to: one server, a master that sentinels name, or the masters of a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.connection import parse_url

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online.trust import secure

STANDALONE, SENTINEL, CLUSTER = "standalone", "sentinel", "cluster"

_DEFAULT_PORTS = {SENTINEL: 26379, CLUSTER: 6379}
_parse_url: Any = parse_url  # Any: redis-py leaves it untyped
#: A name, an IPv4 address, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@/\s]+))(?::(\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the online store is. ``options`` and ``sentinel_options`` are redis-py's; they may hold secrets.

    ``hosts``: the sentinels, or some nodes of the cluster; none for a single server, which ``options`` name. ``service`` is
    the name that the sentinels have for the master. ``tls``: with sentinels these are spoken to by TLS as well.
    """

    mode: str
    hosts: tuple[tuple[str, int], ...]
    service: str
    tls: bool
    options: dict[str, Any] = field(repr=False)
    sentinel_options: dict[str, Any] = field(repr=False)


def parse_address(url: str) -> Address:
    """The address that a URL stands for; raises SFS-614 for what is none.

    ``redis://``, ``rediss://`` and ``unix://`` as redis-py has them. ``redis+sentinel://user:password@host:26379,host2/service/0``:
    the sentinels, their name for the master, the database; ``sentinel_username`` and ``sentinel_password`` in the query are the
    login of the sentinels themselves. ``redis+cluster://user:password@host:6379,host2``: some nodes of a cluster.
    ``rediss+…`` is the same with TLS. Other query options are redis-py's, such as ``ssl_ca_certs``.
    """
    try:
        address = _parsed(url)
        hosts = [host for host, _ in address.hosts] or [address.options.get("host", "localhost")]
        for options in (address.options, address.sentinel_options):
            secure(options, hosts, tls=address.tls)
        _refuse_unknown(address)
        return address
    except (ValueError, TypeError, redis.RedisError):
        # The text of the error may hold a piece of the password, so it is neither shown nor chained.
        raise no_address() from None


def no_address() -> SparkFSError:
    """What is said of a URL that is no address, without a piece of it."""
    return InvalidError.of(
        "SFS-614",
        "online.url is no address of a Redis server.",
        fix="write redis://host:6379/0, rediss://user:password@host:6379/0, unix:///path/to/socket, "
        "redis+sentinel://host:26379,host2:26379/service/0, redis+cluster://host:6379,host2:6379 or embedded",
    )


def _parsed(url: str) -> Address:
    parts = urlsplit(url)
    scheme, plus, mode = parts.scheme.partition("+")
    if not plus:
        return Address(STANDALONE, (), "", scheme == "rediss", _parse_url(url), {})
    if scheme not in ("redis", "rediss") or mode not in _DEFAULT_PORTS or parts.fragment:
        raise ValueError("unknown scheme")
    login, at, hosts = parts.netloc.rpartition("@")
    options = _parse_url(f"{scheme}://{login}{at}localhost/?{parts.query}")
    for name in ("host", "port", "path", "connection_class"):
        options.pop(name, None)
    own = {"username": options.pop("sentinel_username", None), "password": options.pop("sentinel_password", None)}
    certificates = {name: value for name, value in options.items() if mode == SENTINEL and name.startswith("ssl_")}
    path = [unquote(part) for part in parts.path.split("/") if part]
    service = path.pop(0) if mode == SENTINEL and path else ""
    database = int(path.pop(0)) if path else int(options.get("db", 0))
    if path or (mode == SENTINEL and not service) or (mode == CLUSTER and (database or any(own.values()))):
        raise ValueError("unknown path")
    if mode == SENTINEL:
        options["db"] = database
    else:
        options.pop("db", None)  # a cluster has database 0 only
    found = tuple(_host(text, _DEFAULT_PORTS[mode]) for text in hosts.split(","))
    return Address(
        mode, found, service, scheme == "rediss", options, {name: value for name, value in own.items() if value} | certificates
    )


def _refuse_unknown(address: Address) -> None:
    """Make a connection, which connects to nothing but refuses options that it does not know."""
    kind: Any = address.options.get("connection_class") or (redis.SSLConnection if address.tls else redis.Connection)
    of_pools = ("connection_class", "max_connections")
    kind(**{name: value for name, value in address.options.items() if name not in of_pools})


def _host(text: str, port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None or not 0 < int(found[3] or port) < 1 << 16:
        raise ValueError("no host and port")
    return found[1] or unquote(found[2]), int(found[3] or port)

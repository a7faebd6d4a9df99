"""What ``online.url`` may be, and that no password of it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from spark_fs.errors import InvalidError, without_secrets
from spark_fs.online.address import parse_address
from spark_fs.online.connect import open_client
from spark_fs.online.read import OnlineReader

SECRET = "s3cr%40et"


@pytest.mark.parametrize(
    ("url", "mode", "hosts", "service", "options"),
    [
        ("redis://h:1/2", "standalone", (), "", {"host": "h", "port": 1, "db": 2}),
        ("redis+sentinel://h/main", "sentinel", (("h", 26379),), "main", {"db": 0}),
        ("redis+sentinel://h:1,[::1]:2,k/my%2Fmain/3", "sentinel", (("h", 1), ("::1", 2), ("k", 26379)), "my/main", {"db": 3}),
        (
            "redis+sentinel://h/main?db=4&client_name=%2Fca",
            "sentinel",
            (("h", 26379),),
            "main",
            {"db": 4, "client_name": "/ca"},
        ),
        ("redis+cluster://u:s3cr%40et@h,k:7", "cluster", (("h", 6379), ("k", 7)), "", {"username": "u", "password": "s3cr@et"}),
        ("rediss+cluster://h/0?socket_timeout=2.5", "cluster", (("h", 6379),), "", {"socket_timeout": 2.5}),
    ],
)
def test_addresses_name_hosts_service_and_options(
    url: str, mode: str, hosts: tuple[Any, ...], service: str, options: dict[str, Any]
) -> None:
    """One server, sentinels or a cluster; default ports; percent signs stand for characters; options as redis-py has them."""
    address = parse_address(url)
    assert (address.mode, address.hosts, address.service) == (mode, hosts, service)
    # By TLS a connection listens to the server's verdict first (``trust.secure``).
    assert address.options.keys() - options.keys() == ({"redis_connect_func"} if address.tls else set())
    assert {name: address.options[name] for name in options} == options
    assert address.tls == url.startswith("rediss")


@pytest.mark.parametrize(
    "rest",
    [
        "sentinel://h:26379", "sentinel://h/main/x", "sentinel://h/main/0/1", "sentinel:///main", "sentinel://h,/main",
        "cluster://h/1", "cluster://h?db=2", "cluster://h:0", "cluster://h:99999", "cluster://h:1:2", "cluster://",
        "cluster://h?sentinel_password=x", "cluster://h/s3cr@et@k", "cluster://h?socket_timeout=s3cr", "replica://h", "cluster://h#s3cr",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_showing_it(rest: str) -> None:
    """Before anything is connected; what is wrong may be a piece of the password."""
    for act in (parse_address, open_client, OnlineReader):
        with pytest.raises(InvalidError, match="SFS-614") as caught:
            act(f"redis+{rest}")
        assert "s3cr" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_passwords_are_not_shown() -> None:
    """Neither that of servers nor that of sentinels, before the hosts or among the options."""
    for url in (
        f"redis+sentinel://u:{SECRET}@h/main?sentinel_password={SECRET}&client_name=x",
        f"redis://h?password={SECRET}",
    ):
        assert "s3cr" not in repr(parse_address(url))
        assert "s3cr" not in without_secrets(url)
    shown = without_secrets(f"at redis+sentinel://u:{SECRET}@h,k/main?sentinel_password={SECRET}&ssl_ca_certs=/ca now")
    assert shown == "at redis+sentinel://***@h,k/main?sentinel_password=***&ssl_ca_certs=/ca now"

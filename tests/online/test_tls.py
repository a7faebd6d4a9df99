"""TLS to real servers: what is checked, and that what cannot come about is told at once and writes nothing."""

from __future__ import annotations

import datetime as dt
import ipaddress
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spark_fs import doctor
from spark_fs.errors import SparkFSError, UnavailableError, without_secrets
from spark_fs.online import connect, redis_store
from spark_fs.online.connect import check_server, leave_token
from spark_fs.online.executor import publish_rows
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import write_batches
from spark_fs.online.trust import is_loopback
from spark_fs.spec import select
from tests.online.servers import UTC, batch, free_port, redis_binary, redis_process, target_of, view_of

DAY = dt.timedelta(days=1)
#: Longer than any refusal may take, and shorter than the tries of a write that waits for a server.
AT_ONCE_SECONDS = 4.0


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, as files, and what signs others by them."""

    certificate: Path
    key: Path
    name: x509.Name
    private: Any


def signed(
    folder: Path, name: str, by: Signed | None = None, *, names: tuple[str, ...] = (), days: int = 2, password: bytes = b""
) -> Signed:
    """A certificate for these names and addresses that ends in so many days; by itself it is an authority."""
    private, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.name if by else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 10 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if names:
        listed = [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
        made = made.add_extension(x509.SubjectAlternativeName(listed), critical=False)
    certificate = made.sign(by.private if by else private, hashes.SHA256())
    files = (folder / f"{name}.pem", folder / f"{name}.key")
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    sealed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    files[1].write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed))
    return Signed(*files, subject, private)


@dataclass(frozen=True)
class World:
    """Certificates of all kinds."""

    authority: Signed
    stranger: Signed
    right: Signed
    other_name: Signed
    expired: Signed
    client: Signed
    client_of_stranger: Signed
    sealed: Signed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = signed(folder, "authority"), signed(folder, "stranger")
    here = ("localhost", "127.0.0.1")
    return World(
        authority,
        stranger,
        signed(folder, "right", authority, names=here),
        signed(folder, "other_name", authority, names=("redis.example.com", "192.0.2.1")),
        signed(folder, "expired", authority, names=here, days=-1),
        signed(folder, "client", authority),
        signed(folder, "client_of_stranger", stranger),
        signed(folder, "sealed", authority, password=b"s3cret"),
    )


@contextmanager
def tls_server(
    folder: Path, authority: Signed, own: Signed, clients: str = "no", *more: str
) -> Iterator[tuple[str, redis.Redis]]:
    """A server with a port for TLS: its address by that, and a client that looks into it by the plain one."""
    port = next(port for port in iter(free_port, None) if port < 55_000)  # a cluster takes that 10,000 above as well
    options = ["--tls-port", str(port), "--tls-cert-file", str(own.certificate), "--tls-key-file", str(own.key)]
    options += ["--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", clients, *more]
    folder.mkdir(exist_ok=True)
    with redis_process(folder, *options) as plain, redis.Redis.from_url(plain) as admin:
        yield f"rediss://127.0.0.1:{port}/0", admin


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, redis.Redis]]]:
    """Servers by what is special about them."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        tls_server(folder / "right", world.authority, world.right) as right,
        tls_server(folder / "other_name", world.authority, world.other_name) as other_name,
        tls_server(folder / "expired", world.authority, world.expired) as expired,
        tls_server(folder / "both", world.authority, world.right, clients="yes") as both,
    ):
        yield {"right": right, "other name": other_name, "expired": expired, "both": both}


def files(**options: Path) -> str:
    return "?" + "&".join(f"{name}={path}" for name, path in options.items())


def refused(url: str, admin: redis.Redis, code: str, told: str) -> None:
    """Every way to the server ends with the code and says why, soon; nothing was written."""
    target, view = target_of(url), view_of()
    ways: list[Any] = [
        lambda: list(publish_rows(iter([batch([b"a"], n=[1])]), target)),
        lambda: check_server(url),
        lambda: leave_token(url, target.prefix, "token"),
        lambda: OnlineReader(url).read([select(view)], [{"origin": "JFK"}]),
    ]
    for way in ways:
        began = time.monotonic()
        with pytest.raises(SparkFSError, match=f"(?s){code}.*{told}"):
            way()
        assert time.monotonic() - began < AT_ONCE_SECONDS
    assert admin.dbsize() == 0


def test_a_trusted_server_is_written_and_read(world: World, served: dict[str, Any]) -> None:
    """With the authority named, by address and by name, and with a client certificate where the server asks for one."""
    own = {"ssl_certfile": world.client.certificate, "ssl_keyfile": world.client.key}
    urls = [
        served["right"][0] + files(ssl_ca_certs=world.authority.certificate),
        served["right"][0].replace("127.0.0.1", "localhost") + files(ssl_ca_certs=world.authority.certificate),
        served["both"][0] + files(ssl_ca_certs=world.authority.certificate, **own),
    ]
    view = view_of()
    for number, url in enumerate(urls):
        assert write_batches(iter([batch([b"%d" % number], n=[number])]), target_of(url)).applied == 1
        with OnlineReader(url) as reader:
            assert reader.read([select(view)], [{"origin": f"{number}"}]).to_dict()["n"] == [number]
    for _, admin in served.values():
        admin.flushall()


def test_a_server_that_nobody_vouches_for_is_not_trusted(world: World, served: dict[str, Any]) -> None:
    """Checks are on by default: without the authority, or with another one, nothing is sent."""
    url, admin = served["right"]
    for wrong in (
        url,
        url + files(ssl_ca_certs=world.stranger.certificate),
        url + files(ssl_ca_certs=world.client.certificate),
    ):
        refused(wrong, admin, "SFS-631", "certificate verify failed.*ssl_ca_certs")


def test_a_certificate_for_another_name_is_not_trusted(world: World, served: dict[str, Any]) -> None:
    """Not by the address, and not by the name."""
    url, admin = served["other name"]
    for address in (url, url.replace("127.0.0.1", "localhost")):
        refused(address + files(ssl_ca_certs=world.authority.certificate), admin, "SFS-631", "mismatch.*by a name")


def test_an_expired_certificate_is_not_trusted(world: World, served: dict[str, Any]) -> None:
    """Also where the authority and the name are right."""
    url, admin = served["expired"]
    refused(url + files(ssl_ca_certs=world.authority.certificate), admin, "SFS-631", "has expired.*renew")


def test_a_server_that_wants_a_client_certificate_says_so(world: World, served: dict[str, Any]) -> None:
    """None, and one of an authority that the server does not know."""
    url, admin = served["both"]
    trusting = url + files(ssl_ca_certs=world.authority.certificate)
    refused(trusting, admin, "SFS-631", "certificate required.*ssl_certfile")
    stranger = {"ssl_certfile": world.client_of_stranger.certificate, "ssl_keyfile": world.client_of_stranger.key}
    refused(f"{trusting}&{files(**stranger)[1:]}", admin, "SFS-631", "unknown ca.*client certificate")


def test_plain_text_to_a_port_for_tls_is_told(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server hangs up without a word, as one does that is just starting: only a write tries for its time, then says so."""
    monkeypatch.setattr(redis_store, "MAX_FAILURES", 3)
    url, admin = served["right"]
    plain, view = url.replace("rediss://", "redis://"), view_of()
    ways: list[Any] = [
        lambda: check_server(plain),
        lambda: OnlineReader(plain).read([select(view)], [{"origin": "JFK"}]),
        lambda: list(publish_rows(iter([batch([b"a"], n=[1])]), target_of(plain))),
    ]
    for way in ways:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"SFS-601.*rediss:// for a port with TLS"):
            way()
        assert time.monotonic() - began < AT_ONCE_SECONDS
    assert admin.dbsize() == 0


def test_tls_to_a_plain_port_ends_by_the_timeout(world: World, served: dict[str, Any]) -> None:
    """A server without TLS waits for more of what it takes for a command; each try ends by the timeout that is set."""
    _, admin = served["right"]
    url = f"rediss://127.0.0.1:{admin.connection_pool.connection_kwargs['port']}/0"
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"SFS-601.*redis:// for one without"):
        check_server(url + files(ssl_ca_certs=world.authority.certificate), socket_timeout_seconds=0.1)
    assert time.monotonic() - began < 3
    assert admin.dbsize() == 0


def test_files_that_cannot_be_used_are_told_before_anything_is_tried(world: World, tmp_path: Path) -> None:
    """Not there, no certificate, a key of another one, a sealed key without its password: at once, and by name."""
    away, text = tmp_path / "away.pem", tmp_path / "text.pem"
    text.write_text("hello")
    pair, own = world.client.certificate, world.authority.certificate
    for number, options in enumerate(
        [
            {"ssl_ca_certs": away},
            {"ssl_ca_certs": text},
            {"ssl_ca_certs": own, "ssl_certfile": pair, "ssl_keyfile": world.right.key},
            {"ssl_certfile": pair, "ssl_keyfile": away},
            {"ssl_keyfile": world.client.key},
            {"ssl_certfile": world.sealed.certificate, "ssl_keyfile": world.sealed.key},
        ]
    ):
        began = time.monotonic()
        with pytest.raises(SparkFSError, match=r"SFS-631.*online\.url names.*\.(pem|key)") as caught:
            write_batches(iter([batch([b"a"], n=[number])]), target_of("rediss://192.0.2.1:1/0" + files(**options)))
        assert time.monotonic() - began < 0.5
        assert caught.value.__cause__ is None


def test_a_sealed_key_opens_by_its_password_which_is_not_shown(world: World, served: dict[str, Any]) -> None:
    """``ssl_password`` is taken, and left out of what is shown of the address."""
    url, admin = served["both"]
    own = files(ssl_ca_certs=world.authority.certificate, ssl_certfile=world.sealed.certificate, ssl_keyfile=world.sealed.key)
    assert write_batches(iter([batch([b"a"], n=[1])]), target_of(f"{url}{own}&ssl_password=s3cret")).applied == 1
    admin.flushall()
    shown = without_secrets(f"{url}?ssl_password=s3cret&ssl_keyfile=/k&password_file=/p&password=s3cret")
    assert shown == f"{url}?ssl_password=***&ssl_keyfile=/k&password_file=/p&password=***"


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_check_hostname=false"])
def test_checks_cannot_be_turned_off_for_another_machine(world: World, served: dict[str, Any], option: str) -> None:
    """Who answers there would get the password; on this machine it may be done."""
    url, admin = served["right"]
    for host in ("redis.example.com", "192.0.2.1"):
        with pytest.raises(SparkFSError, match=f"SFS-632.*{host}.*ssl_ca_certs"):
            check_server(f"rediss://u:s3cret@{host}:1/0?{option}")
    here = url + ("?ssl_cert_reqs=none" if "reqs" in option else files(ssl_ca_certs=world.authority.certificate) + f"&{option}")
    assert check_server(here).used_bytes > 0
    assert admin.dbsize() == 0


def test_a_name_need_not_fit_where_the_authority_is_ones_own(world: World, served: dict[str, Any]) -> None:
    """``ssl_check_hostname=false`` with an authority of one's own is taken: the certificate is still checked."""
    url, admin = served["other name"]
    assert check_server(url + files(ssl_ca_certs=world.authority.certificate) + "&ssl_check_hostname=false").used_bytes > 0
    refused(
        url + files(ssl_ca_certs=world.stranger.certificate) + "&ssl_check_hostname=false", admin, "SFS-631", "verify failed"
    )


@pytest.fixture(scope="module")
def clustered(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, redis.Redis]]:
    """A cluster of one node that wants client certificates."""
    folder = tmp_path_factory.mktemp("cluster")
    with tls_server(folder, world.authority, world.right, "yes", "--cluster-enabled", "yes", "--tls-cluster", "yes") as (
        url,
        admin,
    ):
        admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 20
        while admin.execute_command("CLUSTER INFO")["cluster_state"] != "ok" and time.monotonic() < deadline:
            time.sleep(0.02)
        yield url.replace("rediss://", "rediss+cluster://").removesuffix("/0"), admin


@pytest.fixture(scope="module")
def watched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, redis.Redis]]:
    """A server and a sentinel that names it, both by TLS and with client certificates."""
    folder, port = tmp_path_factory.mktemp("sentinel"), free_port()
    keys = {"cert-file": world.right.certificate, "key-file": world.right.key, "ca-cert-file": world.authority.certificate}
    with tls_server(folder / "server", world.authority, world.right, "yes") as (url, admin):
        master = url.rpartition(":")[2].removesuffix("/0")
        lines = [
            "port 0",
            f"tls-port {port}",
            "tls-replication yes",
            f"dir {folder}",
            f"sentinel monitor one 127.0.0.1 {master} 1",
        ]
        (folder / "sentinel.conf").write_text("\n".join([*lines, *(f"tls-{name} {path}" for name, path in keys.items())]))
        process = subprocess.Popen([redis_binary(), str(folder / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            yield f"rediss+sentinel://127.0.0.1:{port}/one/0", admin
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", ["clustered", "watched"])
def test_nodes_of_a_cluster_and_sentinels_are_judged_as_well(
    world: World, request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections go by TLS with the same files, those to sentinels too, and are refused for the same reasons."""
    monkeypatch.setattr(connect, "FAILOVER_SECONDS", 5.0)
    url, admin = request.getfixturevalue(kind)
    own, view = {"ssl_certfile": world.client.certificate, "ssl_keyfile": world.client.key}, view_of()
    right = url + files(ssl_ca_certs=world.authority.certificate, **own)
    deadline = time.monotonic() + 20
    while True:  # a sentinel that has just started knows no master yet
        try:
            assert check_server(right).used_bytes > 0
            break
        except UnavailableError:
            assert time.monotonic() < deadline
    assert write_batches(iter([batch([b"a"], n=[1])]), target_of(right)).applied == 1
    with OnlineReader(right) as reader:
        assert reader.read([select(view)], [{"origin": "a"}]).to_dict()["n"] == [1]
    admin.flushall()
    refused(url + files(ssl_ca_certs=world.stranger.certificate, **own), admin, "SFS-631", "certificate verify failed")
    refused(url + files(ssl_ca_certs=world.authority.certificate), admin, "SFS-631", "certificate required")
    with pytest.raises(SparkFSError, match="SFS-632"):
        check_server(url.replace("127.0.0.1", "redis.example.com") + "?ssl_cert_reqs=none")


def test_a_server_that_goes_away_in_the_middle_of_tls_is_waited_for(world: World, tmp_path: Path) -> None:
    """That is no matter of trust: a restart under a writer costs time and no row."""
    port, options = free_port(), ["--tls-cert-file", str(world.right.certificate), "--tls-key-file", str(world.right.key)]
    argv = [
        "--tls-port",
        str(port),
        *options,
        "--tls-ca-cert-file",
        str(world.authority.certificate),
        "--tls-auth-clients",
        "no",
    ]
    target = target_of(f"rediss://127.0.0.1:{port}/0" + files(ssl_ca_certs=world.authority.certificate))

    def batches() -> Iterator[Any]:
        with redis_process(tmp_path, *argv):
            yield batch([b"a"], n=[1])
            yield batch([b"b"], n=[2])
        stack.append(redis_process(tmp_path, *argv))
        stack[0].__enter__()
        yield batch([b"c"], n=[3])

    stack: list[Any] = []
    try:
        assert write_batches(batches(), target).rows == 3
    finally:
        for server in stack:
            server.__exit__(None, None, None)


def test_doctor_tells_of_passwords_in_the_clear() -> None:
    """A network that may not be one's own is no fault, but told; TLS and this machine are fine."""
    found = {url: doctor.online_link(url) for url in (
        "redis://u:s3cret@redis.example.com:6379/0", "redis://redis.example.com:6379/0",
        "redis://u@redis.example.com/0?password_file=/x", "rediss://u:s3cret@redis.example.com:6379/0",
        "redis://u:s3cret@127.0.0.1:6379/0", "redis://[::1]:6379/0", "unix:///run/redis.sock", "nonsense", None,
    )}  # fmt: skip
    checks = list(found.values())
    assert [check.ok for check in checks] == [None, None, None, True, True, True, True, None, None]
    assert ["the password and all" in check.found for check in checks[:3]] == [True, False, True]
    assert "s3cret" not in str(checks)


@pytest.mark.parametrize(("host", "here"), [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True),
                                            ("127.0.0.1.example.com", False), ("192.0.2.1", False), ("", False)])  # fmt: skip
def test_which_hosts_are_this_machine(host: str, here: bool) -> None:
    """By the name or address as written; no name is looked up."""
    assert is_loopback(host) is here

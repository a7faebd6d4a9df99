"""Who we are to the online store, and whom we take for it: passwords from files, certificates."""

from __future__ import annotations

import ipaddress
import select
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from spark_fs.errors import InvalidError


def secure(options: dict[str, Any], hosts: Sequence[str], *, tls: bool) -> None:
    """Turn the options of a URL to these hosts, in place, into what a connection takes; refuse those that trust anybody.

    ``password_file`` becomes a login that reads the password from there at each new connection. Raises SFS-614 for a
    password beside it, SFS-631 for TLS files that cannot be used, SFS-632 for a certificate of another machine that is not
    checked.
    """
    path = options.pop("password_file", None)
    if path is not None:
        if options.pop("password", None):
            raise InvalidError.of("SFS-614", "The online store's address has a password and a password file.", fix="drop one")
        options["credential_provider"] = _PasswordFile(options.pop("username", None), path)
    if tls:
        _refuse_anybody(options, hosts)
        _check_files(options)
        options["redis_connect_func"] = _hear_verdict


class _PasswordFile(redis.CredentialProvider):
    """A login whose password lies in a file; one that was replaced there counts from the next connection on."""

    def __init__(self, user: str | None, path: str) -> None:
        self._user, self._path = user, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """The user, if there is one, and the password: the file's text without the end of its line."""
        try:
            password = Path(self._path).read_text(encoding="utf-8").rstrip("\r\n")
            trouble = "" if password else "it is empty"
        except (OSError, UnicodeDecodeError) as error:
            trouble = getattr(error, "strerror", None) or "it is no text in UTF-8"
        if trouble:
            # As redis-py's own kind: it cleans up after those. Nothing is chained, for it might hold what the file holds.
            raise redis.AuthenticationError(f"The password file {self._path} cannot be used: {trouble}") from None
        return (self._user, password) if self._user else (password,)


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or address as written, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_AUTHORITIES = ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")
_TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")


def _refuse_anybody(options: dict[str, Any], hosts: Sequence[str]) -> None:
    unchecked = options.get("ssl_cert_reqs") == "none"
    # With any name, any certificate of the many authorities that a machine knows would do.
    unchecked |= options.get("ssl_check_hostname") is False and not any(map(options.get, _AUTHORITIES))
    for host in hosts:
        if unchecked and not is_loopback(host):
            raise InvalidError.of(
                "SFS-632",
                f"By online.url anybody could answer in the place of {host}: it turns off the check of the certificate.",
                why="The password and all features would be theirs.",
                fix="name the authority that signed it, or itself if it is self-signed: ssl_ca_certs=/path/to/ca.pem",
            )


def _check_files(options: dict[str, Any]) -> None:
    """Read them once: else each connection would fail, and be tried again, as if the server were away."""
    authority, folder, certificate, key = map(options.get, _TLS_FILES)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authority or folder:
            context.load_verify_locations(authority, folder)
        if certificate or key:
            # A password that is wrong ends here; without one OpenSSL would ask at the terminal.
            context.load_cert_chain(certificate or "", key, options.get("ssl_password") or "")
    except OSError as error:  # SSLError is one
        files = ", ".join(f"{name}={options[name]}" for name in _TLS_FILES if options.get(name))
        raise InvalidError.of(
            "SFS-631",
            "The files for TLS that online.url names cannot be used.",
            why=f"{error.strerror or type(error).__name__}: {files}.",
            fix="check that they are there on every machine that connects, readable, in PEM format, and belong together",
        ) from None


#: A server that has nothing to say (most send tickets) costs each new connection so long.
_VERDICT_SECONDS = 0.2


def _hear_verdict(connection: Any) -> None:
    """Log in over a new connection, but first hear what the server says of our certificate.

    By TLS 1.3 it judges after our side is through, and hangs up. Whoever writes meanwhile learns no more than that.
    """
    link = connection._sock  # redis-py has no public name for it
    if link.version() == "TLSv1.3" and select.select([link], [], [], _VERDICT_SECONDS)[0]:
        waits_seconds = link.gettimeout()
        link.setblocking(False)
        try:
            # Tickets and alerts of TLS are taken in on the way; Redis itself speaks first only to refuse us.
            said = link.recv(512).decode(errors="replace").strip()
        except ssl.SSLWantReadError:
            said = ""
        except OSError as error:
            said = str(error)
        link.settimeout(waits_seconds)
        if said:
            raise redis.ConnectionError(f"The server refused the connection: {said}")
    connection.on_connect()

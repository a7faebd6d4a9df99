"""The processes below one that runs Spark: their memory, and how to begin with new Python workers."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]  # it publishes no types

#: Looking for new processes costs more than reading the memory of known ones.
_SAMPLES_PER_SEARCH = 5


class MemoryWatch:
    """Peaks of resident memory below one process: itself, the JVM, and the JVM's Python processes.

    ``worker_max_bytes`` is the peak of the largest worker, ``workers_sum_bytes`` that of all at one moment. Pages that forked
    workers share count in each.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._samples = 0
        self._jvms: list[psutil.Process] = []
        self._workers: list[psutil.Process] = []
        self.peaks = dict.fromkeys(("process_bytes", "jvm_bytes", "workers_sum_bytes", "worker_max_bytes"), 0)

    def sample(self) -> None:
        """Look once."""
        if self._samples % _SAMPLES_PER_SEARCH == 0:
            self._search()
        self._samples += 1
        workers = [_resident(each) for each in self._workers]
        now = {
            "process_bytes": _resident(self._root),
            "jvm_bytes": sum(_resident(each) for each in self._jvms),
            "workers_sum_bytes": sum(workers),
            "worker_max_bytes": max(workers, default=0),
        }
        self.peaks = {name: max(peak, now[name]) for name, peak in self.peaks.items()}

    def _search(self) -> None:
        try:
            below = [(each, each.name()) for each in self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self._jvms = [each for each, name in below if name == "java"]
        jvms = {each.pid for each in self._jvms}
        # The JVM's own child is the daemon from which workers are forked; it does no work.
        self._workers = [each for each, name in below if "python" in name and _parent(each) not in jvms]


def renew_workers() -> None:
    """End the idle Python workers of this process's Spark, so that the next run's memory is its own. The JVM starts others."""
    pythons = [each for each in psutil.Process().children(recursive=True) if "python" in each.name()]
    daemons = {each.pid for each in pythons}
    workers = [each for each in pythons if each.ppid() in daemons]  # forked from a daemon that the JVM has started
    for worker in workers:
        worker.terminate()
    psutil.wait_procs(workers, timeout=10)


def _parent(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return None


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0

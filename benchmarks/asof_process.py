"""An engine's process as its parent sees it: asked one thing at a time, its memory and processor time read meanwhile."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it publishes no types

SAMPLE_SECONDS = 0.05
#: Looking for new processes costs more than reading the memory of known ones.
_SAMPLES_PER_SEARCH = 5


class EngineProcess:
    """``python -m benchmarks.asof_engines …``; started when made, ended by ``close``."""

    def __init__(self, arguments: list[str]) -> None:
        argv = [sys.executable, "-m", "benchmarks.asof_engines", *arguments]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The engine's answer with the peaks of memory and the ``cpu_seconds`` it took; ``error`` where it failed or ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch, worked = _MemoryWatch(self._process.pid), _cpu_seconds(self._process.pid)
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the engine's process has ended"}
        while not select.select([self._process.stdout], [], [], SAMPLE_SECONDS)[0]:
            watch.sample()
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the engine's process has ended with code {self._process.wait()}"}
        return {**json.loads(line), **watch.peaks, "cpu_seconds": _cpu_seconds(self._process.pid) - worked}

    def close(self) -> None:
        """End of requests: the engine stops by itself."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        finally:
            self._process.wait()


class _MemoryWatch:
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


def _cpu_seconds(pid: int) -> float:
    """What the process and all living ones below it have worked so far; those that have ended count with their parents."""
    root = psutil.Process(pid)
    total = 0.0
    for each in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])
    return total


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

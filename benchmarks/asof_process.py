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

from benchmarks.processes import MemoryWatch

SAMPLE_SECONDS = 0.05


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
        watch, worked = MemoryWatch(self._process.pid), _cpu_seconds(self._process.pid)
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


def _cpu_seconds(pid: int) -> float:
    """What the process and all living ones below it have worked so far; those that have ended count with their parents."""
    root = psutil.Process(pid)
    total = 0.0
    for each in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])
    return total

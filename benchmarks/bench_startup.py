"""How long people wait before anything happens: ``spark-fs --help`` and importing the online reader.

    python -m benchmarks.bench_startup [--runs N]

Whole processes, cold interpreter, warm page cache. Prints one JSON line per figure; exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Report

COMMANDS = {
    "help_ms": [str(Path(sys.executable).with_name("spark-fs")), "--help"],
    "import_online_reader_ms": [sys.executable, "-c", "import spark_fs.online.read"],
}


def main() -> int:
    """Run each command several times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    report = Report()
    for name, command in COMMANDS.items():
        taken = sorted(_milliseconds(command) for _ in range(runs + 1))[:-1]  # the coldest is not counted
        report.figure(name, statistics.median(taken), "ms", spread=(taken[0], taken[-1]), at_most=300)
    return report.exit_code


def _milliseconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    sys.exit(main())

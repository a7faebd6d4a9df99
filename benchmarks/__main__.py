"""Run every benchmark in a process of its own: ``make bench``. Exits 1 if any target is missed.

Of the as-of join only the first workload; ``make bench-asof`` runs them all.
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (("bench_startup",), ("bench_online",), ("bench_asof", "--only", "medium"))


def main() -> int:
    """Run them one after the other; their JSON lines go to stdout."""
    codes = {
        name: subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode
        for name, *options in BENCHMARKS
    }
    missed = [name for name, code in codes.items() if code]
    print(f"targets missed or failed in: {', '.join(missed) or 'none'}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""A reader beside whatever else runs: ``python -m benchmarks.online_reader URL KEYS``, until its input is closed.

Reads 10 entities at a time, 200 times a second whatever the answers take (a late answer makes the next reads late, and counts
so), and prints the latencies in milliseconds as one JSON list.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time

from benchmarks.online_tables import VIEW
from spark_fs.online.read import OnlineReader
from spark_fs.spec import select as selection

ENTITIES, READS_A_SECOND = 10, 200


def main(url: str, keys: int) -> int:
    """Read until the input ends."""
    chosen, latencies = [selection(VIEW, VIEW.feature_names)], []
    randomly = random.Random(7)
    with OnlineReader(url) as reader:
        for _ in range(200):  # imports, connection, interpreter
            reader.read(chosen, {"key_id": range(ENTITIES)})
        print("ready", flush=True)
        due = time.perf_counter()
        while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
            reader.read(chosen, {"key_id": [randomly.randrange(keys) for _ in range(ENTITIES)]})
            latencies.append((time.perf_counter() - due) * 1000)
            due += 1 / READS_A_SECOND
    print(json.dumps(latencies), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

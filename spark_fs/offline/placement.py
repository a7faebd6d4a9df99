"""Which task joins which keys: spine rows are spread so that each task reads few buckets and all take about as long.

Plain data and pure functions, no Spark. A key's *residue* is its checksum modulo ``modulus``, a power of two; a bucket of a
table with B buckets, also a power of two, holds the keys whose checksum has that number modulo B. So rows of one residue need
one bucket of a table with fewer buckets than ``modulus``, and several of one with more.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from spark_fs.offline.layout import DataFile

#: The most residues that are told apart; spine rows are counted by this many.
RESIDUES = 1024
#: What a spine row costs, in bytes of feature file: measured as the time of joining one to the time of reading the other.
SPINE_ROW_COST = 500
#: About what a task should cost, half a second: less, and starting tasks takes the time; more, and the last keeps all waiting.
TASK_COST = 512 << 20
#: What the spine rows of one residue may cost before they are given to several tasks, which all read the same files.
SPLIT_COST = 96 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """The task of each spine row.

    Rows of residue r have ``shares[r]`` shares, told apart by a hash; share s of residue r goes to task
    ``tasks[sum(shares[:r]) + s]``. Splitting a residue is exact, for every spine row is joined by itself. Rows with a null key
    match nothing and may go anywhere.
    """

    modulus: int
    shares: tuple[int, ...]
    tasks: tuple[int, ...]
    count: int


def place(views: Sequence[tuple[int, Sequence[DataFile]]], spine_rows: Sequence[int] | None, parallelism: int) -> Placement:
    """Spread the residues over tasks, the costliest first.

    ``views`` has the buckets and files of each; ``spine_rows`` the spine's rows by their checksum modulo RESIDUES, None where
    not counted; ``parallelism`` is how many tasks run at a time.
    """
    modulus = min(max((buckets for buckets, _ in views), default=1), RESIDUES)
    if modulus < 2 * parallelism:
        modulus = min(1 << (2 * parallelism - 1).bit_length(), RESIDUES)
    reading = _bytes_by_residue(views, modulus)
    joining = _rows_by_residue(spine_rows, modulus)
    total = sum(reading) + SPINE_ROW_COST * sum(joining)
    shares = tuple(_shares(r, SPINE_ROW_COST * j, total, parallelism) for r, j in zip(reading, joining, strict=True))
    costs = [(r + SPINE_ROW_COST * j / n) for r, j, n in zip(reading, joining, shares, strict=True) for _ in range(n)]
    # Whole rounds of tasks: one task more than there are places would keep all others waiting.
    rounds = max(2, ceil(sum(costs) / TASK_COST / parallelism))
    count = min(len(costs), rounds * parallelism)
    return Placement(modulus, shares, _spread(costs, count), count)


def _bytes_by_residue(views: Sequence[tuple[int, Sequence[DataFile]]], modulus: int) -> list[float]:
    found = [0.0] * modulus
    for buckets, files in views:
        for file in files:
            if buckets >= modulus:
                found[file.bucket % modulus] += file.size_bytes
            else:
                for residue in range(file.bucket, modulus, buckets):
                    found[residue] += file.size_bytes
    return found


def _rows_by_residue(spine_rows: Sequence[int] | None, modulus: int) -> list[int]:
    if spine_rows is None:
        return [0] * modulus
    return [sum(spine_rows[residue::modulus]) for residue in range(modulus)]


def _shares(reading: float, joining: float, total: float, parallelism: int) -> int:
    """How many tasks share a residue: one, unless its spine rows alone cost more than a task's even share of all.

    Each share reads the same files, so their cost stays; no more shares than tasks that run at a time.
    """
    even = total / parallelism
    if joining <= max(even, SPLIT_COST):
        return 1
    return min(parallelism, ceil(joining / max(even - reading, even / 2)))


def _spread(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """The task of each share: always the costliest that is left to the task that has least; tasks by falling cost."""
    loads = [(0.0, task) for task in range(count)]
    chosen = [0] * len(costs)
    for share in sorted(range(len(costs)), key=lambda share: -costs[share]):
        load, task = heapq.heappop(loads)
        chosen[share] = task
        heapq.heappush(loads, (load + costs[share], task))
    # Tasks start in the order of their numbers: what takes longest must not start last.
    rank = {task: number for number, (_, task) in enumerate(sorted(loads, key=lambda pair: (-pair[0], pair[1])))}
    return tuple(rank[task] for task in chosen)

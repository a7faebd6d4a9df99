"""Spreading the spine over tasks, decided without Spark."""

from __future__ import annotations

import pytest

from spark_fs.offline.layout import DataFile
from spark_fs.offline.placement import RESIDUES, SPINE_ROW_COST, TASK_COST, Placement, place


def files(buckets: int, size: int) -> tuple[int, list[DataFile]]:
    return buckets, [DataFile(str(bucket), bucket, size, 1) for bucket in range(buckets)]


def loads(placement: Placement, costs: list[float]) -> list[float]:
    """What each task has to do, ``costs`` by residue."""
    found, slot = [0.0] * placement.count, 0
    for residue, shares in enumerate(placement.shares):
        for _ in range(shares):
            found[placement.tasks[slot]] += costs[residue] / shares
            slot += 1
    assert slot == len(placement.tasks)
    return found


@pytest.mark.parametrize("buckets", [1, 4, 8, 64, 1024])
@pytest.mark.parametrize("parallelism", [1, 2, 16])
def test_there_are_as_many_residues_as_buckets_and_twice_as_many_as_tasks_at_a_time(buckets: int, parallelism: int) -> None:
    """A power of two, so that each residue lies in one bucket or is made of whole ones."""
    placement = place([files(buckets, 1)], None, parallelism)
    assert placement.modulus & (placement.modulus - 1) == 0
    assert placement.modulus >= max(buckets, 2 * parallelism)
    assert set(placement.tasks) == set(range(placement.count))


def test_tasks_grow_with_what_there_is_to_do() -> None:
    """Little work is not cut into a task for each bucket, and much is not put into few."""
    assert place([files(1024, 1000)], None, 2).count == 4
    assert place([files(64, TASK_COST)], None, 2).count == 64


def test_the_costliest_tasks_come_first_and_all_are_about_equal() -> None:
    """Tasks start in the order of their numbers; one heavy bucket does not get others on top."""
    heavy = (16, [DataFile(str(b), b, 50 * TASK_COST if b == 5 else TASK_COST, 1) for b in range(16)])
    placement = place([heavy], None, 2)
    found = loads(placement, [50.0 if residue == 5 else 1.0 for residue in range(16)])
    assert found == sorted(found, reverse=True)
    assert (found[0], max(found[1:])) == (50.0, 1.0)


def test_a_residue_with_most_of_the_spine_is_split_and_others_are_not() -> None:
    """No task has much more than its even share; a spine without skew is not split at all."""
    rows = [100] * RESIDUES
    rows[7] = 10_000_000
    placement = place([files(16, 1000)], rows, 8)
    assert placement.shares[7] == 8
    assert sum(placement.shares) == 16 + 7
    even = place([files(16, 1000)], [10_000] * RESIDUES, 8)
    assert set(even.shares) == {1}
    by_residue = [sum(rows[residue::16]) * SPINE_ROW_COST / 1e6 for residue in range(16)]
    assert max(loads(placement, by_residue)) < 1.5 * sum(by_residue) / 8


def test_nothing_to_do_is_placed_too() -> None:
    """An empty spine and a table without files."""
    placement = place([(4, [])], [0] * RESIDUES, 2)
    assert (placement.count, set(placement.shares)) == (4, {1})

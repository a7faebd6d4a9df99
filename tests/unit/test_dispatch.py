"""In how many tasks the data files of a table are published."""

from __future__ import annotations

import pytest

from spark_fs.dispatch import _tasks
from spark_fs.offline.layout import DataFile

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("files", "each", "slots", "tasks"),
    [
        (8, 80_000, 2, 1),
        (8, 7 * MEGABYTE, 2, 2),
        (8, 30 * MEGABYTE, 2, 2),
        (8, 68 * MEGABYTE, 2, 4),
        (8, 7 * MEGABYTE, 64, 8),
        (1, 0, 2, 1),
        (3, 0, 1, 1),
        (1024, 200 * MEGABYTE, 16, 1024),
    ],
    ids=["tiny", "small", "medium", "large", "more slots than files", "one empty", "all empty", "very large"],
)
def test_tasks_are_as_many_as_slots_where_that_makes_them_neither_tiny_nor_long(
    files: int, each: int, slots: int, tasks: int
) -> None:
    """Tiny files share a task, large ones have one of their own, and never are there more tasks than files."""
    assert _tasks([DataFile(f"{n}", n, each, 1) for n in range(files)], slots) == tasks


@pytest.mark.parametrize("files", range(1, 40))
def test_tasks_have_the_same_number_of_files_but_for_the_last(files: int) -> None:
    """Whatever the number of files, the longest task is as short as the number of tasks allows."""
    tasks = _tasks([DataFile(f"{n}", n, 50 * MEGABYTE, 1) for n in range(files)], 3)
    assert 1 <= tasks <= files
    most = -(-files // tasks)
    assert (tasks - 1) * most < files

"""What a task of the colocated join does with one view's files: layouts, types, keys, memory. No Spark."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import zlib
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_fs.errors import InvalidError
from spark_fs.offline.colocated import PartitionJoin
from spark_fs.offline.layout import DataFile
from spark_fs.spec import Column
from spark_fs.types import Bool, Bytes, Date, Int32, Int64, String, Timestamp, ValueType
from tests.table_files import CREATED, EVENT, INSTANT, join, one_sorted_file, scan, write_files

ID = (Column("id", Int64),)
ROOT = Path(__file__).parents[2]


def rows(ids: list[Any], events: list[int | None], type_: pa.DataType | None = None, **values: pa.Array) -> pa.Table:
    """Feature rows, or spine rows without ``values``; the created time is the event time."""
    columns = {"id": pa.array(ids, type_ or pa.int64()), EVENT: pa.array(events, INSTANT)}
    return pa.table({**columns, CREATED: pa.array(events, INSTANT), **values} if values else columns)


def found(joined: pa.Table, name: str = "0") -> list[Any]:
    return [row[name] for row in sorted(joined.to_pylist(), key=lambda row: row["row"])]


def numbered(spine: pa.Table) -> pa.Table:
    return spine.append_column("row", pa.array(range(spine.num_rows)))


def test_a_row_exactly_at_the_time_and_at_the_ttl_is_visible(tmp_path: Path) -> None:
    """Both bounds are inclusive, to the microsecond; without a ttl there is no lower bound."""
    files = write_files(tmp_path, rows([1, 1], [10, 20], v=pa.array([1, 2])), ID, 1, one_sorted_file(["id"]))
    spine = numbered(rows([1] * 5, [9, 10, 19, 25, 26]))
    for ttl, expected in ((None, [None, 1, 1, 2, 2]), (5, [None, 1, None, 2, None])):
        view = scan(files, {"id": "id"}, {"v": pa.int64()}, 1, ttl_micros=ttl)
        assert found(join(spine, [view], ID)) == expected


def test_overlapping_and_unsorted_files_give_the_newest_row(tmp_path: Path) -> None:
    """Whatever file a row is in and wherever it stands there; at equal event times the greater created time, null least."""
    instants = [5, 9, 9, 7, 3, 9]
    created = pa.array([1, None, 4, 1, 1, 3], INSTANT)
    table = rows([1] * 6, instants, v=pa.array(range(6))).set_column(2, CREATED, created)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        parts = [table.take(pa.array(order[:2])), table.take(pa.array(order[2:3])), table.take(pa.array(order[3:]))]
        files = write_files(tmp_path, table, ID, 1, lambda _, parts=parts: parts)
        joined = join(numbered(rows([1, 1, 1], [9, 8, 4])), [scan(files, {"id": "id"}, {"v": pa.int64()}, 1)], ID)
        assert found(joined) == [2, 3, 4]


def test_created_times_are_read_only_where_event_times_tie(tmp_path: Path) -> None:
    """Files without the column will do as long as each key has each event time once; a tie of any two rows needs it."""
    whole, apart = (lambda rows: [rows]), (lambda rows: [rows[:1], rows[1:]])
    for number, (split, events, tied) in enumerate(
        [(whole, [10, 20], False), (whole, [10, 10], True), (apart, [10, 10], True)]
    ):
        table = rows([1, 1], events, v=pa.array([1, 2])).drop_columns([CREATED])
        files = write_files(tmp_path / str(number), table, ID, 1, split)
        view = scan(files, {"id": "id"}, {"v": pa.int64()}, 1)
        if tied:
            with pytest.raises(KeyError, match=CREATED):
                join(numbered(rows([1], [25])), [view], ID)
        else:
            assert found(join(numbered(rows([1], [25])), [view], ID)) == [2]


def test_files_are_not_opened_where_nothing_in_them_can_be_seen(tmp_path: Path) -> None:
    """A file that begins after the last time, or ends before what is found already, is not even opened."""
    files = write_files(tmp_path, rows([1, 1], [10, 20], v=pa.array([1, 2])), ID, 1, one_sorted_file(["id"]))
    gone = [DataFile("/nowhere/late", 0, 1, 1, 31, 40), DataFile("/nowhere/early", 0, 1, 1, 1, 19)]
    view = scan([*files, *gone], {"id": "id"}, {"v": pa.int64()}, 1)
    assert found(join(numbered(rows([1, 1], [20, 30])), [view], ID)) == [2, 2]


def test_a_file_that_is_gone_is_named() -> None:
    """VACUUM between the choice of a version and the join ends in one clear error, not in a traceback of Arrow's."""
    view = scan([DataFile("/nowhere/gone.parquet", 0, 1, 1, 1, 40)], {"id": "id"}, {"v": pa.int64()}, 1)
    with pytest.raises(InvalidError, match=r"SFS-514.*gone\.parquet"):
        join(numbered(rows([1], [20])), [view], ID)


def test_buckets_without_files_and_buckets_without_spine_rows_are_no_trouble(tmp_path: Path) -> None:
    """Rows whose bucket is empty get nulls; buckets that no row asks for are not read."""
    table = rows(list(range(8)), [1] * 8, v=pa.array(range(8)))
    files = write_files(tmp_path, table, ID, 16, one_sorted_file(["id"]))
    spine = numbered(rows([3, 100, 101, 102, None], [5, 5, 5, 5, 5]))
    assert found(join(spine, [scan(files, {"id": "id"}, {"v": pa.int64()}, 16)], ID, modulus=4)) == [3, None, None, None, None]
    assert found(join(numbered(rows([3], [5])), [scan([], {"id": "id"}, {"v": pa.int64()}, 16)], ID)) == [None]


@pytest.mark.parametrize("buckets", [1, 2, 8, 64])
@pytest.mark.parametrize("modulus", [1, 8, 64])
def test_any_number_of_buckets_goes_with_any_number_of_residues(tmp_path: Path, buckets: int, modulus: int) -> None:
    """Fewer buckets than residues: several residues read one bucket; more: one residue reads several."""
    table = rows(list(range(200)), [1] * 200, v=pa.array(range(200)))
    files = write_files(tmp_path, table, ID, buckets, one_sorted_file(["id"]))
    view = scan(files, {"id": "id"}, {"v": pa.int64()}, buckets)
    assert found(join(numbered(rows(list(range(200)), [1] * 200)), [view], ID, modulus=modulus)) == list(range(200))


MOMENT = datetime(2024, 3, 31, 1, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("type_", "arrow", "spine_arrow", "values"),
    [
        (Int64, pa.int32(), pa.int64(), [-1, 0, 7]),
        (Int32, pa.int64(), pa.int16(), [-1, 0, 7]),
        (String, pa.string(), pa.string(), ["", "é", "1:1"]),
        (Bytes, pa.binary(), pa.binary(), [b"", b"\xff\x00", b"a"]),
        (Bool, pa.bool_(), pa.bool_(), [True, False]),
        (Date, pa.date32(), pa.date32(), [date(1969, 12, 31), date(1970, 1, 1), date(2024, 2, 29)]),
        (Timestamp, INSTANT, pa.timestamp("us", tz="America/New_York"), [MOMENT, MOMENT.replace(microsecond=1)]),
    ],
    ids=["int32 rows", "int64 rows", "string", "bytes", "bool", "date", "timestamp"],
)
def test_keys_of_every_type_match_by_value(
    tmp_path: Path, type_: ValueType, arrow: pa.DataType, spine_arrow: pa.DataType, values: list[Any]
) -> None:
    """Also integers of other width and instants of another zone; a null key matches nothing."""
    keys = (Column("id", type_),)
    table = rows(values, [1] * len(values), arrow, v=pa.array(range(len(values))))
    files = write_files(tmp_path, table, keys, 4, one_sorted_file(["id"]))
    spine = numbered(rows([*values, None], [1] * (len(values) + 1), spine_arrow))
    assert found(join(spine, [scan(files, {"id": "id"}, {"v": pa.int64()}, 4)], keys)) == [*range(len(values)), None]


def test_keys_with_equal_checksums_stay_apart(tmp_path: Path) -> None:
    """Texts whose CRC-32 is the same lie in one bucket and have one residue, yet each matches only itself."""
    by_checksum: dict[int, str] = {}
    collisions: list[tuple[str, str]] = []
    for number in itertools.count():
        text = random.Random(number).randbytes(8).hex()
        other = by_checksum.setdefault(zlib.crc32(text.encode()), text)
        if other != text:
            collisions.append((other, text))
            if len(collisions) == 3:
                break
    keys = (Column("id", String),)
    known = [pair[0] for pair in collisions]
    files = write_files(tmp_path, rows(known, [1] * 3, pa.string(), v=pa.array(range(3))), keys, 8, one_sorted_file(["id"]))
    spine = numbered(rows([text for pair in collisions for text in pair], [1] * 6, pa.string()))
    assert found(join(spine, [scan(files, {"id": "id"}, {"v": pa.int64()}, 8)], keys)) == [0, None, 1, None, 2, None]


def test_composite_keys_are_compared_column_by_column(tmp_path: Path) -> None:
    """("1", "11") is not ("11", "1"), and a null in either matches nothing."""
    keys = (Column("a", String), Column("b", String))
    pairs = [("1", "11"), ("11", "1"), ("", "111"), ("1", None), (None, "1")]
    columns = [pa.array([pair[side] for pair in pairs], pa.string()) for side in (0, 1)]
    times = pa.array([1] * 5, INSTANT)
    table = pa.table({"a": columns[0], "b": columns[1], EVENT: times, CREATED: times, "v": pa.array(range(5))})
    files = write_files(tmp_path, table.slice(0, 2), keys, 2, one_sorted_file(["a", "b"]))
    spine = numbered(table.select(["a", "b", EVENT]))
    joined = join(spine, [scan(files, {"a": "a", "b": "b"}, {"v": pa.int64()}, 2)], keys)
    assert found(joined) == [0, 1, None, None, None]


VALUES = {
    "bool": pa.array([True, None]),
    "int32": pa.array([-5, None], pa.int32()),
    "float32": pa.array([float("nan"), None], pa.float32()),
    "float64": pa.array([-0.0, None]),
    "string": pa.array(["é", None]),
    "bytes": pa.array([b"\x00", None]),
    "instant": pa.array([MOMENT, None], INSTANT),
    "date": pa.array([date(1, 1, 1), None]),
    "decimal": pa.array([Decimal("12345678901234567890.12"), None], pa.decimal128(38, 2)),
    "short decimal": pa.array([Decimal("-1.5"), None], pa.decimal128(5, 1)),
    "embedding": pa.array([[1.5, 2.5], None], pa.list_(pa.float32())),
    "texts": pa.array([["a", None], []], pa.list_(pa.string())),
    "struct": pa.array([{"x": [1], "y": "z"}, None]),
}


def test_values_of_every_type_come_back_as_they_are(tmp_path: Path) -> None:
    """Nested and decimal ones too; a null value of the newest row is null, never filled from an older one."""
    table = rows([1, 2], [1, 1], **VALUES)
    files = write_files(tmp_path, table, ID, 1, lambda part: [part])
    view = scan(files, {"id": "id"}, {name: array.type for name, array in VALUES.items()}, 1)
    joined = join(numbered(rows([2, 1, 3], [1, 1, 1])), [view], ID).sort_by("row")
    for number, (name, array) in enumerate(VALUES.items()):
        column = joined.column(str(number))
        assert column.type == array.type, name
        assert repr(column.to_pylist()) == repr([array[1].as_py(), array[0].as_py(), None]), name


def test_a_feature_added_later_is_null_in_older_files(tmp_path: Path) -> None:
    """Files are read by the names of their columns; a narrower type of older files is widened."""
    old = write_files(tmp_path / "old", rows([1], [1], v=pa.array([5], pa.int32())), ID, 1, lambda part: [part])
    new = write_files(tmp_path / "new", rows([2], [1], w=pa.array(["x"]), v=pa.array([6])), ID, 1, lambda part: [part])
    view = scan([*old, *new], {"id": "id"}, {"w": pa.string(), "v": pa.int64()}, 1)
    joined = join(numbered(rows([1, 2], [1, 1])), [view], ID)
    assert (found(joined, "0"), found(joined, "1")) == ([None, "x"], [5, 6])
    only_new = scan(old, {"id": "id"}, {"w": pa.string()}, 1)
    assert found(join(numbered(rows([1], [1])), [only_new], ID)) == [None]


def test_views_without_keys_match_rows_of_every_key(tmp_path: Path) -> None:
    """A row with a null key has the newest row of a view without keys, whichever residue its task has."""
    table = pa.table({EVENT: pa.array([1, 5], INSTANT), CREATED: pa.array([1, 5], INSTANT), "v": pa.array([1, 2])})
    files = write_files(tmp_path, table, (), 8, lambda part: [part])
    spine = numbered(rows([None, 1, 2, 3], [4, 5, 6, 0]))
    assert found(join(spine, [scan(files, {}, {"v": pa.int64()}, 8)], ID)) == [1, 2, 2, None]


def test_files_of_others_with_null_keys_or_times_are_read_past_them(tmp_path: Path) -> None:
    """A feature table of ours has none; in one that somebody else wrote they match nothing and lose nothing."""
    table = rows([1, None, 1, 1, 2], [3, 3, None, 2, None], v=pa.array(range(5)))
    path = tmp_path / "part.parquet"
    pq.write_table(table, path)
    view = scan([DataFile(str(path), 0, 1, 5)], {"id": "id"}, {"v": pa.int64()}, 1)
    spine = numbered(rows([1, 1, 2, None], [9, 2, 9, 9]))
    assert found(join(spine, [view], ID)) == [0, 3, None, None]


def test_results_of_more_than_two_gibibytes_come_in_pieces(tmp_path: Path) -> None:
    """One string column whose values take more than 2^31 bytes, in the file and in the result."""
    text = pa.array(["x" * (1 << 16)])
    count = (1 << 31) // (1 << 16) + 100
    indices = pa.array([0] * count, pa.int32())
    table = rows(list(range(count)), [1] * count, v=pa.DictionaryArray.from_arrays(indices, text))
    path = tmp_path / "wide.parquet"
    pq.write_table(table, path, row_group_size=4096)
    view = scan([DataFile(str(path), 0, path.stat().st_size, count, 1, 1)], {"id": "id"}, {"v": pa.string()}, 1)
    spine = rows(list(range(count)), [1] * count).append_column("residue", pa.array([0] * count, pa.int32()))
    task = PartitionJoin((view,), ("v",), EVENT, "residue", 1, False)
    seen, size = 0, 0
    for batch in task(spine.to_batches()):
        seen += batch.num_rows
        size += batch.column("v").nbytes
        assert batch.nbytes < 1 << 30
    assert seen == count
    assert size > 1 << 31


#: Joins rows that take far more than the cap allows at once; the cap is on what is added to the interpreter's own memory.
CAPPED = """
import resource, sys
import pyarrow as pa
from spark_fs.offline.colocated import Limits, PartitionJoin
from tests.unit.test_colocated import EVENT, rows, scan
from spark_fs.offline.layout import DataFile

path, count, limits = sys.argv[1], int(sys.argv[2]), Limits(8 << 20, 8 << 20, 8 << 20)
view = scan([DataFile(path, 0, 1, count)], {"id": "id"}, {"v": pa.float64(), "w": pa.float64()}, 1)
task = PartitionJoin((view,), ("v", "w"), EVENT, "residue", 1, False, limits)

def spine():
    for start in range(0, count, 10_000):
        batch = rows(list(range(start, start + 10_000)), [count] * 10_000)
        yield batch.append_column("residue", pa.array([0] * 10_000, pa.int32())).to_batches()[0]

next(iter(task([next(spine())])))  # what the libraries take is not counted
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
joined = sum(batch.num_rows for batch in task(spine()))
assert joined == count, joined
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_limits_not_by_the_data(tmp_path: Path) -> None:
    """With limits of 8 MiB a worker takes at most 3 × their sum more, though features and spine take 20 times as much."""
    count = 3_000_000
    numbers = pa.array(range(count))
    table = pa.table({"id": numbers, EVENT: numbers.cast(INSTANT), CREATED: numbers.cast(INSTANT)})
    table = table.append_column("v", numbers.cast(pa.float64())).append_column("w", numbers.cast(pa.float64()))
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=count, compression="snappy")
    command = [sys.executable, "-c", CAPPED, str(tmp_path / "part.parquet"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * 24 * 1024  # ru_maxrss counts KiB

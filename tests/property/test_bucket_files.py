"""Data files as tasks write them, against a naive sort: any keys, ties, several runs; statistics; failures."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_fs.offline.bucket_files import BucketWriter

INSTANT = pa.timestamp("us", tz="Asia/Kolkata")  # the session's zone, which no file may depend on
START = datetime(2024, 1, 1, tzinfo=timezone.utc)
KEYS: dict[str, tuple[pa.DataType, Sequence[Any]]] = {
    "integers": (pa.int64(), [-(2**63), -1, 0, 1, 2**63 - 1]),
    "small": (pa.int32(), [7, -3, 0]),
    "texts": (pa.string(), ["", "a", "b", "ä", "a" * 40, "z\U0001f600"]),
    "bytes": (pa.binary(), [b"", b"\x00", b"\xff", b"ab"]),
    "days": (pa.date32(), [date(1, 1, 1), date(1969, 12, 31), date(2024, 2, 29)]),
    "instants": (INSTANT, [START, START - timedelta(microseconds=1), START + timedelta(days=9999)]),
    "booleans": (pa.bool_(), [False, True]),
}
Row = dict[str, Any]
ROOT = Path(__file__).parents[2]


def random_rows(rng: random.Random, keys: Sequence[str], count: int) -> list[Row]:
    """Rows of four buckets with few keys, few times and few tie-breaks."""
    hours, created = range(rng.choice([1, 3, 50])), [None, START, START + timedelta(hours=1)]
    return [
        {
            **{name: rng.choice(KEYS[name][1]) for name in keys},
            "event_timestamp": START + timedelta(hours=rng.choice(hours), microseconds=rng.choice([0, 1])),
            "created_timestamp": rng.choice(created),
            "value": rng.random(),
            "note": rng.choice([None, "x", "y" * 50]),
            "list": rng.choice([None, [], [1.5, None]]),
            "_build": 1,
            "_hash": rng.randrange(-3, 3),
            "_bucket": rng.randrange(4),
        }
        for _ in range(count)
    ]


def schema_of(keys: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [
            *((name, KEYS[name][0]) for name in keys),
            ("event_timestamp", INSTANT),
            ("created_timestamp", INSTANT),
            ("value", pa.float64()),
            ("note", pa.string()),
            ("list", pa.list_(pa.float64())),
            ("_build", pa.int32()),
            ("_hash", pa.int64()),
            ("_bucket", pa.int32()),
        ]
    )


def writer_of(folder: Path, keys: Sequence[str], **more: Any) -> BucketWriter:
    schema = schema_of(keys)
    columns = tuple(name for name in schema.names if name not in ("_hash", "_bucket"))
    indexed = (*keys, "event_timestamp", "created_timestamp", "_build")
    return BucketWriter(str(folder), tuple(keys), columns, indexed, "_hash", **more)


def batches_of(rows: Sequence[Row], keys: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        yield pa.RecordBatch.from_pylist(list(rows[start : start + size]), schema_of(keys))


def written(writer: BucketWriter, batches: Iterator[pa.RecordBatch]) -> list[Row]:
    return [summary for batch in writer(batches) for summary in batch.to_pylist()]


def place(row: Row, keys: Sequence[str]) -> tuple[Any, ...]:
    created = row["created_timestamp"]
    texts = [value.encode() if isinstance(value, str) else value for value in (row[name] for name in keys)]
    return (*texts, row["event_timestamp"], created is not None, created or START)


def expected(rows: Sequence[Row], keys: Sequence[str], bucket: int) -> list[list[Row]]:
    """The rows of a bucket in order, where several may stay that lost no tie (equal tie-breaks): the choices at each place."""
    best: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["_bucket"] == bucket:
            tied = best.setdefault(place(row, keys), [])
            if tied and row["_hash"] > tied[0]["_hash"]:
                tied.clear()
            if not tied or row["_hash"] == tied[0]["_hash"]:
                tied.append(row)
    return [best[at] for at in sorted(best)]


@pytest.mark.parametrize("seed", range(100))
def test_files_hold_what_a_naive_sort_leaves(tmp_path: Path, seed: int) -> None:
    """One or two keys of every type, ties of all kinds, any size of batches; one run, a few, or many of a few rows."""
    rng = random.Random(seed)
    keys = rng.sample(list(KEYS), rng.choice([0, 1, 1, 2, 3]))
    rows = random_rows(rng, keys, rng.choice([0, 1, 40, 400]))
    writer = writer_of(tmp_path, keys, run_bytes=rng.choice([1, 2_000, 20_000, 1 << 28]))
    files = written(writer, batches_of(rows, keys, rng.choice([3, 50, 1_000])))

    assert sorted(file["bucket"] for file in files) == sorted({row["_bucket"] for row in rows})
    assert sum(file["rows"] + file["dropped"] for file in files) == len(rows)
    for file in files:
        path = tmp_path / file["path"]
        found = pq.read_table(path, partitioning=None).to_pylist()
        wanted = expected(rows, keys, file["bucket"])
        assert [place(row, keys) for row in found] == [place(choices[0], keys) for choices in wanted]
        for row, choices in zip(found, wanted, strict=True):
            assert row in [{name: value for name, value in each.items() if name in row} for each in choices]
        assert (file["rows"], file["size_bytes"]) == (len(found), path.stat().st_size)
        assert_statistics(json.loads(file["stats"]), found, keys)
    assert len(list(tmp_path.rglob("*.parquet"))) == len(files)


def assert_statistics(stats: Row, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Bounds are the least and greatest values, of texts the first 32 characters."""
    assert stats["numRecords"] == len(rows)
    for name in (*keys, "event_timestamp", "created_timestamp", "_build"):
        values = [row[name] for row in rows if row[name] is not None]
        assert stats["nullCount"][name] == len(rows) - len(values)
        low, high = (stats[edge].get(name) for edge in ("minValues", "maxValues"))
        if name in ("bytes", "booleans") or not values:
            assert (low, high) == (None, None)
        elif isinstance(values[0], str):
            assert low == min(values)[:32]
            assert high == (max(values) if len(max(values)) <= 32 else None)
        elif isinstance(values[0], datetime):
            low, high = (datetime.fromisoformat(bound.replace("Z", "+00:00")) for bound in (low, high))
            assert (low, high) == (min(values), max(values))
        else:
            shown = [value.isoformat() if isinstance(value, date) else value for value in values]
            assert (low, high) == (min(shown), max(shown))


def test_a_file_is_typed_by_parquet_alone(tmp_path: Path) -> None:
    """Instants are UTC whatever the session's zone; repeated values go by a dictionary, others do not.

    What does not get smaller is not compressed, and a column without nulls says so.
    """
    rng = random.Random(1)
    keys = ["integers"]
    [file, *_] = written(writer_of(tmp_path, keys), batches_of(random_rows(rng, keys, 400), keys, 100))
    opened = pq.ParquetFile(tmp_path / file["path"])
    assert opened.schema_arrow.field("event_timestamp").type == pa.timestamp("us", tz="UTC")
    assert opened.schema_arrow.metadata is None
    group = opened.metadata.row_group(0)
    by_dictionary = {group.column(n).path_in_schema for n in range(group.num_columns) if group.column(n).has_dictionary_page}
    assert {"integers", "note"} <= by_dictionary
    assert "value" not in by_dictionary
    columns = {opened.schema.column(n).path: n for n in range(group.num_columns)}
    codecs = {path: group.column(n).compression for path, n in columns.items()}
    assert (codecs["integers"], codecs["note"], codecs["value"]) == ("SNAPPY", "SNAPPY", "UNCOMPRESSED")
    may_be_null = {path for path, n in columns.items() if opened.schema.column(n).max_definition_level}
    assert may_be_null == {"created_timestamp", "note", "list.list.element"}


def test_instants_that_python_does_not_have_are_written(tmp_path: Path) -> None:
    """Spark's years go to 294247: such a bound is left out of the statistics, and the merge of runs holds."""
    far = [2**63 - 1, 5, -(2**62), 2**62]
    table = pa.table(
        {
            "small": pa.array([1, 1, 1, 1], pa.int32()),
            "event_timestamp": pa.array(far, pa.timestamp("us")).cast(INSTANT),
            "created_timestamp": pa.array([None] * 4, INSTANT),
            "_hash": pa.array([0] * 4, pa.int64()),
            "_bucket": pa.array([0] * 4, pa.int32()),
        }
    )
    columns = ("small", "event_timestamp", "created_timestamp")
    writer = BucketWriter(str(tmp_path), ("small",), columns, columns, "_hash", run_bytes=1)
    [file] = written(writer, iter(table.to_batches(max_chunksize=1)))
    found = pq.read_table(tmp_path / file["path"], partitioning=None)
    assert found["event_timestamp"].cast(pa.int64()).to_pylist() == sorted(far)
    stats = json.loads(file["stats"])
    assert ("event_timestamp" in stats["minValues"], "event_timestamp" in stats["maxValues"]) == (False, False)
    assert stats["minValues"]["small"] == 1


@pytest.mark.parametrize("run_bytes", [1, 1 << 20])
def test_texts_that_are_no_utf_8_are_written(tmp_path: Path, run_bytes: int) -> None:
    """Spark's may hold any bytes: such a bound is left out of the statistics, and one run or several are merged by bytes."""
    texts = pa.array([b"b", b"\xff\xfe", b"a"], pa.binary()).view(pa.string())
    instants = pa.array([START] * 3, INSTANT)
    names = ["texts", "event_timestamp", "created_timestamp", "_hash", "_bucket"]
    columns = [texts, instants, instants, pa.array([0] * 3, pa.int64()), pa.array([0] * 3, pa.int32())]
    writer = BucketWriter(str(tmp_path), ("texts",), tuple(names[:3]), ("texts",), "_hash", run_bytes=run_bytes)
    batches = pa.table(columns, names).to_batches(max_chunksize=1)
    [file] = written(writer, iter(batches))
    assert pq.read_table(tmp_path / file["path"], partitioning=None)["texts"].cast(pa.binary()).to_pylist() == [
        b"a",
        b"b",
        b"\xff\xfe",
    ]
    stats = json.loads(file["stats"])
    assert (stats["minValues"], stats["maxValues"]) == ({"texts": "a"}, {})


def test_a_failed_attempt_leaves_nothing(tmp_path: Path) -> None:
    """Neither a half-written file nor a run on the local disk."""
    rows = random_rows(random.Random(2), ["small"], 300)
    half = rows[:150]

    def failing() -> Iterator[pa.RecordBatch]:
        yield from batches_of(half, ["small"], 50)
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        written(writer_of(tmp_path / "a", ["small"], run_bytes=1_000), failing())
    assert list(tmp_path.rglob("*.*")) == []

    broken = writer_of(tmp_path / "b", ["small"], compression="no codec")
    with pytest.raises(Exception, match="no codec"):
        written(broken, batches_of(rows, ["small"], 50))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


CAPPED = """
import resource, sys
import numpy as np
import pyarrow as pa
from spark_fs.offline.bucket_files import BucketWriter
from tests.property.test_bucket_files import INSTANT

names = ["small", "event_timestamp", "created_timestamp", "note", "_hash", "_bucket"]
writer = BucketWriter(sys.argv[1], names[:1], names[:4], names[:3], "_hash", run_bytes=int(sys.argv[2]))
random = np.random.default_rng(1)

def batches(count):
    for _ in range(count):
        numbers = pa.array(random.integers(0, 2**40, 25_000))
        instants = numbers.cast(pa.timestamp("us")).cast(INSTANT)
        texts = pa.array(["x" * 100] * 25_000)
        yield pa.record_batch([numbers, instants, instants, texts, numbers, pa.array([0] * 25_000, pa.int32())], names)

next(iter(writer(batches(1))))  # what the libraries take is not counted
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[written] = next(iter(writer(batches(int(sys.argv[3]))))).to_pylist()
assert written["rows"] + written["dropped"] == 25_000 * int(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_limit_not_by_the_data(tmp_path: Path) -> None:
    """Eleven runs of 32 MiB in one bucket: at most 6 × 32 MiB more, and 3 % of 32 MiB for each run."""
    run_bytes, batches = 32 << 20, 84
    command = [sys.executable, "-c", CAPPED, str(tmp_path), str(run_bytes), str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) << 10 < run_bytes * (6 + 0.03 * 11)  # ru_maxrss counts KiB

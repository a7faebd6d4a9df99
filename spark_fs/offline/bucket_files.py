"""Feature rows → the data files of a feature table: what runs in Spark's Python workers. Arrow and numpy, no Spark.

A task receives the rows of some buckets in any order and writes one Parquet file for each: sorted by (keys, event_timestamp,
created_timestamp), ties settled, with the statistics that Delta's log keeps. The method, an external merge sort:

1. Gather rows up to a bound, number their keys in order, and sort by (key number, event): one number where both fit in 63
   bits. Where rows have equal keys and events, created times and the tie-break decide. That is a run.
2. One run is written as it is. Of several, each is put on the local disk in batches, and the first row of each batch is
   remembered.
3. These first rows cut the whole into ranges of few batches. Range by range, what all runs have of it is sorted once more
   and written. Equal rows fall into one range, so ties are settled there too.

Memory: see ``BucketWriter``.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_fs.files import create_file, delete_file
from spark_fs.offline.blocks import NEVER, Integers, as_integers, in_order, parts, valid_mask

#: What a task tells of each file, as Spark's DDL: ``path`` is relative to the table, ``stats`` is JSON as in Delta's log,
#: ``dropped`` counts the rows that lost a tie.
SUMMARY = "path string, bucket int, size_bytes bigint, rows bigint, stats string, dropped bigint"

_EVENT, _CREATED, _BUCKET = "event_timestamp", "created_timestamp", "_bucket"
#: A run on disk has so many batches, and a range of the merge about half as many.
_BATCHES_OF_A_RUN = 64
#: Bytes of a row group, uncompressed, and the most rows it has.
_GROUP_BYTES, _GROUP_ROWS = 128 << 20, 1 << 20
#: A column goes by a dictionary if fewer than half of so many values differ.
_SAMPLE = 10_000
#: Numbers are compressed if that leaves less than this part of a sample.
_WORTH_COMPRESSING = 0.9
#: Longer texts are cut in statistics.
_STATS_CHARACTERS = 32
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001  # formatted as UTC

#: The place of a row in a table's order.
Place = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class BucketWriter:
    """The function that ``mapInArrow`` calls for each partition of feature rows; plain data, so that it can be sent.

    Takes the columns of a file, ``_bucket``, and ``tie_break`` (int64; of rows with equal keys and times the one with the
    greatest stays). Keys and event times are not null. Files have ``columns``, in this order, below ``root``;
    ``compression`` is a codec of Parquet; ``indexed`` names the columns with statistics; ``metadata`` goes into each file. A
    file appears whole, under a name of its own; what an attempt that failed has written belongs to no table.

    The worker takes about 250 MB + 6 × ``run_bytes``, and where a task's rows need several runs, 3 % of ``run_bytes`` for each.
    """

    root: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    indexed: tuple[str, ...]
    tie_break: str
    compression: str = "snappy"
    metadata: Mapping[str, str] = field(default_factory=dict)
    run_bytes: int = 128 << 20

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Batches of feature rows → one row of ``SUMMARY`` for each file written."""
        written = list(self._write(batches))
        if written:
            yield pa.RecordBatch.from_pylist([each.summary() for each in written], schema=_SUMMARY_SCHEMA)

    def _write(self, batches: Iterable[pa.RecordBatch]) -> Iterator[_File]:
        file: _File | None = None
        try:
            for piece in self._sorted(batches):
                buckets = as_integers(piece.rows[_BUCKET])[piece.order]
                starts = np.flatnonzero(np.append(True, buckets[1:] != buckets[:-1]))
                for start, end in zip(starts, [*starts[1:], len(buckets)], strict=True):
                    bucket = int(buckets[start])
                    if file is not None and file.bucket != bucket:
                        file.close()
                        yield file
                        file = None
                    file = file or _File(self, bucket)
                    file.write(piece.rows, piece.order[start:end], is_all=piece.is_all)
                if file is not None:
                    file.dropped += piece.dropped
            if file is not None:
                file.close()
                yield file
        except BaseException:
            if file is not None:
                file.discard()
            raise

    def _sorted(self, batches: Iterable[pa.RecordBatch]) -> Iterator[_Piece]:
        """All rows in order, in pieces that fit into memory; equal rows are in one piece."""
        with ExitStack() as at_end:
            folder, runs = "", list[_Run]()
            for rows, is_full in parts(batches, self.run_bytes):
                piece = self._piece(rows)
                del rows  # a copy is in the piece
                if not runs and not is_full:
                    yield replace(piece, is_all=True)
                    return
                folder = folder or at_end.enter_context(tempfile.TemporaryDirectory("-spark_fs", dir=_local_folder()))
                runs.append(_Run(self, piece, f"{folder}/{len(runs)}"))
                del piece  # before the next rows are gathered
            dropped = sum(run.dropped for run in runs)
            for rows in _ranges(runs) if runs else ():
                piece = self._piece(rows)
                yield replace(piece, dropped=piece.dropped + dropped)
                dropped = 0

    def _piece(self, rows: pa.Table) -> _Piece:
        rows = rows.combine_chunks()
        numbers, events = _numbered([rows[name] for name in (_BUCKET, *self.keys)]), as_integers(rows[_EVENT])
        order = in_order(numbers, events)
        if not _equal_neighbours(order, numbers, events).any():
            return _Piece(rows, order, 0)
        created = np.where(valid_mask(rows[_CREATED]), as_integers(rows[_CREATED]), NEVER)
        order = np.lexsort((as_integers(rows[self.tie_break]), created, events, numbers))
        stays = np.append(~_equal_neighbours(order, numbers, events, created), True)
        return _Piece(rows, order[stays], len(order) - int(stays.sum()))

    def place(self, rows: pa.Table, row: int) -> Place:
        """The place of a row: what comes first has the smaller one."""
        created = _plain(rows[_CREATED][row])
        return (
            *(_plain(rows[name][row]) for name in (_BUCKET, *self.keys, _EVENT)),
            NEVER if created is None else created,
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows, the order in which they are to be written, and how many are not, for they lost a tie.

    ``is_all``: there are no other pieces.
    """

    rows: pa.Table
    order: Integers
    dropped: int
    is_all: bool = False


class _Run:
    """A sorted run on the local disk, taken back from its first row on."""

    def __init__(self, writer: BucketWriter, piece: _Piece, path: str) -> None:
        self._writer, self._path, self._next = writer, path, 0
        self.dropped = piece.dropped
        #: The place of each batch's first row.
        self.firsts: list[Place] = []
        step = max(-(-len(piece.order) // _BATCHES_OF_A_RUN), 1)
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, piece.rows.schema) as stream:
            for start in range(0, len(piece.order), step):
                batch = piece.rows.take(pa.array(piece.order[start : start + step])).combine_chunks()
                self.firsts.append(writer.place(batch, 0))
                stream.write_table(batch, max_chunksize=step)
        self._left = piece.rows.schema.empty_table()

    def take_before(self, cut: Place | None) -> pa.Table:
        """The rows not taken yet whose place is before ``cut``; None: all."""
        end = len(self.firsts) if cut is None else bisect_left(self.firsts, cut)
        if self._next < end:
            with pa.OSFile(self._path) as source, pa.ipc.open_file(source) as stream:
                read = [stream.get_batch(number) for number in range(self._next, end)]
            self._left, self._next = pa.concat_tables([self._left, pa.Table.from_batches(read)]), end
        taken = self._left.num_rows
        if cut is not None:
            taken = bisect_left(range(taken), cut, key=lambda row: self._writer.place(self._left, row))
        before, self._left = self._left.slice(0, taken), self._left.slice(taken)
        return before


def _ranges(runs: Sequence[_Run]) -> Iterator[pa.Table]:
    """What the runs have of one range of places after the other."""
    firsts = sorted(first for run in runs for first in run.firsts)
    step = _BATCHES_OF_A_RUN // 2
    for cut in (*firsts[step::step], None):
        rows = pa.concat_tables([run.take_before(cut) for run in runs])
        if rows.num_rows:
            yield rows


class _File:
    """One data file, being written."""

    def __init__(self, writer: BucketWriter, bucket: int) -> None:
        self.bucket, self.dropped = bucket, 0
        self._columns, self._never_null = list(writer.columns), {*writer.keys, _EVENT}
        self._name = f"{_BUCKET}={bucket}/part-{uuid.uuid4()}.parquet"
        self._path = f"{writer.root}/{self._name}"
        self._metadata = dict(writer.metadata)
        self._compression, self._group_bytes = writer.compression, min(_GROUP_BYTES, writer.run_bytes // 4)
        self._sink = create_file(self._path)
        self._parquet: pq.ParquetWriter | None = None
        self._statistics = _Statistics(writer.indexed)
        self._size = 0

    def write(self, rows: pa.Table, order: Integers, *, is_all: bool) -> None:
        """Append these rows in this order; ``is_all``: no others will follow."""
        rows = rows.select(self._columns)
        step = int(min(max(self._group_bytes / max(rows.nbytes / max(rows.num_rows, 1), 1), 1), _GROUP_ROWS))
        for start in range(0, len(order), step):
            group = rows.take(pa.array(order[start : start + step]))
            self._statistics.add(group)
            if self._parquet is None:
                full = [name for name in rows.column_names if is_all and not rows[name].null_count]
                self._parquet = self._begun(group, {*full, *self._never_null})
            self._parquet.write_table(group.cast(self._parquet.schema), row_group_size=step)

    def _begun(self, sample: pa.Table, without_null: Collection[str]) -> pq.ParquetWriter:
        """The writer of the file; columns without nulls are read faster if the file says that they have none."""
        schema = pa.schema([field.with_nullable(field.name not in without_null) for field in sample.schema])
        repetitive = _repetitive(sample)
        return pq.ParquetWriter(
            self._sink,
            schema,
            compression={leaf: _codec(sample, name, leaf in repetitive, self._compression) for name, leaf in _leaves(schema)},
            use_dictionary=repetitive,
            store_schema=False,  # types as Parquet has them, whatever Arrow's are here
        )

    def close(self) -> None:
        """Finish the file."""
        assert self._parquet is not None  # a file is begun for rows that are there
        if self._metadata:
            self._parquet.add_key_value_metadata(self._metadata)
        self._parquet.close()
        self._size = self._sink.tell()
        self._sink.close()

    def discard(self) -> None:
        """Remove what was written."""
        self._sink.close()
        delete_file(self._path)

    def summary(self) -> dict[str, Any]:
        """What the driver is told; see ``SUMMARY``."""
        statistics = self._statistics
        return {
            "path": self._name,
            "bucket": self.bucket,
            "size_bytes": self._size,
            "rows": statistics.rows,
            "stats": json.dumps(statistics.to_json()),
            "dropped": self.dropped,
        }


_SUMMARY_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bucket", pa.int32()),
        ("size_bytes", pa.int64()),
        ("rows", pa.int64()),
        ("stats", pa.string()),
        ("dropped", pa.int64()),
    ]
)


@dataclass
class _Statistics:
    """The statistics of a file as Delta's log has them: rows, bounds, nulls. Bounds may be wider than the values."""

    names: Sequence[str]
    rows: int = 0
    nulls: dict[str, int] = field(default_factory=dict)
    least: dict[str, Any] = field(default_factory=dict)
    greatest: dict[str, Any] = field(default_factory=dict)

    def add(self, rows: pa.Table) -> None:
        """Take these rows in."""
        self.rows += rows.num_rows
        for name in self.names:
            column = rows[name]
            self.nulls[name] = self.nulls.get(name, 0) + column.null_count
            if not _has_bounds(column.type) or column.null_count == len(column):
                continue
            bounds = pc.min_max(column)
            low, high = _plain(bounds["min"]), _plain(bounds["max"])
            self.least[name] = min(self.least.get(name, low), low)
            self.greatest[name] = max(self.greatest.get(name, high), high)
        self.types = {name: rows.schema.field(name).type for name in self.names}

    def to_json(self) -> dict[str, Any]:
        """As Delta's protocol words it."""
        least = {name: _bound(value, self.types[name], up=False) for name, value in self.least.items()}
        greatest = {name: _bound(value, self.types[name], up=True) for name, value in self.greatest.items()}
        return {
            "numRecords": self.rows,
            "minValues": {name: value for name, value in least.items() if value is not None},
            "maxValues": {name: value for name, value in greatest.items() if value is not None},
            "nullCount": self.nulls,
        }


def _has_bounds(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_temporal(type_) or _is_text(type_))


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _bound(value: Any, type_: pa.DataType, *, up: bool) -> Any:
    """A bound as the log has it; long texts are cut, and None where it cannot be told."""
    if not (pa.types.is_temporal(type_) or _is_text(type_)):
        return value
    try:
        if _is_text(type_):
            text = value.decode()
            return None if up and len(text) > _STATS_CHARACTERS else text[:_STATS_CHARACTERS]
        if pa.types.is_date(type_):
            return (_EPOCH + timedelta(days=value)).date().isoformat()
        return (_EPOCH + timedelta(microseconds=value)).isoformat(timespec="microseconds") + "Z"
    except (OverflowError, UnicodeDecodeError):  # Spark's years go further than Python's, and its texts may be any bytes
        return None


def _numbered(columns: Sequence[pa.ChunkedArray]) -> Integers:
    """A number for each row that rises with the columns' values, the first column's before all."""
    numbers, count = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        encoded = column.combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        size = len(encoded.dictionary)
        if size < 2:
            continue
        rank = np.empty(size, np.int64)
        rank[as_integers(pc.sort_indices(encoded.dictionary))] = np.arange(size)
        codes = rank[as_integers(encoded.indices)]
        if count == 1:
            numbers, count = codes, size
        else:
            distinct, numbers = np.unique(numbers * size + codes, return_inverse=True)
            numbers, count = numbers.astype(np.int64, copy=False).reshape(-1), len(distinct)
    return numbers


def _equal_neighbours(order: Integers, *columns: Integers) -> Any:
    """For each row but the last, in this order, whether the next one has equal values."""
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        values = column[order]
        equal &= values[1:] == values[:-1]
    return equal


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """Each column with the path by which Parquet knows its values."""
    for field_ in schema:
        yield field_.name, f"{field_.name}.list.element" if pa.types.is_list(field_.type) else field_.name


def _repetitive(rows: pa.Table) -> list[str]:
    """The columns that a dictionary makes smaller, as paths to their values: texts, and by a sample all others but lists."""
    sample, found = rows.slice(0, _SAMPLE), list[str]()
    for name, leaf in _leaves(rows.schema):
        type_ = rows.schema.field(name).type
        if pa.types.is_list(type_):
            found += [leaf] if _is_text(type_.value_type) else []
        elif not pa.types.is_primitive(type_) or 2 * pc.count_distinct(sample[name]).as_py() < len(sample):
            found.append(leaf)
    return found


def _codec(rows: pa.Table, name: str, is_repetitive: bool, codec: str) -> str:
    """The compression of a column: none for numbers that it does not make smaller, which are read faster so."""
    if is_repetitive or codec == "none" or not pa.types.is_primitive(rows.schema.field(name).type):
        return codec
    values = np.asarray(rows[name].slice(0, _SAMPLE).drop_null().combine_chunks().to_numpy(zero_copy_only=False)).tobytes()
    return codec if len(pa.compress(values, codec=codec, asbytes=True)) < _WORTH_COMPRESSING * len(values) else "none"


def _plain(scalar: pa.Scalar) -> Any:
    """The value; instants and days as numbers and texts as bytes, for Spark's go further than Python's. In the same order."""
    if pa.types.is_temporal(scalar.type):
        return scalar.value
    if _is_text(scalar.type) and scalar.is_valid:
        return scalar.as_buffer().to_pybytes()
    return scalar.as_py()


def _local_folder() -> str | None:
    """One of the folders where Spark keeps what it spills; None: the system's folder for temporary files."""
    folders = [folder for folder in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if os.path.isdir(folder)]
    return folders[os.getpid() % len(folders)] if folders else None

"""What executors run to publish a view: rows that Spark hands over, or a table's data files read in place.

An executor needs no more than this module does: the standard library, pyarrow, numpy and redis. Errors are ours, for the
driver sees only their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from spark_fs.online.codec import HEADER, read_header, redis_key
from spark_fs.online.connect import open_client, redis_errors
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts, Writer, bury_batches
from spark_fs.spec import Column

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows of a data file in memory at a time.
BATCH_ROWS = 64 * 1024
#: How much of a column is read at once where only its first rows are wanted.
_BUFFER_BYTES = 64 * 1024
#: What these functions yield as their one row: sums, and last the least number of replicas, null where it was not asked.
MEASURES = (*COUNTS, "rows_read", "replicas")


@dataclass(frozen=True, slots=True)
class Notes:
    """Where tasks note the buckets of which every row is confirmed: a list in the online store, and the step they belong to.

    A note is JSON: step, bucket, generation of its rows, and ``COUNTS``. It is lost with the rows that it is about.
    """

    name: bytes
    step: str


class _Noting:
    """Notes the buckets of one task; for a ``with`` block. Connects for the first one."""

    def __init__(self, target: OnlineTarget, notes: Notes | None) -> None:
        self._target, self._notes = target, notes
        self._client: Any = None

    def __enter__(self) -> _Noting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._client is not None:
            self._client.close()

    def note(self, bucket: int | None, counts: WriteCounts) -> None:
        """Note a bucket, where there is one and notes are wanted."""
        if self._notes is None or bucket is None:
            return
        if self._client is None:
            self._client = open_client(self._target.url, socket_timeout_seconds=self._target.socket_timeout_seconds)
        what = {"step": self._notes.step, "bucket": bucket, "generation": self._target.generation}
        self._client.lpush(self._notes.name, json.dumps({**what, "counts": {name: getattr(counts, name) for name in COUNTS}}))


def publish_rows(
    batches: Iterator[pa.RecordBatch], target: OnlineTarget, notes: Notes | None = None
) -> Iterator[pa.RecordBatch]:
    """Write rows with ``_key`` (each once) and the target's columns; yields one row of ``MEASURES``. For ``mapInArrow``.

    Buckets are noted where rows have a ``_bucket``, those of one together.
    """
    total = WriteCounts()
    with redis_errors(), Writer(target, distinct=True) as writer, _Noting(target, notes) as noting:
        for bucket, rows in groupby(_by_bucket(batches), itemgetter(0)):
            counts = writer.write(batch for _, batch in rows)
            total += counts
            noting.note(bucket, counts)
        total += writer.await_replicas()
    yield _measures(total, total.rows)


def _by_bucket(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int | None, pa.RecordBatch]]:
    """Each batch in pieces of one bucket; None where there are no buckets."""
    import numpy as np

    for batch in batches:
        if "_bucket" not in batch.schema.names:
            yield None, batch
            continue
        buckets = batch.column("_bucket").to_numpy()
        ends = np.flatnonzero(np.append(buckets[1:] != buckets[:-1], True)) + 1
        for start, end in pairwise([0, *ends.tolist()] if len(buckets) else []):
            yield int(buckets[start]), batch.slice(start, end - start)


def publish_in_place_of_lost(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> Iterator[pa.RecordBatch]:
    """As ``publish_rows``, but only where a row is served whose times are among those in ``_lost``.

    These are structs of ``event_us`` and ``created_us``, as in ``codec.Header``.
    """
    import pyarrow as pa

    def served() -> Iterator[pa.RecordBatch]:
        with open_client(target.url, socket_timeout_seconds=target.socket_timeout_seconds) as client:
            for batch in batches:
                keys = batch.column("_key").to_pylist()
                kept = []
                for key, lost in zip(keys, batch.column("_lost").to_pylist(), strict=True):
                    stored: Any = client.get(redis_key(target.prefix, key))
                    there = read_header(stored) if stored and len(stored) >= HEADER.size else None
                    times = {(each["event_us"], each["created_us"]) for each in lost}
                    kept.append(there is not None and (there.event_us, there.created_us) in times)
                yield batch.filter(pa.array(kept, pa.bool_()))

    yield from publish_rows(served(), target)


def bury_rows(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> Iterator[pa.RecordBatch]:
    """Put tombstones in the place of the rows with these ``_key``; yields one row of ``MEASURES``. For ``mapInArrow``."""
    with redis_errors():
        counts = bury_batches(batches, target)
    yield _measures(counts, counts.rows)


def publish_files(
    batches: Iterator[pa.RecordBatch],
    target: OnlineTarget,
    files: Sequence[tuple[str, int]],
    keys: Sequence[Column],
    start_us: int,
    end_us: int,
    notes: Notes | None = None,
) -> Iterator[pa.RecordBatch]:
    """Write the newest row of each key with an event time in ``[start_us, end_us)`` from the files of the numbers in ``id``.

    ``files`` are all there are, each with its bucket, which is noted. They are Parquet, at URIs or absolute paths. In each the
    rows of a key must stand together, newest last, and no two may share a key (``dispatch.files_in_place``). Memory is bounded
    by ``BATCH_ROWS``. Yields one row of ``MEASURES``.
    """
    read, total = [0], WriteCounts()
    names = [key.name for key in keys]
    with redis_errors(), Writer(target, distinct=True) as writer, _Noting(target, notes) as noting:
        for batch in batches:
            for number in batch.column("id").to_pylist():
                file, bucket = files[number]
                newest = _newest(_rows_within(file, target, keys, start_us, end_us, read), names)
                # Key bytes of the newest rows only: of long histories that is a small part.
                counts = writer.write(_with_key(rows, target, keys) for rows in newest)
                total += counts
                noting.note(bucket, counts)
        total += writer.await_replicas()
    yield _measures(total, read[0])


def _measures(counts: WriteCounts, rows_read: int) -> pa.RecordBatch:
    import pyarrow as pa

    values = {**{name: getattr(counts, name) for name in COUNTS}, "rows_read": rows_read, "replicas": counts.replicas}
    return pa.RecordBatch.from_pylist([values], pa.schema([(name, pa.int64()) for name in MEASURES]))


def _rows_within(
    file: str, target: OnlineTarget, keys: Sequence[Column], start_us: int, end_us: int, read: list[int]
) -> Iterator[pa.RecordBatch]:
    """The file's rows of the interval, in its order, in batches of at least one; adds their number to ``read``."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from spark_fs.files import open_file
    from spark_fs.online.encode import EVENT

    start, end = (pa.scalar(micros, pa.int64()).cast(pa.timestamp("us", tz="UTC")) for micros in (start_us, end_us))
    with open_file(file) as stream:
        parquet = pq.ParquetFile(stream)
        for batch in parquet.iter_batches(BATCH_ROWS, columns=_columns(target, keys)):
            event = batch.column(EVENT)
            within = _filtered(batch, pc.and_(pc.greater_equal(event, start), pc.less(event, end)))
            if within.num_rows:
                read[0] += within.num_rows
                yield within


def first_rows(file: str, target: OnlineTarget, keys: Sequence[Column], most: int) -> pa.RecordBatch | None:
    """The first rows of a data file, at most so many, as ``publish_files`` writes them, of any event time; None without any."""
    import pyarrow.parquet as pq

    from spark_fs.files import open_file

    with open_file(file) as stream:
        # With a buffer pages are read as they are needed, not whole columns.
        parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
        if not parquet.metadata.num_rows:
            return None
        return _with_key(next(parquet.iter_batches(most, columns=_columns(target, keys))), target, keys)


def _columns(target: OnlineTarget, keys: Sequence[Column]) -> list[str]:
    """The columns of a data file that make rows for the target."""
    return [*(key.name for key in keys), *_values(target)]


def _values(target: OnlineTarget) -> list[str]:
    """The columns of a data file that make the stored value."""
    from spark_fs.online.encode import BUILD, CREATED, EVENT

    return [EVENT, CREATED, BUILD, *(feature.name for feature in target.features)]


def _with_key(batch: pa.RecordBatch, target: OnlineTarget, keys: Sequence[Column]) -> pa.RecordBatch:
    """Rows of a data file with ``_key`` in the place of their join keys."""
    import pyarrow as pa

    from spark_fs.key_bytes import key_column
    from spark_fs.online.encode import KEY

    values = _values(target)
    columns = [key_column([batch.column(key.name) for key in keys], batch.num_rows)]
    return pa.RecordBatch.from_arrays([*columns, *(batch.column(name) for name in values)], names=[KEY, *values])


def _newest(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Of rows that follow each other with equal keys (the columns ``names``) only the last, also across batches.

    Keeps one batch back, for the next one may go on with its last key.
    """
    before: pa.RecordBatch | None = None
    for batch in batches:
        if before is not None:
            yield _filtered(before, _ends_run(before, batch, names))
        before = batch
    if before is not None:
        yield _filtered(before, _ends_run(before, None, names))


def _ends_run(batch: pa.RecordBatch, after: pa.RecordBatch | None, names: Sequence[str]) -> pa.BooleanArray:
    """Whether a row's keys are others than those of the next row; the last row's next is the first one of ``after``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ends = pa.repeat(False, batch.num_rows - 1)
    last = after is None
    for name in names:
        column = batch.column(name)
        # A null is like nothing: such a row is let through, to be refused by name.
        ends = pc.or_(ends, pc.not_equal(column.slice(0, len(column) - 1), column.slice(1)).fill_null(True))
        last = last or (after is not None and column[-1] != after.column(name)[0])
    return pa.concat_arrays([ends, pa.array([last], pa.bool_())])


def _filtered(batch: pa.RecordBatch, mask: pa.BooleanArray) -> pa.RecordBatch:
    """The rows where the mask is true; the batch itself, without a copy, where it is so for all."""
    return batch if mask.true_count == len(mask) else batch.filter(mask)

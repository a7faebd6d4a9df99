"""What executors run to publish a view: rows that Spark hands over, or a table's data files read in place.

An executor needs no more than this module does: the standard library, pyarrow, numpy and redis. Errors are ours, for the
driver sees only their text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spark_fs.online.connect import redis_errors
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts, bury_batches, write_batches
from spark_fs.spec import Column

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows of a data file in memory at a time.
BATCH_ROWS = 64 * 1024
#: What these functions yield as their one row: sums, and last the least number of replicas, null where it was not asked.
MEASURES = (*COUNTS, "rows_read", "replicas")


def publish_rows(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> Iterator[pa.RecordBatch]:
    """Write rows with ``_key`` (each once) and the target's columns; yields one row of ``MEASURES``. For ``mapInArrow``."""
    with redis_errors():
        counts = write_batches(batches, target, distinct=True)
    yield _measures(counts, counts.rows)


def bury_rows(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> Iterator[pa.RecordBatch]:
    """Put tombstones in the place of the rows with these ``_key``; yields one row of ``MEASURES``. For ``mapInArrow``."""
    with redis_errors():
        counts = bury_batches(batches, target)
    yield _measures(counts, counts.rows)


def publish_files(
    batches: Iterator[pa.RecordBatch], target: OnlineTarget, keys: Sequence[Column], start_us: int, end_us: int
) -> Iterator[pa.RecordBatch]:
    """Write the newest row of each key with an event time in ``[start_us, end_us)`` from the files named in ``file``.

    The files are Parquet, at URIs or absolute paths. In each the rows of a key must stand together, newest last, and no two
    may share a key (``tables.can_be_read_in_place``). Memory is bounded by ``BATCH_ROWS``. Yields one row of ``MEASURES``.
    """
    read = [0]

    def rows() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for file in batch.column("file").to_pylist():
                yield from _newest(_rows_within(file, target, keys, start_us, end_us, read))

    with redis_errors():
        counts = write_batches(rows(), target, distinct=True)
    yield _measures(counts, read[0])


def _measures(counts: WriteCounts, rows_read: int) -> pa.RecordBatch:
    import pyarrow as pa

    values = {**{name: getattr(counts, name) for name in COUNTS}, "rows_read": rows_read, "replicas": counts.replicas}
    return pa.RecordBatch.from_pylist([values], pa.schema([(name, pa.int64()) for name in MEASURES]))


def _rows_within(
    file: str, target: OnlineTarget, keys: Sequence[Column], start_us: int, end_us: int, read: list[int]
) -> Iterator[pa.RecordBatch]:
    """The file's rows of the interval, in its order, with their key bytes; adds their number to ``read``."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from spark_fs.files import open_file
    from spark_fs.key_bytes import key_column
    from spark_fs.online.encode import BUILD, CREATED, EVENT, KEY

    names = [key.name for key in keys]
    values = [EVENT, CREATED, BUILD, *(feature.name for feature in target.features)]
    start, end = (pa.scalar(micros, pa.int64()).cast(pa.timestamp("us", tz="UTC")) for micros in (start_us, end_us))
    with open_file(file) as stream:
        parquet = pq.ParquetFile(stream)
        for whole in parquet.iter_batches(BATCH_ROWS, columns=[*names, *values]):
            event = whole.column(EVENT)
            batch = whole.filter(pc.and_(pc.greater_equal(event, start), pc.less(event, end)))
            read[0] += batch.num_rows
            columns = [key_column([batch.column(name) for name in names], batch.num_rows)]
            columns += [batch.column(name) for name in values]
            yield pa.RecordBatch.from_arrays(columns, names=[KEY, *values])


def _newest(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Of rows that follow each other with the same ``_key`` only the last, also across batches."""
    import pyarrow.compute as pc

    from spark_fs.online.encode import KEY

    pending: pa.RecordBatch | None = None  # the last row so far: the next batch may go on with its key
    for batch in batches:
        if batch.num_rows == 0:
            continue
        known = batch.column(KEY)
        if pending is not None and pending.column(KEY)[0] != known[0]:
            yield pending
        ends_run = pc.not_equal(known.slice(0, len(known) - 1), known.slice(1))
        yield batch.slice(0, batch.num_rows - 1).filter(ends_run)
        pending = batch.slice(batch.num_rows - 1)
    if pending is not None:
        yield pending

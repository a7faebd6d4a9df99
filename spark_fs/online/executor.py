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
#: What these functions yield as their one row.
MEASURES = (*COUNTS, "rows_read")


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
    batches: Iterator[pa.RecordBatch],
    target: OnlineTarget,
    files: Sequence[str],
    keys: Sequence[Column],
    start_us: int,
    end_us: int,
) -> Iterator[pa.RecordBatch]:
    """Write the newest row of each key with an event time in ``[start_us, end_us)`` from the files of the numbers in ``id``.

    The files are Parquet, at URIs or absolute paths. In each the rows of a key must stand together, newest last, and no two
    may share a key (``materialize.files_in_place``). Memory is bounded by ``BATCH_ROWS``. Yields one row of ``MEASURES``.
    """
    read = [0]

    def rows() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column("id").to_pylist():
                found = _rows_within(files[number], target, keys, start_us, end_us, read)
                # Key bytes of the newest rows only: of long histories that is a small part.
                for newest in _newest(found, [key.name for key in keys]):
                    yield _with_key(newest, target, keys)

    with redis_errors():
        counts = write_batches(rows(), target, distinct=True)
    yield _measures(counts, read[0])


def _measures(counts: WriteCounts, rows_read: int) -> pa.RecordBatch:
    import pyarrow as pa

    values = {name: getattr(counts, name) for name in COUNTS}
    return pa.RecordBatch.from_pylist([{**values, "rows_read": rows_read}])


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
        for batch in parquet.iter_batches(BATCH_ROWS, columns=[*(key.name for key in keys), *_values(target)]):
            event = batch.column(EVENT)
            within = _filtered(batch, pc.and_(pc.greater_equal(event, start), pc.less(event, end)))
            if within.num_rows:
                read[0] += within.num_rows
                yield within


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

    ends = pa.array([False] * (batch.num_rows - 1), pa.bool_())
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


def _with_key(batch: pa.RecordBatch, target: OnlineTarget, keys: Sequence[Column]) -> pa.RecordBatch:
    """Rows of a data file with ``_key`` in the place of their join keys."""
    import pyarrow as pa

    from spark_fs.key_bytes import key_column
    from spark_fs.online.encode import KEY

    values = _values(target)
    columns = [key_column([batch.column(key.name) for key in keys], batch.num_rows)]
    return pa.RecordBatch.from_arrays([*columns, *(batch.column(name) for name in values)], names=[KEY, *values])


def _values(target: OnlineTarget) -> list[str]:
    """The columns of a data file that make the stored value."""
    from spark_fs.online.encode import BUILD, CREATED, EVENT

    return [EVENT, CREATED, BUILD, *(feature.name for feature in target.features)]

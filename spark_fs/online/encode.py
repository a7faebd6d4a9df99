"""Arrow batches → stored values, column by column; no Python loop over rows. The layout is described in ``codec``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.online.codec import SIGN_BIT, bitmap_bytes, key_digest, schema_id
from spark_fs.spec import Column
from spark_fs.types import ValueType

KEY, EVENT, CREATED, BUILD = "_key", "event_timestamp", "created_timestamp", "_build"

_BINARY = pa.large_binary()
_INSTANT = pa.timestamp("us", tz="UTC")
Bytes8 = npt.NDArray[np.uint8]


def slices(batch: pa.RecordBatch, size_bytes: int) -> Iterator[pa.RecordBatch]:
    """The batch in pieces of about so many bytes, at least one row each."""
    rows = max(1, size_bytes * batch.num_rows // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def gathered(batches: Iterator[pa.RecordBatch], size_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least so many bytes, but for the last one."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.nbytes for part in waiting) >= size_bytes:
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
    if waiting:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()


def without(batch: pa.RecordBatch, erased: frozenset[bytes], prefix: bytes) -> pa.RecordBatch:
    """The batch without the rows whose key has one of these digests (``codec.key_digest`` with this prefix)."""
    if not erased:
        return batch
    kept = [key is None or key_digest(prefix, key) not in erased for key in batch.column(KEY).to_pylist()]
    return batch.filter(pa.array(kept, pa.bool_()))


def encode_keys(batch: pa.RecordBatch) -> pa.LargeBinaryArray:
    """The column ``_key`` (key bytes). Raises SFS-609 where one is null."""
    keys = batch.column(KEY).cast(_BINARY)
    if keys.null_count:
        raise _unfit(f"{keys.null_count} of {len(keys)} rows have a null join key.", "leave out rows with null join keys")
    return keys


def encode_values(batch: pa.RecordBatch, features: Sequence[Column], generation: int) -> pa.LargeBinaryArray:
    """One stored value per row.

    The batch has ``event_timestamp`` (not null), ``created_timestamp``, ``_build`` (0 ≤ build < 2**32) and the
    features by name, each castable to its type without loss. Raises SFS-609 for a missing column, a null event time,
    a lossy value or an embedding of another length.
    """
    require_columns(batch, features)
    columns = [_typed(batch.column(feature.name), feature) for feature in features]
    payloads = [
        _payload(column, feature.type) for column, feature in zip(columns, features, strict=True) if feature.type.width is None
    ]
    variable = len(payloads)
    layout = np.dtype(
        [("generation", ">u4"), ("event", ">u8"), ("created", ">u8"), ("build", ">u4"), ("schema", ">u4")]
        + [("nulls", "u1", (bitmap_bytes(len(features)),))]
        + [(f"fixed{i}", feature.type.numpy) for i, feature in enumerate(features) if feature.type.width is not None]
        + [("ends", "<u4", (variable,))]
    )
    rows = np.zeros(batch.num_rows, layout)
    _fill_header(rows, batch, generation, schema_id(features))
    if any(column.null_count for column in columns):
        nulls = np.column_stack([_is_null(column) for column in columns])
        rows["nulls"] = np.packbits(nulls, axis=1, bitorder="little")
    for i, (column, feature) in enumerate(zip(columns, features, strict=True)):
        if feature.type.width is not None:
            rows[f"fixed{i}"] = _fixed(column, feature.type)
    if variable:
        ends = np.cumsum(np.column_stack([_lengths(payload) for payload in payloads]), axis=1)
        if len(ends) and ends[:, -1].max() >= 1 << 32:
            raise _unfit("A row takes more than 4 GB.", "store a reference in place of the value")
        rows["ends"] = ends
    return join(equal_segments(rows.view(np.uint8), layout.itemsize, len(rows)), *payloads)


def require_columns(batch: pa.RecordBatch, features: Sequence[Column]) -> None:
    """Raises SFS-609 naming each column the writer needs and the batch lacks."""
    known = batch.schema.names
    wanted = [KEY, EVENT, CREATED, BUILD, *(feature.name for feature in features)]
    problems = [
        Problem("SFS-609", f"The rows to write have no column '{name}'.", did_you_mean(name, known))
        for name in wanted
        if name not in known
    ]
    if problems:
        raise InvalidError(*problems)


# ---- segments: an Arrow binary column is a list of byte strings, one per row; joining them makes the rows


def join(*segments: pa.LargeBinaryArray | pa.Scalar) -> pa.LargeBinaryArray:
    """Each row's segments one after the other; a scalar is the same for all rows. Runs inside Arrow, one copy."""
    if len(segments) == 1:
        return segments[0]
    return pc.binary_join_element_wise(*segments, pa.scalar(b"", _BINARY))


def bulk_strings(column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Each row as a bulk string of Redis's protocol: a line ``$<length>``, the bytes, a line end."""
    lengths = pc.binary_length(column).cast(pa.large_string()).cast(_BINARY)
    end = literal(b"\r\n")
    return join(literal(b"$"), lengths, end, column, end)


def row_bytes(segments: pa.LargeBinaryArray) -> bytes:
    """All rows' bytes, one after the other."""
    cuts = offsets(segments)
    return bytes(memoryview(data(segments))[cuts[0] : cuts[-1]])


def literal(value: bytes) -> pa.Scalar:
    """A segment that is the same in every row."""
    return pa.scalar(value, _BINARY)


def equal_segments(data: Bytes8, width: int, rows: int) -> pa.LargeBinaryArray:
    """Consecutive bytes cut into one segment of ``width`` bytes per row."""
    return _segments(data, np.arange(rows + 1, dtype=np.int64) * width)


def offsets(segments: pa.LargeBinaryArray) -> npt.NDArray[np.int64]:
    """Where each row's bytes start within ``data(segments)``, and at last where they end."""
    cut = np.frombuffer(segments.buffers()[1], np.int64)
    return cut[segments.offset : segments.offset + len(segments) + 1]


def data(segments: pa.LargeBinaryArray) -> pa.Buffer:
    """The buffer that holds the rows' bytes."""
    return segments.buffers()[2] or pa.py_buffer(b"")


def _segments(flat: Bytes8, cuts: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    buffers = [
        None,
        pa.py_buffer(np.ascontiguousarray(cuts, np.int64)),
        pa.py_buffer(np.ascontiguousarray(flat).reshape(-1)),
    ]
    return pa.LargeBinaryArray.from_buffers(_BINARY, len(cuts) - 1, buffers)


def _lengths(segments: pa.LargeBinaryArray) -> npt.NDArray[np.int64]:
    return np.diff(offsets(segments))


def _cuts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


# ---- columns


def _typed(column: pa.Array, feature: Column) -> pa.Array:
    try:
        typed = column.cast(feature.type.arrow())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _unfit(f"The feature '{feature.name}' is not {feature.type}: {error}", "change the type in the schema") from error
    if feature.type.length is not None:
        lengths = pc.list_value_length(typed).drop_null()
        if pc.any(pc.not_equal(lengths, feature.type.length)).as_py():
            found = ", ".join(str(length) for length in pc.unique(lengths).to_pylist()[:5])
            raise _unfit(
                f"The feature '{feature.name}' is {feature.type} and has vectors of length {found}.", "mend the source"
            )
    return typed


def _fill_header(rows: npt.NDArray[Any], batch: pa.RecordBatch, generation: int, schema: int) -> None:
    event, created = batch.column(EVENT).cast(_INSTANT), batch.column(CREATED).cast(_INSTANT)
    if event.null_count:
        raise _unfit(f"{event.null_count} of {len(event)} rows have no event time.", "leave out rows without event time")
    rows["generation"], rows["schema"] = generation, schema
    rows["event"] = _micros(event) ^ np.uint64(SIGN_BIT)
    rows["created"] = _micros(created) ^ np.uint64(SIGN_BIT)
    if created.null_count:
        rows["created"][_is_null(created)] = 0
    rows["build"] = batch.column(BUILD).cast(pa.uint32()).to_numpy(zero_copy_only=False)


def _micros(column: pa.Array) -> npt.NDArray[np.uint64]:
    return np.asarray(_raw(column, np.dtype("<i8")).view(np.uint64))


def _is_null(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False))


def _raw(column: pa.Array, cell: np.dtype[Any]) -> npt.NDArray[Any]:
    """The bytes of a fixed-width column as they lie in memory; anything where null."""
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.zeros(len(column), cell)
    return np.frombuffer(buffer, cell, len(column), column.offset * cell.itemsize)


def _fixed(column: pa.Array, kind: ValueType) -> npt.NDArray[Any]:
    """The values of a fixed-width column in its online layout; zero where null."""
    if kind.kind == "bool":
        column = column.cast(pa.uint8())  # Arrow keeps a bool in a bit
    values = _raw(column, np.dtype(kind.numpy))
    if column.null_count:
        values = values.copy()
        values[_is_null(column)] = np.zeros((), values.dtype)
    return values


def _payload(column: pa.Array, kind: ValueType) -> pa.LargeBinaryArray:
    """The bytes of a variable-width column, one segment a row; empty where null."""
    if kind.element is None:
        return column.cast(_BINARY).fill_null(b"")
    return _arrays(column, kind.element)


def _arrays(column: pa.ListArray, element: ValueType) -> pa.LargeBinaryArray:
    counts = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    cuts = _cuts(counts)
    items = column.flatten()
    head = equal_segments(counts.astype("<u4").view(np.uint8), 4, len(counts))
    nulls = _element_bitmaps(items, counts, cuts)
    if element.width is not None:
        body = [_segments(_fixed(items, element).view(np.uint8), cuts * element.width)]
    else:
        texts = items.cast(_BINARY).fill_null(b"")
        ends = _cuts(_lengths(texts))
        starts = ends[cuts]
        within = ends[1:] - np.repeat(starts[:-1], counts)
        flat = np.frombuffer(data(texts), np.uint8)[offsets(texts)[0] :]
        body = [_segments(within.astype("<u4").view(np.uint8), cuts * 4), _segments(flat, starts)]
    whole = join(head, nulls, *body)
    return pc.if_else(column.is_valid(), whole, literal(b"")) if column.null_count else whole


def _element_bitmaps(items: pa.Array, counts: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    starts = _cuts((counts + 7) // 8)
    bits = np.zeros(8 * int(starts[-1]), np.bool_)
    if items.null_count:
        places = np.arange(len(items)) + np.repeat(8 * starts[:-1] - cuts[:-1], counts)
        bits[places] = _is_null(items)
    return _segments(np.packbits(bits, bitorder="little"), starts)


def _unfit(what: str, fix: str) -> InvalidError:
    return InvalidError(Problem("SFS-609", what, fix=fix))

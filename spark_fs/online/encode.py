"""Arrow batches → stored values, column by column; no Python loop over rows. The layout is described in ``codec``."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.online.codec import ONLINE_SLOTS, SIGN_BIT, bitmap_bytes, schema_id, shown_key
from spark_fs.spec import Column
from spark_fs.types import ValueType

KEY, EVENT, CREATED, BUILD, TAG = "_key", "event_timestamp", "created_timestamp", "_build", "_tag"

_BINARY = pa.large_binary()
_INSTANT = pa.timestamp("us", tz="UTC")
Bytes8 = npt.NDArray[np.uint8]


def slices(batch: pa.RecordBatch, size_bytes: int) -> Iterator[pa.RecordBatch]:
    """The batch in pieces of at most about so many bytes, all of as many rows, at least one row each."""
    rows = max(1, -(-batch.num_rows // max(1, -(-batch.nbytes // size_bytes))))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def by_tag(batches: Iterator[pa.RecordBatch], size_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same rows, with their tag as ``_tag`` and sorted by it: as many batches together as have at most so many bytes.

    So the rows of a tag stand together in runs, the longer the more rows are sorted at once.
    """
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        if waiting and sum(part.nbytes for part in waiting) + batch.nbytes > size_bytes:
            yield from _sorted_by_tag(waiting)
        waiting.append(batch)
    yield from _sorted_by_tag(waiting)


def _sorted_by_tag(waiting: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """One batch of those that wait, as a rule; takes them out of the list, so that they are in memory but once."""
    if not waiting:
        return
    table = pa.Table.from_batches(waiting).combine_chunks()
    waiting.clear()
    tags = key_tags(encode_keys(table))
    order = np.argsort(tags, kind="stable")  # of 16 bits: by radix
    yield from table.append_column(TAG, pa.array(tags)).take(pa.array(order)).to_batches()


def key_tags(keys: pa.Array) -> npt.NDArray[np.uint16]:
    """The tags of key bytes, as ``codec.redis_key`` has them."""
    # One C call per key, 0.07 µs: cheaper than a table-driven CRC in numpy, whose cost grows with each byte of the
    # longest key.
    return (np.fromiter(map(zlib.crc32, keys.to_pylist()), np.uint32, len(keys)) % ONLINE_SLOTS).astype(np.uint16)


def encode_keys(batch: pa.RecordBatch) -> pa.LargeBinaryArray:
    """The column ``_key`` (key bytes). Raises SFS-609 where one is null."""
    keys = batch.column(KEY).cast(_BINARY)
    if keys.null_count:
        # Nothing is left of the key: of several parts those that are there are not in the batch either.
        first = int(_is_null(keys).argmax())
        at = f" The first has the event time {batch.column(EVENT)[first].as_py()}." if EVENT in batch.schema.names else ""
        raise _unfit(f"{keys.null_count} of {len(keys)} rows have a null join key.{at}", "leave out rows with null join keys")
    return keys


def encode_values(batch: pa.RecordBatch, features: Sequence[Column], generation: int) -> pa.LargeBinaryArray:
    """One stored value per row.

    The batch has ``event_timestamp`` (not null), ``created_timestamp``, ``_build`` (0 ≤ build < 2**32) and the
    features by name, each castable to its type without loss. Raises SFS-609 for a missing column, a null event time,
    a lossy value or an embedding of another length; it names the entity of the first such row, and how many rows are so.
    """
    require_columns(batch, features)
    columns = [_typed(batch, feature) for feature in features]
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
        _refuse(batch, ends[:, -1] >= 1 << 32, "A row takes more than 4 GB.", "store a reference in place of the value")
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


def _typed(batch: pa.RecordBatch, feature: Column) -> pa.Array:
    what = f"The feature '{feature.name}' is not {feature.type}"
    typed = _cast(batch, feature.name, feature.type.arrow(), what, "change the type in the schema, or mend the source")
    if feature.type.length is not None:
        lengths = pc.list_value_length(typed).fill_null(feature.type.length).to_numpy()
        wrong = lengths != feature.type.length
        if wrong.any():
            found = ", ".join(str(length) for length in np.unique(lengths[wrong])[:5])
            what = f"The feature '{feature.name}' is {feature.type} and has vectors of length {found}."
            _refuse(batch, wrong, what, "mend the source")
    return typed


def _fill_header(rows: npt.NDArray[Any], batch: pa.RecordBatch, generation: int, schema: int) -> None:
    event, created = (
        _cast(batch, name, _INSTANT, f"The {what} time is no instant in microseconds", "mend the source")
        for name, what in ((EVENT, "event"), (CREATED, "created"))
    )
    build = _cast(batch, BUILD, pa.uint32(), "The number of the build is not from 0 to 4,294,967,295", "build again")
    _refuse(batch, _is_null(event), "A row has no event time.", "leave out rows without event time")
    _refuse(batch, _is_null(build), "A row has no build.", "build again")
    rows["generation"], rows["schema"] = generation, schema
    rows["event"] = _micros(event) ^ np.uint64(SIGN_BIT)
    rows["created"] = _micros(created) ^ np.uint64(SIGN_BIT)
    if created.null_count:
        rows["created"][_is_null(created)] = 0
    rows["build"] = build.to_numpy(zero_copy_only=False)


# ---- what does not fit: which rows are so is looked for only once some are known to be


def _cast(batch: pa.RecordBatch, name: str, kind: pa.DataType, what: str, fix: str) -> pa.Array:
    """A column in another type, without loss."""
    column = batch.column(name)
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = " ".join(str(error).split())  # on one line: of a worker's error the driver shows no more
        _refuse(batch, _lossy(column, kind), f"{what}: {reason}.", fix, error)
        raise _unfit(f"{what}: {reason}.", fix) from error


def _lossy(column: pa.Array, kind: pa.DataType) -> npt.NDArray[np.bool_]:
    """Which values cannot be cast; none where no value can, for the types do not go together.

    The column is halved again and again, and a half that can be cast is done with.
    """
    lossy = np.zeros(len(column), np.bool_)
    try:
        column.slice(0, 0).cast(kind)
    except pa.ArrowNotImplementedError:
        return lossy
    todo = [(0, len(column))]
    while todo:
        start, stop = todo.pop()
        try:
            column.slice(start, stop - start).cast(kind)
        except pa.ArrowInvalid:
            middle = (start + stop) // 2
            if middle == start:
                lossy[start] = True
            else:
                todo += [(start, middle), (middle, stop)]
    return lossy


def _refuse(
    batch: pa.RecordBatch, wrong: npt.NDArray[np.bool_], what: str, fix: str, cause: BaseException | None = None
) -> None:
    """Raises SFS-609 where there are wrong rows: what is wrong, how many there are, and the entity of the first."""
    if wrong.any():
        key = batch.column(KEY)[int(wrong.argmax())].as_py()
        entity = "an entity with a null join key" if key is None else f"entity {shown_key(key)}"
        raise _unfit(what, fix, f"{wrong.sum():,} of {len(wrong):,} rows here are so, the first of {entity}.") from cause


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


def _unfit(what: str, fix: str, why: str = "") -> InvalidError:
    return InvalidError(Problem("SFS-609", what, why, fix=fix))

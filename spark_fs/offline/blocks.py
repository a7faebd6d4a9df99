"""Rows of a feature file as runs of equal keys, to be searched in: numbering keys, finding runs, bisecting times.

Arrow and numpy, no Spark and no files; all rows at once, never one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Integers = NDArray[np.int64]

#: Stands for a null created time, which sorts before all others.
NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of one file, in runs of equal keys; each run is sorted by (event, created).

    ``first`` and ``end`` bound the run of each key number (equal: none). ``visible``: the time from which a row counts, rising
    in each run. ``winner``: the greatest row of the run among those up to a place of ``visible``; None: that place itself.
    ``rows``: the place in the file of each row; None: ``offset`` on. ``created`` has null as the least number.
    """

    first: Integers
    end: Integers
    visible: Integers
    event: Integers
    created: Integers | None
    winner: Integers | None
    rows: Integers | None
    offset: int

    def winner_before(self, after: Integers) -> Integers:
        """The winning row for searches that ended just before ``after``."""
        return after - 1 if self.winner is None else self.winner[after - 1]

    def row_in_file(self, position: Integers) -> Integers:
        """The places of these rows in their file."""
        return position + self.offset if self.rows is None else self.rows[position]


class SpineKeys:
    """The distinct keys of spine rows, numbered; several key columns are put together column by column, exactly.

    ``numbers`` has each spine row's, -1 where a key is null.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray], rows: int) -> None:
        self._stages: list[tuple[Dictionary, Integers | None]] = []
        self.numbers = np.zeros(rows, np.int64)
        self.count = 1
        for position, column in enumerate(columns):
            dictionary = Dictionary(column)
            distinct = None
            if position == 0:
                self.numbers, self.count = dictionary.own_codes, dictionary.size
            else:
                combined = _combined(self.numbers, dictionary.own_codes, dictionary.size)
                distinct, inverse = np.unique(combined, return_inverse=True)
                missing = int(len(distinct) > 0 and distinct[0] < 0)
                self.numbers, distinct = inverse.astype(np.int64).reshape(-1) - missing, distinct[missing:]
                self.count = len(distinct)
            self._stages.append((dictionary, distinct))

    def look_up(self, columns: Sequence[pa.Array]) -> Integers:
        """The number of each key; -1 for keys that no spine row has."""
        numbers = np.zeros(len(columns[0]), np.int64)
        for (dictionary, distinct), column in zip(self._stages, columns, strict=True):
            codes = dictionary.codes(column)
            numbers = codes if distinct is None else _position(distinct, _combined(numbers, codes, dictionary.size))
        return numbers


class Dictionary:
    """The distinct values of one key column of the spine, and the code of any value among them.

    ``own_codes`` has the code of each of the column's values, -1 for null.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = (
            column.combine_chunks().dictionary_encode() if column.num_chunks else pa.array([], column.type).dictionary_encode()
        )
        values, codes = encoded.dictionary, as_integers(encoded.indices)
        self.size = max(len(values), 1)
        self._values, self._integers = values, None
        if is_integral(column.type):
            integers = as_integers(values)
            order = np.argsort(integers)
            rank = np.empty(len(order), np.int64)
            rank[order] = np.arange(len(order))
            self._integers = integers[order]
            codes = rank.take(codes, mode="clip") if len(order) else codes
        self.own_codes = codes if encoded.null_count == 0 else np.where(valid_mask(encoded), codes, -1)

    def codes(self, column: pa.Array | pa.ChunkedArray) -> Integers:
        """The code of each value; -1 for null and for values that the dictionary does not have."""
        if isinstance(column, pa.DictionaryArray):
            return self.codes(column.dictionary)[as_integers(column.indices)]
        if self._integers is None:
            found = pc.index_in(column.cast(self._values.type), value_set=self._values)
            return as_integers(found.fill_null(-1))
        codes = _position(self._integers, as_integers(column))
        return codes if column.null_count == 0 else np.where(valid_mask(column), codes, -1)


class TiesError(Exception):
    """Rows of one key have one event time: which of them is the newest is told by their created times, which were not read."""


def make_block(
    keys: SpineKeys,
    key_columns: Sequence[pa.Array],
    event: pa.Array,
    created: pa.Array | None,
    offset: int,
    *,
    known_at: bool,
    ties: bool,
) -> Block:
    """A block of the rows from ``offset`` on in their file; rows that nothing can match are left out of its runs.

    Those are rows whose keys the spine does not have, without event time, or with ``known_at`` without created time. Raises
    TiesError where rows of one key and event time are there, unless ``ties`` says that nothing more tells them apart.
    """
    numbers, starts, ends = _runs(keys, key_columns, len(event))
    events = as_integers(event)
    created_times = None if created is None else np.where(valid_mask(created), as_integers(created), NEVER)
    usable = valid_mask(event)
    if known_at and created is not None:
        usable = usable & valid_mask(created)
    falls = _falls(events, created_times)
    falls[starts[1:] - 1] = False  # from one run to the next
    kept = numbers >= 0
    if not kept.all():
        numbers, starts, ends = numbers[kept], starts[kept], ends[kept]
        if falls.any():  # what stands in runs of other keys does not matter
            falls &= _inside(starts, ends, len(events))[:-1]
    rows: Integers | None = None
    if not usable.all() or falls.any() or _has_two_runs(numbers, keys.count):
        rows, numbers, starts, ends = _sorted_rows(numbers, starts, ends, usable, events, created_times)
        events = events[rows]
        created_times = None if created_times is None else created_times[rows]
        if not ties and created_times is None:
            equal = events[1:] == events[:-1]
            equal[starts[1:] - 1] = False
            if equal.any():
                raise TiesError
    first, end = np.zeros(keys.count, np.int64), np.zeros(keys.count, np.int64)
    first[numbers], end[numbers] = starts, ends
    visible, winner = events, None
    if known_at and created_times is not None:
        visible, winner = _by_visibility(np.maximum(events, created_times), starts, ends)
    return Block(first, end, visible, events, created_times, winner, None if rows is None else rows + offset, offset)


def _runs(keys: SpineKeys, columns: Sequence[pa.Array], rows: int) -> tuple[Integers, Integers, Integers]:
    """The runs of equal keys: the key number of each (-1: not in the spine), its first row, and the row after its last."""
    changes = np.zeros(rows, bool)
    changes[:1] = True
    for column in columns:
        codes = as_integers(column.indices) if isinstance(column, pa.DictionaryArray) else None
        values = codes if codes is not None else as_integers(column)
        changes[1:] |= values[1:] != values[:-1]
        if column.null_count:
            present = valid_mask(column)
            changes[1:] |= present[1:] != present[:-1]
    starts = np.flatnonzero(changes)
    ends = np.append(starts[1:], rows)
    if not columns:
        return np.zeros(len(starts), np.int64), starts, ends
    heads = pa.array(starts)
    return keys.look_up([column.take(heads) for column in columns]), starts, ends


def _falls(events: Integers, created: Integers | None) -> NDArray[np.bool_]:
    """For each row but the first whether it does not stand after one with a smaller (event, created)."""
    if created is None:
        equal_or_less: NDArray[np.bool_] = events[1:] <= events[:-1]
        return equal_or_less
    falls: NDArray[np.bool_] = events[1:] < events[:-1]
    falls |= (events[1:] == events[:-1]) & (created[1:] < created[:-1])
    return falls


def _has_two_runs(numbers: Integers, count: int) -> bool:
    """Whether a key has more than one run."""
    return len(numbers) > 1 and int(np.bincount(numbers, minlength=count).max()) > 1


def _inside(starts: Integers, ends: Integers, rows: int) -> NDArray[np.bool_]:
    """For each row whether the next one stands in the same of these runs."""
    inside = np.zeros(rows + 1, np.int8)
    inside[starts] += 1
    inside[ends - 1] -= 1
    within: NDArray[np.bool_] = np.cumsum(inside, dtype=np.int8)[:-1] > 0
    return within


def _sorted_rows(
    numbers: Integers, starts: Integers, ends: Integers, usable: NDArray[np.bool_], events: Integers, created: Integers | None
) -> tuple[Integers, Integers, Integers, Integers]:
    """The rows of these runs in order of (key, event, created), and the runs which they then make."""
    lengths = ends - starts
    rows = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
    key = np.repeat(numbers, lengths)
    rows, key = rows[usable[rows]], key[usable[rows]]
    ties = () if created is None else (created[rows],)
    order = np.lexsort((*ties, events[rows], key))
    rows, key = rows[order], key[order]
    distinct, first = np.unique(key, return_index=True)
    return rows, distinct, first, np.append(first[1:], len(rows))


def _by_visibility(visible: Integers, starts: Integers, ends: Integers) -> tuple[Integers, Integers]:
    """The times from which rows are visible, sorted in each run, and for each place the greatest row up to there.

    Rows stand by (event, created) in their run, so the greatest is the one that stands last.
    """
    run = np.zeros(len(visible) + 1, np.int64)
    run[starts] += 1
    run[ends] += 1
    order = np.lexsort((visible, np.cumsum(run)[:-1]))
    return visible[order], np.maximum.accumulate(order)


def parts(batches: Iterable[pa.RecordBatch], part_bytes: int) -> Iterator[tuple[pa.Table, bool]]:
    """The rows in tables of about so many bytes, and whether a table is full; only the last one may not be."""
    gathered, size = list[pa.RecordBatch](), 0
    for batch in batches:
        if batch.num_rows:
            gathered.append(batch)
            size += batch.nbytes
            del batch
        if size >= part_bytes:
            yield _drained(gathered), True
            size = 0
    if gathered:
        yield _drained(gathered), False


def _drained(batches: list[pa.RecordBatch]) -> pa.Table:
    """The batches as a table, which alone holds them then."""
    table = pa.Table.from_batches(batches)
    batches.clear()
    return table


def bisect_right(values: Integers, wanted: Integers, low: Integers, high: Integers) -> Integers:
    """For each wanted value the first place in ``values[low:high]``, which rise, with a greater one, else ``high``."""
    after: Integers = low.copy()
    for bit in reversed(range(int((high - low).max()).bit_length())):
        # One step is tried at a time, from the largest on: all rows of the step are behind it if its last one is.
        step = after + (1 << bit)
        taken = (values.take(step - 1, mode="clip") <= wanted) & (step <= high)
        np.copyto(after, step, where=taken)
    return after


def in_order(numbers: Integers, times: Integers) -> Integers:
    """The rows' places by number, then by time."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    first = int(times.min())
    span = int(times.max()) - first + 1
    if (int(numbers.max()) + 2) * span < 2**63:
        order: Integers = np.argsort(numbers * span + (times - first))  # one number sorts faster than two
        return order
    by_both: Integers = np.lexsort((times, numbers))
    return by_both


def _combined(numbers: Integers, codes: Integers, size: int) -> Integers:
    """Two numbers as one, -1 where either is missing. Both are below the spine part's rows: far from overflow."""
    return np.where((numbers >= 0) & (codes >= 0), numbers * size + codes, -1)


def _position(distinct: Integers, values: Integers) -> Integers:
    """The place of each value among the distinct, rising ones; -1 where it is not there."""
    if not len(distinct):
        return np.full(len(values), -1, np.int64)
    place = np.searchsorted(distinct, values)
    return np.where(distinct.take(place, mode="clip") == values, place, -1)


def is_integral(type_: pa.DataType) -> bool:
    """Whether values of this type are compared as integers."""
    return bool(pa.types.is_integer(type_) or pa.types.is_temporal(type_) or pa.types.is_boolean(type_))


def as_integers(array: pa.Array | pa.ChunkedArray) -> Integers:
    """Integers, instants in microseconds, days and booleans as int64; null as an arbitrary number."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_timestamp(array.type):
        array = array.cast(pa.timestamp("us", array.type.tz)).view(pa.int64())
    elif pa.types.is_date32(array.type):
        array = array.view(pa.int32())
    elif pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    filled = array.fill_null(0) if array.null_count else array
    numbers: Integers = filled.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return numbers


def valid_mask(array: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """True where there is a value."""
    if array.null_count == 0:
        return np.ones(len(array), bool)
    present: NDArray[np.bool_] = np.asarray(array.is_valid())
    return present

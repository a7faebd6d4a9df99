"""The as-of join where feature tables lie: what runs in Spark's Python workers. Arrow and numpy, no Spark.

A task receives spine rows of some residues (key checksum modulo a power of two) and reads the feature files of exactly
those buckets, which hold all rows of the same keys. Feature rows never move. The method, for one residue and one view:

1. Number the spine's distinct keys. Equality is exact: integers by value, all else by Arrow's typed look-up.
2. Read keys and times of each file in blocks of rows. Equal keys stand together, so a block is a few runs; runs of keys that
   the spine does not have are skipped. A block that is not sorted is sorted.
3. Search each spine row's time in the run of its key, all rows at once, by bisection. Keep the greatest (event, created)
   found so far over all blocks and files; ttl is judged at the end.
4. Read the asked columns of the row groups that have winners, block by block, and take the winners' values.

Memory: at most one part of spine rows (``Limits.part_bytes``), its output, and one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spark_fs.errors import InvalidError
from spark_fs.files import open_file
from spark_fs.offline.blocks import (
    NEVER,
    Block,
    Integers,
    SpineKeys,
    TiesError,
    as_integers,
    bisect_right,
    in_order,
    is_integral,
    make_block,
    parts,
    valid_mask,
)
from spark_fs.offline.layout import DataFile

#: Residue of spine rows with a null key: no bucket holds them.
NO_RESIDUE = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a worker's memory, in bytes of Arrow data.

    ``part_bytes``: spine rows joined at a time. ``block_bytes``: one block of feature rows, as the Parquet footer tells its
    size. ``output_bytes``: result rows built at a time. The worker takes about 250 MB + 3 × (the three together).
    """

    part_bytes: int = 64 << 20
    block_bytes: int = 32 << 20
    output_bytes: int = 64 << 20
    max_block_rows: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Scan:
    """One view's feature files and what is wanted of them.

    ``keys`` pairs (spine column, file column); ``features`` pairs (file column, Arrow type). ``files`` has the files of each of
    the ``buckets`` (a power of two), pruned; ``ttl_micros`` None: no lower bound.
    """

    keys: tuple[tuple[str, str], ...]
    event: str
    created: str | None
    features: tuple[tuple[str, pa.DataType], ...]
    ttl_micros: int | None
    buckets: int
    files: Mapping[int, tuple[DataFile, ...]]

    def files_of(self, residue: int, modulus: int) -> list[DataFile]:
        """The files that can hold rows of keys with this residue, those with the newest rows first."""
        if not self.keys:  # all rows lie together, wherever that is
            residue, modulus = 0, 1
        buckets = [residue % self.buckets] if self.buckets <= modulus else range(residue, self.buckets, modulus)
        found = [file for bucket in buckets for file in self.files.get(bucket, ())]
        return sorted(found, key=lambda file: (file.last is None, file.last or 0), reverse=True)


@dataclass(frozen=True)
class PartitionJoin:
    """The function that ``mapInArrow`` calls for each partition of the spine; plain data, so that it can be sent.

    Gives the batches' columns without ``residue``, then the features of all scans, named ``names``.
    """

    scans: tuple[Scan, ...]
    names: tuple[str, ...]
    time: str
    residue: str
    modulus: int
    known_at: bool
    limits: Limits = Limits()

    @property
    def _keys(self) -> tuple[str, ...]:
        """The spine's key columns."""
        return next((tuple(name for name, _ in scan.keys) for scan in self.scans if scan.keys), ())

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Spine batches → joined batches, one row per spine row, in no particular order."""
        tied: set[int] = set()
        for part, _ in parts(batches, self.limits.part_bytes):
            residues = as_integers(part[self.residue])
            rows = part.drop_columns([self.residue])
            if residues.min() == residues.max():
                yield from self._join(int(residues[0]), rows, tied)
                continue
            for residue in np.unique(residues):
                yield from self._join(int(residue), rows.take(pa.array(np.flatnonzero(residues == residue))), tied)

    def _join(self, residue: int, spine: pa.Table, tied: set[int]) -> Iterator[pa.RecordBatch]:
        # The views of a group have the same keys, or none.
        keyed, keyless = SpineKeys([spine[name] for name in self._keys], spine.num_rows), SpineKeys([], spine.num_rows)
        # By key and time, as feature rows mostly lie: what is looked up then stands close together.
        order = in_order(keyed.numbers, as_integers(spine[self.time]))
        spine, keyed.numbers = spine.take(pa.array(order)), keyed.numbers[order]
        matches = [
            self._match(number, residue, spine, keyed if scan.keys else keyless, tied) for number, scan in enumerate(self.scans)
        ]
        portions = _portions(matches, spine.num_rows, self.limits.output_bytes)
        while portions:
            rows = portions.pop()
            try:
                values = [column for match in matches for column in match.values(rows, self.limits)]
            except _TooLargeError:  # a footer tells nothing of how often a long text of its dictionary is used
                portions += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
                continue
            own = spine if len(rows) == spine.num_rows else spine.take(pa.array(rows))
            table = pa.table([*own.columns, *values], names=[*spine.column_names, *self.names])
            yield from _batches(table, self.limits.output_bytes)

    def _match(self, number: int, residue: int, spine: pa.Table, keys: SpineKeys, tied: set[int]) -> Match:
        """The winners of a scan, by its number. Created times are read only for scans in ``tied``, to which it may be added."""
        scan, times = self.scans[number], spine[self.time]
        match = Match(scan, spine.num_rows)
        if (residue == NO_RESIDUE and scan.keys) or times.null_count == len(times):
            return match
        numbers = keys.numbers if times.null_count == 0 else np.where(valid_mask(times), keys.numbers, -1)
        rows = np.flatnonzero(numbers >= 0)
        if not len(rows):
            return match
        search = Search(rows, numbers[rows], as_integers(times)[rows], match)
        with_created = self.known_at or number in tied
        try:
            for file in scan.files_of(residue, self.modulus):
                search.look_through(file, keys, self.limits, known_at=self.known_at, with_created=with_created)
        except TiesError:  # rare: once more, and from now on, with created times
            tied.add(number)
            return self._match(number, residue, spine, keys, tied)
        search.drop_expired()
        return match


@dataclass(frozen=True, slots=True)
class PackedJoin:
    """The join of spine rows that come packed: one column of Arrow streams, a row for each task."""

    join: PartitionJoin

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Batches of packed rows → joined batches."""
        return self.join(rows for batch in batches for packed in batch.column(0) for rows in _unpacked(packed.as_buffer()))


def pack(rows: pa.Table) -> bytes:
    """The rows as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _unpacked(packed: pa.Buffer) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_stream(packed) as stream:
        yield from stream


class _TooLargeError(Exception):
    """The values of a portion of rows take more than a worker may hold."""


class Match:
    """Where each spine row's winner lies: the number of its file and its row there; -1 where there is none."""

    def __init__(self, scan: Scan, rows: int) -> None:
        self.scan = scan
        self.files: list[FeatureFile] = []
        self.file = np.full(rows, -1, np.int32)
        self.row = np.zeros(rows, np.int64)

    def row_bytes(self) -> float:
        """The bytes that the features of one row take, as the files' footers tell."""
        names = [name for name, _ in self.scan.features]
        return max((file.row_bytes(names) for file in self.files), default=0.0)

    def values(self, rows: Integers, limits: Limits) -> list[pa.ChunkedArray]:
        """The features of the given spine rows, as columns; nulls where there is no winner."""
        file, row = self.file[rows], self.row[rows]
        found = np.flatnonzero(file >= 0)
        # One number sorts faster than two; a file has fewer than 2^40 rows.
        position = (file[found].astype(np.int64) << 40) + row[found]
        rising = len(position) < 2 or bool((position[1:] >= position[:-1]).all())
        winners = found if rising else found[np.argsort(position)]
        batches, size = [], 0
        bounds = np.searchsorted(file[winners], np.arange(len(self.files) + 1))
        for number, opened in enumerate(self.files):
            wanted = row[winners[bounds[number] : bounds[number + 1]]]
            for batch in opened.take(wanted, limits) if len(wanted) else ():
                batches.append(batch)
                size += batch.nbytes
                if size > 2 * limits.output_bytes and len(rows) > 1:
                    raise _TooLargeError
        schema = pa.schema([(str(n), type_) for n, (_, type_) in enumerate(self.scan.features)])
        fetched: list[pa.ChunkedArray] = pa.Table.from_batches(batches, schema).columns
        if rising and len(winners) == len(rows):
            return fetched
        index = np.full(len(rows), -1, np.int64)
        index[winners] = np.arange(len(winners))
        place = pa.array(index, mask=index < 0)
        return [_taken(column, place) for column in fetched]


class Search:
    """The spine rows that have a key and a time, and the best feature row found for each so far."""

    def __init__(self, rows: Integers, numbers: Integers, times: Integers, match: Match) -> None:
        self._times, self._rows, self._numbers, self._match = times, rows, numbers, match
        self._ttl_micros = match.scan.ttl_micros
        self._event = np.full(len(rows), NEVER)
        self._created = np.full(len(rows), NEVER)

    def concerned_by(self, file: DataFile) -> Integers:
        """The rows for which the file may hold a visible feature row newer than the best so far."""
        concerned = np.ones(len(self._rows), bool)
        if file.first is not None:
            concerned &= self._times >= file.first
        if file.last is not None:
            concerned &= self._event <= file.last  # equal: the created time decides
            if self._ttl_micros is not None:
                concerned &= self._times - self._ttl_micros <= file.last
        return np.flatnonzero(concerned)

    def look_through(self, file: DataFile, keys: SpineKeys, limits: Limits, *, known_at: bool, with_created: bool) -> None:
        """Look for newer rows in a file. TiesError where created times would decide and are not read."""
        concerned = self.concerned_by(file)
        if len(concerned):
            opened = FeatureFile(file, self._match.scan)
            self._match.files.append(opened)
            for block in opened.blocks(keys, limits, known_at=known_at, with_created=with_created):
                self.look_in(block, len(self._match.files) - 1, concerned)

    def look_in(self, block: Block, file: int, concerned: Integers) -> None:
        """For the rows ``concerned`` take the block's newest visible row where it is newer than the best so far."""
        numbers = self._numbers[concerned]
        first, end = block.first[numbers], block.end[numbers]
        held = np.flatnonzero(first < end)
        if not len(held):
            return
        concerned, first, end = concerned[held], first[held], end[held]
        after = bisect_right(block.visible, self._times[concerned], first, end)
        found = after > first
        concerned, position = concerned[found], block.winner_before(after[found])
        event = block.event[position]
        best = self._event[concerned]
        better = (event > best) | (self._match.file[self._rows[concerned]] < 0)
        tied = np.flatnonzero((event == best) & ~better)
        if len(tied) and self._match.scan.created is not None:
            if block.created is None:
                raise TiesError
            better[tied] = block.created[position[tied]] > self._created[concerned[tied]]
        concerned, position = concerned[better], position[better]
        self._event[concerned] = event[better]
        if block.created is not None:
            self._created[concerned] = block.created[position]
        self._match.file[self._rows[concerned]] = file
        self._match.row[self._rows[concerned]] = block.row_in_file(position)

    def drop_expired(self) -> None:
        """Where the newest visible row is older than the ttl, so are all others."""
        if self._ttl_micros is not None:
            matched = self._match.file[self._rows] >= 0
            expired = matched & (self._times - np.where(matched, self._event, 0) > self._ttl_micros)
            self._match.file[self._rows[expired]] = -1


class FeatureFile:
    """One Parquet file of a feature table, opened."""

    def __init__(self, file: DataFile, scan: Scan) -> None:
        self._scan = scan
        self._path = file.path
        with _opened(file.path) as opened:
            self._metadata, schema = opened.metadata, opened.schema_arrow
        self._columns = set(schema.names)
        # As dictionaries: runs of equal keys are then told by comparing small numbers.
        self._texts = [name for _, name in scan.keys if name in self._columns and not is_integral(schema.field(name).type)]
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum([group.num_rows for group in groups], dtype=np.int64)])
        self._widths = _widths(groups)

    def row_bytes(self, names: Iterable[str]) -> float:
        """The uncompressed bytes of these columns per row, by the footer."""
        return sum(self._widths.get(name, 0.0) for name in set(names))

    def _read(self, names: Iterable[str], groups: Sequence[int], limits: Limits) -> Iterator[pa.RecordBatch]:
        columns = list(dict.fromkeys(names))
        rows = int(min(max(limits.block_bytes / max(self.row_bytes(columns), 1.0), 1), limits.max_block_rows))
        # Opened anew each time: of a table of many files only one is open.
        with _opened(
            self._path, metadata=self._metadata, read_dictionary=self._texts, coerce_int96_timestamp_unit="us"
        ) as opened:
            yield from opened.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False)

    def blocks(self, keys: SpineKeys, limits: Limits, *, known_at: bool, with_created: bool) -> Iterator[Block]:
        """The file's rows whose keys the spine has, as blocks to search in; see ``make_block``."""
        scan, ties = self._scan, self._scan.created is None
        created_name = scan.created if with_created else None
        names = [*(name for _, name in scan.keys), scan.event, *([created_name] if created_name else [])]
        offset = 0
        for batch in self._read(names, range(self._metadata.num_row_groups), limits):
            key_columns = [batch.column(name) for _, name in scan.keys]
            created = batch.column(created_name) if created_name else None
            if batch.num_rows:
                yield make_block(keys, key_columns, batch.column(scan.event), created, offset, known_at=known_at, ties=ties)
            offset += batch.num_rows

    def take(self, rows: Integers, limits: Limits) -> Iterator[pa.RecordBatch]:
        """The features of these rows of the file, which must rise; a column that the file does not have yet is null."""
        present = [name for name, _ in self._scan.features if name in self._columns]
        if not present:
            yield self._as_declared(pa.table({}), len(rows))
            return
        bounds = np.searchsorted(rows, self._starts)
        for group in np.flatnonzero(bounds[:-1] < bounds[1:]):
            start = int(self._starts[group])
            for batch in self._read(present, [int(group)], limits):
                low, high = np.searchsorted(rows, [start, start + batch.num_rows])
                if low < high:
                    yield self._as_declared(batch.take(pa.array(rows[low:high] - start)), high - low)
                start += batch.num_rows

    def _as_declared(self, taken: Any, count: int) -> pa.RecordBatch:
        arrays = []
        for name, type_ in self._scan.features:
            array = taken.column(name) if name in self._columns else pa.nulls(count, type_)
            arrays.append(array if array.type == type_ else array.cast(type_))
        return pa.record_batch(arrays, names=[str(number) for number in range(len(arrays))])


def _opened(path: str, **options: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(path), **options)
    except FileNotFoundError:
        raise InvalidError.of(
            "SFS-514",
            "A data file of a feature table is gone.",
            why="VACUUM or somebody else removed it after the table's version was chosen.",
            where=path,
            fix="ask for the features again; if it stays so, rebuild the view's interval",
        ) from None


def _widths(groups: Sequence[Any]) -> dict[str, float]:
    """The uncompressed bytes per row of each column, by the metadata of the row groups."""
    rows = sum(group.num_rows for group in groups)
    total: dict[str, float] = {}
    for group in groups:
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            total[name] = total.get(name, 0.0) + column.total_uncompressed_size / rows
    return total


def _portions(matches: Sequence[Match], rows: int, output_bytes: int) -> list[Integers]:
    """The spine rows in portions whose features take about so many bytes, the last of them first.

    Rows go by where the first view's winners lie, so that each portion reads few of its row groups.
    """
    size = int(output_bytes / max(sum(match.row_bytes() for match in matches), 1e-9))
    if rows <= max(size, 1):
        return [np.arange(rows)]
    order = np.lexsort((matches[0].row, matches[0].file))
    return [order[start : start + max(size, 1)] for start in range(0, rows, max(size, 1))][::-1]


def _taken(column: pa.ChunkedArray, place: pa.Array) -> pa.ChunkedArray:
    """The column's values at these places, null where the place is."""
    if not len(column):
        return pa.chunked_array([pa.nulls(len(place), column.type)])
    return column.take(place)


def _batches(table: pa.Table, output_bytes: int) -> Iterator[pa.RecordBatch]:
    """The table in record batches that the JVM takes easily: a quarter of the bound, at most 100,000 rows."""
    rows = min(100_000, int(output_bytes / 4 / max(table.nbytes / max(table.num_rows, 1), 1)))
    yield from table.combine_chunks().to_batches(max(rows, 1))

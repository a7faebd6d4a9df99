"""Feature tables for the colocated join, written as Parquet files in whatever layout a test wants; no Spark."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spark_fs.offline.colocated import NO_RESIDUE, Limits, PartitionJoin, Scan
from spark_fs.offline.layout import DataFile
from spark_fs.online.codec import key_bytes
from spark_fs.spec import Column

INSTANT = pa.timestamp("us", tz="UTC")
EVENT, CREATED = "event_timestamp", "created_timestamp"

#: (rows of one bucket) → the rows of each of its files.
Split = Callable[[pa.Table], Sequence[pa.Table]]


def residues(table: pa.Table, keys: Sequence[Column], modulus: int) -> list[int]:
    """The checksum of each row's key modulo ``modulus``, as Spark computes it; NO_RESIDUE where a key is null."""
    if not keys:
        return [0] * table.num_rows
    rows = zip(*(table[key.name].to_pylist() for key in keys), strict=True)
    return [NO_RESIDUE if None in row else zlib.crc32(key_bytes(row, keys)) % modulus for row in rows]


def one_sorted_file(keys: Sequence[str]) -> Split:
    """As a build leaves a bucket."""
    order = [(name, "ascending") for name in (*keys, EVENT, CREATED)]
    return lambda rows: [rows.sort_by(order) if rows.num_rows else rows]


def scattered(rng: random.Random, files: int = 4) -> Split:
    """Rows in any order in several files that overlap in time."""

    def split(rows: pa.Table) -> list[pa.Table]:
        order = rng.sample(range(rows.num_rows), rows.num_rows)
        return [rows.take(pa.array(order[start::files], pa.int64())) for start in range(files)]

    return split


def write_files(
    folder: Path, rows: pa.Table, keys: Sequence[Column], buckets: int, split: Split, row_group: int = 1 << 20
) -> tuple[DataFile, ...]:
    """Write the rows bucket by bucket, each as ``split`` says, and return the files; buckets without rows have none."""
    folder.mkdir(parents=True, exist_ok=True)
    of_rows = residues(rows, keys, buckets)
    files = []
    for bucket in range(buckets):
        mine = rows.take(pa.array([n for n, found in enumerate(of_rows) if found == bucket], pa.int64()))
        for number, part in enumerate(split(mine)):
            if part.num_rows:
                path = folder / f"{bucket}-{number}.parquet"
                pq.write_table(part, path, row_group_size=row_group)
                events = part[EVENT].cast(pa.int64()).drop_null().to_pylist()
                bounds = (min(events), max(events)) if events else (None, None)
                files.append(DataFile(str(path), bucket, path.stat().st_size, part.num_rows, *bounds))
    return tuple(files)


def scan(
    files: Sequence[DataFile], keys: Mapping[str, str], features: Mapping[str, pa.DataType], buckets: int, **wanted: Any
) -> Scan:
    """What the join is told of one view; ``keys`` maps spine columns to the table's."""
    by_bucket: dict[int, tuple[DataFile, ...]] = {}
    for file in files:
        by_bucket[file.bucket] = (*by_bucket.get(file.bucket, ()), file)
    settings = {"event": EVENT, "created": CREATED, "ttl_micros": None, **wanted}
    return Scan(keys=tuple(keys.items()), features=tuple(features.items()), buckets=buckets, files=by_bucket, **settings)


def join(
    spine: pa.Table,
    scans: Sequence[Scan],
    keys: Sequence[Column],
    *,
    modulus: int = 8,
    known_at: bool = False,
    limits: Limits | None = None,
    batch_rows: int = 1 << 20,
) -> pa.Table:
    """The spine joined as one task would; the features of all scans are named by number from 0."""
    names = tuple(str(number) for number in range(sum(len(each.features) for each in scans)))
    marked = spine.append_column("residue", pa.array(residues(spine, keys, modulus), pa.int32()))
    task = PartitionJoin(tuple(scans), names, EVENT, "residue", modulus, known_at, limits or Limits())
    return pa.Table.from_batches(list(task(marked.to_batches(batch_rows))))

"""How feature tables lie: their files by bucket and time, read from Delta's log. Starts no JVM and no Spark job."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from spark_fs.intervals import to_micros
from spark_fs.offline.files import check_readable

#: Protocol features that change nothing in how a data file is read.
_HARMLESS = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"})
#: Delta states times in its log cut to milliseconds.
_CUT_MICROS = 999


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file of a feature table. ``first`` and ``last`` bound its event times in microseconds; None: not known."""

    path: str
    bucket: int
    size_bytes: int
    rows: int
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How a version of a feature table lies: its number of buckets (a power of two) and its files."""

    buckets: int
    files: tuple[DataFile, ...]


def read_layout(path: str, version: int | None = None) -> tuple[int | None, Layout | None, str]:
    """The version of the feature table at ``path`` (default: its newest), and how it lies.

    Without a version the log cannot be read without Spark, or there is no table; without a layout the files cannot be read
    one by one. The text then says why.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    found = None
    try:
        table = DeltaTable(path, version=version)
        found = int(table.version())
        check_readable(path)
        protocol = table.protocol()
        unknown = set(protocol.reader_features or ()) - _HARMLESS
        if unknown or protocol.min_reader_version == 2:
            why = f"the table uses {', '.join(sorted(unknown)) or 'column mapping'}, which only Delta Lake itself reads"
            return found, None, why
        bucket = next(field for field in table.schema().fields if field.name == "_bucket")
        return found, Layout(int(bucket.metadata["buckets"]), _files(table, path)), ""
    except (DeltaError, OSError, ValueError, NotImplementedError) as error:
        scheme = path.partition("://")[0] if "://" in path else "file"
        return found, None, f"files by {scheme}:// cannot be opened without Spark: {next(iter(str(error).splitlines()), '')}"


def _files(table: Any, path: str) -> tuple[DataFile, ...]:
    import pyarrow

    actions = pyarrow.table(table.get_add_actions(flatten=True))
    none = [None] * actions.num_rows
    column = {name: actions.column(name).to_pylist() for name in actions.column_names}
    firsts, lasts = (column.get(f"{edge}.event_timestamp", none) for edge in ("min", "max"))
    described = zip(
        column["path"], column["partition._bucket"], column["size_bytes"], column["num_records"], firsts, lasts, strict=True
    )
    return tuple(
        DataFile(
            file if "://" in file or file.startswith("/") else f"{path}/{file}",
            int(bucket),
            size,
            rows or 0,
            _micros(first),
            None if last is None else _micros(last) + _CUT_MICROS,
        )
        for file, bucket, size, rows, first, last in described
    )


def _micros(instant: datetime | None) -> Any:
    return None if instant is None else to_micros(instant)

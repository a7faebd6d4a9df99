"""How feature tables lie: their files by bucket and time, read from Delta's log. Starts no JVM and no Spark job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from spark_fs.files import check_readable
from spark_fs.intervals import Interval, to_micros

#: Protocol features that change nothing in how a data file is read.
_HARMLESS = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"})
#: The version of Delta's protocol up to which a writer need not check or compute anything about rows.
_PLAIN_WRITER = 2
#: Escape sequences of terminals.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
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

    def may_overlap(self, interval: Interval) -> bool:
        """Whether rows of the interval may be in it."""
        before = self.last is not None and self.last < to_micros(interval.start)
        return not (before or (self.first is not None and self.first >= to_micros(interval.end)))

    def lies_within(self, interval: Interval) -> bool:
        """Whether all its rows are known to be of the interval."""
        if self.first is None or self.last is None:
            return False
        return to_micros(interval.start) <= self.first and self.last < to_micros(interval.end)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a version of a feature table lies: its number of buckets (a power of two) and its files.

    ``takes_files``: files may be added without Delta's own writer, for no feature of the table asks more of one.
    """

    buckets: int
    files: tuple[DataFile, ...]
    takes_files: bool = False

    def touching(self, interval: Interval) -> tuple[DataFile, ...]:
        """The files that may hold rows of the interval, by path."""
        return tuple(sorted((file for file in self.files if file.may_overlap(interval)), key=lambda file: file.path))


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
        takes_files = protocol.min_writer_version <= _PLAIN_WRITER
        return found, Layout(int(bucket.metadata["buckets"]), _files(table, path), takes_files), ""
    except (DeltaError, OSError, ValueError, NotImplementedError) as error:
        scheme = path.partition("://")[0] if "://" in path else "file"
        return found, None, f"files by {scheme}:// cannot be opened without Spark: {_on_one_line(error)}"


def read_history(path: str) -> list[dict[str, Any]] | None:
    """What made each version of the table at ``path``, newest first, as Delta's log has it; None where only Spark can read it.

    Each entry has at least ``version`` and ``operation``. Some milliseconds, where Spark takes a job.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        entries = DeltaTable(path).history()
    except (DeltaError, OSError, ValueError, NotImplementedError):
        return None
    return entries if all(entry.get("operation") and "version" in entry for entry in entries) else None


def _on_one_line(error: BaseException) -> str:
    """What delta-rs says in a tree of lines, in colours: the causes, outermost first."""
    lines = (line.strip(" ↳\t") for line in _COLOURS.sub("", str(error)).splitlines())
    return ": ".join(line for line in lines if line)


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
            _upper(last),
        )
        for file, bucket, size, rows, first, last in described
    )


def _upper(last: datetime | None) -> int | None:
    """The greatest time that a bound may stand for: Delta cuts it to milliseconds, our own files have it whole."""
    if last is None:
        return None
    micros = to_micros(last)
    return micros if micros % 1000 else micros + _CUT_MICROS


def _micros(instant: datetime | None) -> Any:
    return None if instant is None else to_micros(instant)

"""What the log of a feature table tells: what builds have changed, which files are sorted. Values and pure functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from spark_fs.intervals import Interval, from_text, merge

#: Operations of Delta that leave the rows of a table as they are.
_NO_NEW_ROWS = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "CREATE TABLE"})


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A commit of ours that moves rows between files and changes none: the rows of ``read_version``, in ``buckets`` buckets.

    ``rewritten`` are the buckets that it writes as one sorted file each; in the others that was so already.
    """

    read_version: int
    buckets: int
    rewritten: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """One version of a feature table: what made it, and the number and interval of the build if it was one.

    ``in_order``: whether each file that it wrote is known to be sorted. ``rewrite``: what the commit is where it is upkeep of
    the layout.
    """

    version: int
    operation: str
    build: int | None
    in_order: bool = False
    rewrite: Rewrite | None = None
    interval: Interval | None = None

    @property
    def changes_rows(self) -> bool:
        """Whether other rows are in the table than before."""
        return self.operation not in _NO_NEW_ROWS and self.rewrite is None

    @property
    def writes_files(self) -> bool:
        """Whether it may have added data files."""
        return self.operation not in _NO_NEW_ROWS or self.operation == "OPTIMIZE"


def changed_since(log: Sequence[Commit], version: int) -> list[Interval] | None:
    """The event times whose rows may be others than at ``version``; None where the log cannot tell, so that any may be.

    The log (newest first) tells unless it was cleaned up that far, or somebody else changed the table's data.
    """
    commits = [commit for commit in log if commit.version > version]
    changed = [commit.interval for commit in commits if commit.changes_rows]
    if len(commits) != log[0].version - version or None in changed:
        return None
    return merge(interval for interval in changed if interval is not None)


def can_be_read_in_place(log: Sequence[Commit]) -> bool:
    """Whether in each data file the rows of a key stand together, newest last, and no other file has that key.

    So a build writes them, one file a bucket, and so an upkeep leaves the whole table. It holds while nothing but one build
    has written files, or nothing but the upkeep since the version that it read.
    """
    recent, whole = _since_rewrite(log)
    writers = [commit for commit in recent if commit.writes_files]
    return whole and len(writers) == 1 and (writers[0].rewrite is not None or writers[0].build is not None)


def files_are_sorted(log: Sequence[Commit]) -> bool:
    """Whether each data file is known to be sorted by (keys, event_timestamp, created_timestamp).

    Not so where others have written (``OPTIMIZE`` joins files as they come), where Delta's own writer took over rows of older
    files for a build, and where the log was cleaned up that far.
    """
    recent, whole = _since_rewrite(log)
    return whole and all(commit.in_order or not commit.writes_files for commit in recent)


def _since_rewrite(log: Sequence[Commit]) -> tuple[list[Commit], bool]:
    """The commits since the version that the last rewrite read (else all that there were), and whether none is missing."""
    start = next((commit.rewrite.read_version for commit in log if commit.rewrite), -1)
    recent = [commit for commit in log if commit.version > start]
    return recent, len(recent) == log[0].version - start


def parse_commit(version: int, operation: str, copied_rows: int | None, metadata: str | None) -> Commit:
    """A commit by its entry in the log; ``copied_rows`` is what Delta's own writer took over from older files, unsorted."""
    try:
        note = json.loads(metadata or "{}")
    except ValueError:
        note = None
    if not isinstance(note, dict):  # somebody else's: any text may stand there
        return Commit(version, operation, None)
    found = note.get("rewrite")
    rewrite = Rewrite(found["read_version"], found["buckets"], tuple(found["rewritten"])) if found else None
    build = note.get("build")
    in_order = rewrite is not None or note.get("in_order") is True or (build is not None and copied_rows == 0)
    interval = Interval(*map(from_text, note["interval"])) if build is not None else None
    return Commit(version, operation, build, in_order, rewrite, interval)

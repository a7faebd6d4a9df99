"""What is sent to write rows: commands with some rows each, in one manner or another, which may be sent again.

Of a call that was refused the same rows can be asked for in another manner, one by one, or without those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from spark_fs.online.codec import tag_of
from spark_fs.online.script import DIGEST, FUNCTION, SCRIPT

#: More rows gain nothing and hold up readers; Lua's ``unpack`` ends at some 8,000 values anyway.
CALL_ROWS = 500
#: Wide rows: a call is cut at this many bytes of keys and values, so that none occupies the server for long.
CALL_BYTES = 256 * 1024


class Manner(Enum):
    """How a call asks the server to write."""

    INSERT = "MSETNX: only if none of the keys is there"
    LOOK = "MGET: what is there; rows that differ from it go on to the script"
    BY_HASH = "the script, by its hash"
    BY_TEXT = "the script, with its text, which loads it"
    BY_FUNCTION = "the script as a function that an administrator has loaded"

    @property
    def is_script(self) -> bool:
        """Whether the script's rules hold, so that it needs its arguments."""
        return self not in (Manner.INSERT, Manner.LOOK)


@dataclass(frozen=True, slots=True)
class Call:
    """Some rows to write at once: online keys and values, and ``arguments``, these framed as Redis wants them.

    ``size`` is the bytes of what is sent of them, bare; ``keys`` are the key bytes, for messages; ``tail``: the script's last
    arguments, framed. ``slot`` is the cluster's, where there is one. ``differs``: LOOK has found something else in the place of
    these rows.
    """

    manner: Manner
    arguments: bytes
    size: int
    keys: Any
    names: Any
    values: Any
    tail: bytes
    slot: int
    differs: bool = False

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.keys)

    @property
    def share(self) -> float:
        """What part of a full call this is."""
        return max(len(self.keys) / CALL_ROWS, self.size / CALL_BYTES)

    def packed(self) -> bytes:
        """The command as it goes to the server."""
        if self.manner is Manner.INSERT:
            return b"*%d\r\n$6\r\nMSETNX\r\n%b" % (2 * len(self.keys) + 1, self.arguments)
        if self.manner is Manner.LOOK:
            return b"*%d\r\n$4\r\nMGET\r\n%b" % (len(self.keys) + 1, self.arguments)
        script = {Manner.BY_TEXT: _BY_TEXT, Manner.BY_FUNCTION: _BY_FUNCTION}.get(self.manner, _BY_HASH)
        return b"".join([b"*%d\r\n" % (2 * len(self.keys) + 5), script, bulk(b"%d" % len(self.keys)), self.arguments])

    def split(self) -> Sequence[Call]:
        """The same rows, one by one."""
        rows = []
        for number, (name, value) in enumerate(zip(self.names.to_pylist(), self.values.to_pylist(), strict=True)):
            arguments = bulk(name) + (b"" if self.manner is Manner.LOOK else bulk(value))
            arguments += self.tail if self.manner.is_script else b""
            keys, names, values = (column.slice(number, 1) for column in (self.keys, self.names, self.values))
            size = len(name) + (0 if self.manner is Manner.LOOK else len(value))
            rows.append(replace(self, arguments=arguments, size=size, keys=keys, names=names, values=values))
        return rows

    def touched(self) -> bytes:
        """A write to the same slot that leaves nothing behind: a key that ends after a millisecond."""
        name = self.names[0].as_py()
        name = b"%bwait:{%b}" % (name.partition(b"{")[0], tag_of(name))
        return b"*5\r\n$3\r\nSET\r\n%b$0\r\n\r\n$2\r\nPX\r\n$1\r\n1\r\n" % bulk(name)

    def for_script(self) -> Call:
        """The same rows for the script."""
        from spark_fs.online import encode

        pieces = [encode.row_bytes(encode.bulk_strings(column)) for column in (self.names, self.values)]
        size = encode.size_bytes(self.names) + encode.size_bytes(self.values)
        return replace(self, manner=Manner.BY_HASH, arguments=b"".join([*pieces, self.tail]), size=size)

    def unlike(self, stored: Sequence[bytes | None]) -> Call | None:
        """Those of the rows whose values are not what is stored, for the script; None where there are none."""
        import pyarrow as pa

        pairs = zip(stored, self.values.to_pylist(), strict=True)
        rows = [row for row, (old, new) in enumerate(pairs) if old != new]
        if not rows:
            return None
        keys, names, values = (column.take(pa.array(rows)) for column in (self.keys, self.names, self.values))
        return replace(self, keys=keys, names=names, values=values, differs=True).for_script()


def bulk(value: bytes) -> bytes:
    """A string as Redis's protocol has it."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


_BY_HASH = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % DIGEST
_BY_TEXT = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(SCRIPT), SCRIPT)
_BY_FUNCTION = b"$5\r\nFCALL\r\n$%d\r\n%b\r\n" % (len(FUNCTION), FUNCTION)

"""Rows → Redis: the guarded write, its errors, and what is checked before it.

Calls of one Lua script carry up to 500 rows each, of a cluster the rows of one slot; several are in flight. The script
writes a row only where its version (event time, created time, build) is greater than the stored one, so writes may be
repeated, reordered and run side by side: the store ends the same. A restatement writes older rows, or none, on purpose;
its generation keeps out whatever began before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any

import redis

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online import codec
from spark_fs.online.codec import ONLINE_SLOTS, key_prefix, shown_key, slot_of, tag_of
from spark_fs.online.links import open_links
from spark_fs.online.script import DIGEST, FUNCTION, SCRIPT, forbids_scripts, lacks_function, no_function
from spark_fs.spec import Column, ViewSpec

if TYPE_CHECKING:
    import pyarrow as pa

#: More rows gain nothing and hold up readers; Lua's ``unpack`` ends at some 8,000 values anyway.
CALL_ROWS = 500
#: Wide rows: a call is cut at this many bytes of keys and values, so that none occupies the server for long.
CALL_BYTES = 256 * 1024
#: A longer key or value is refused: it would hold up every reader of the server.
MAX_VALUE_BYTES = 512 * 1024
#: Calls sent and not yet answered: enough to keep the server busy while the next rows are encoded.
CALLS_IN_FLIGHT = 16
#: Rows encoded at once are cut at so many bytes; it bounds memory beside the batch itself.
ENCODE_BYTES = 4 * 1024 * 1024
#: For a cluster so many bytes of rows are sorted by tag first: the more of them, the more rows has a call. Some four times
#: as much memory is taken by it.
SORT_BYTES = 32 * 1024 * 1024
#: Tries in a row without one answer before a write to a single server gives up; with the growing pause between
#: them some 6 seconds. Where replicas can take over it is ``links.FAILOVER_SECONDS``.
MAX_FAILURES = 7


@dataclass(frozen=True, slots=True)
class OnlineTarget:
    """Where and how the rows of one view version are written; small, and survives pickling to the executors.

    ``url`` (``address.parse_address``) is left out of the repr, for it may hold a password.
    With a ``ttl`` Redis drops a row once its event time + ttl has passed; that is clean-up only, for readers judge
    the ttl themselves. ``generation`` counts the restatements of the view that were known when the writer began;
    ``restating``: the rows replace those of lower generations whatever their times. ``erased`` are the digests
    (``codec.key_digest``, made with ``key_space``) of the keys that must never be written. With ``wait_replicas`` a write
    ends by waiting shortly for so many replicas, and tells how many there were.
    """

    url: str = field(repr=False)
    prefix: bytes
    features: tuple[Column, ...]
    generation: int = 1
    ttl: timedelta | None = None
    socket_timeout_seconds: float = 10.0
    restating: bool = False
    erased: frozenset[bytes] = frozenset()
    key_space: bytes = b""
    wait_replicas: int = 0

    @classmethod
    def of(cls, url: str, view: ViewSpec, *, generation: int = 1, socket_timeout_seconds: float = 10.0) -> OnlineTarget:
        """The target of a view version's rows."""
        target = cls(url, key_prefix(view), view.features, generation, view.ttl or None, socket_timeout_seconds)
        return replace(target, key_space=codec.key_space(view))

    def is_erased(self, keys: Sequence[bytes | None]) -> list[bool]:
        """Which entities, by their key bytes, must not be online."""
        return codec.erased_among(keys, self.erased, self.key_space, self.prefix)

    def without_erased(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch without the rows of entities that must not be online, by its ``_key``."""
        if not self.erased:
            return batch
        import pyarrow as pa

        return batch.filter(pa.array([not gone for gone in self.is_erased(batch.column("_key").to_pylist())], pa.bool_()))


#: What the server says of rows, and the bytes sent: the fields of ``WriteCounts``.
COUNTS = ("applied", "equal", "stale", "expired", "fenced", "bytes")


@dataclass(frozen=True, slots=True)
class WriteCounts:
    """What became of the rows of a write: ``rows = applied + equal + stale + expired + fenced``.

    applied: written, for they were newer; equal: the same version was there; stale: a newer one was there; expired:
    newer, but event time + ttl had passed, so they are not kept and neither is what they replace; fenced: newer, but
    the row there was restated after this writer had begun. ``bytes``: keys and values sent. ``replicas``: the least number of
    replicas that had all rows when the write ended; None where it was not asked, or nothing was written.
    """

    applied: int = 0
    equal: int = 0
    stale: int = 0
    expired: int = 0
    fenced: int = 0
    bytes: int = 0
    replicas: int | None = None

    @property
    def rows(self) -> int:
        """All rows of the write."""
        return self.applied + self.equal + self.stale + self.expired + self.fenced

    def __add__(self, other: WriteCounts) -> WriteCounts:
        replicas = [counts.replicas for counts in (self, other) if counts.replicas is not None]
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return WriteCounts(**sums, replicas=min(replicas, default=None))


def write_batches(batches: Iterator[pa.RecordBatch], target: OnlineTarget, *, distinct: bool = False) -> WriteCounts:
    """Write rows where they are newer than what is stored; runs in a Spark executor or any process.

    Each batch, of any size, has ``_key`` (key bytes), ``event_timestamp``, ``created_timestamp`` (may be null),
    ``_build`` and the target's features by name. A key may occur many times, in any order: the greatest version
    stays. Returns when the server has confirmed every row; memory is bounded by a batch, for a cluster by ``SORT_BYTES`` too.

    ``distinct`` promises that no key occurs twice. Then rows go by MSETNX as long as the server has none of their keys,
    which is twice as fast as the script: there is nothing to compare with, and it too is done as a whole or not at all.
    Rows of erased keys are left out.

    A lost connection, a server that is loading, busy or read-only, and a lost script are retried for some seconds, and
    with sentinels or a cluster long enough for a failover; slots of a cluster may move meanwhile. Repeated rows count as
    equal. Raises SFS-608 for a key or value above 512 KB, SFS-609 for unfit rows, SFS-610 for a key of another program,
    and redis-py's errors as they are (``errors.translate`` knows them). After an error any part of the rows may be
    written; writing them again is safe.
    """
    from spark_fs.online import encode

    with _Writer(target, inserting=distinct and target.ttl is None and not target.restating) as writer:
        kept = map(target.without_erased, batches)
        for batch in encode.by_tag(kept, SORT_BYTES) if writer.by_slot else kept:
            for part in encode.slices(batch, ENCODE_BYTES):
                values = encode.encode_values(part, target.features, target.generation)
                tags = part.column(encode.TAG) if writer.by_slot else None
                for call in _calls(encode.encode_keys(part), values, target, insert=writer.inserting, tags=tags):
                    writer.send(call)
        return writer.finish()


def bury_batches(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> WriteCounts:
    """Put tombstones in the place of rows: batches with ``_key``. The target must be restating.

    A reader finds nothing then, and for ``codec.GRAVE`` no writer of a lower generation can write the keys. Errors as for
    ``write_batches``. Buried keys count as applied, those that a later restatement has written as stale or fenced.
    """
    import pyarrow as pa

    from spark_fs.online import encode

    tombstone = pa.scalar(codec.tombstone(target.generation), pa.large_binary())
    with _Writer(target, inserting=False) as writer:
        for batch in encode.by_tag(batches, SORT_BYTES) if writer.by_slot else batches:
            keys, tags = encode.encode_keys(batch), batch.column(encode.TAG) if writer.by_slot else None
            for call in _calls(keys, pa.repeat(tombstone, len(keys)), target, insert=False, tags=tags):
                writer.send(call)
        return writer.finish()


# ---- rows → calls


class _Manner(Enum):
    """How a call asks the server to write."""

    INSERT = "MSETNX: only if none of the keys is there"
    BY_HASH = "the script, by its hash"
    BY_TEXT = "the script, with its text, which loads it"
    BY_FUNCTION = "the script as a function that an administrator has loaded"


@dataclass(frozen=True, slots=True)
class _Call:
    """Some rows to write at once: online keys and values, and ``arguments``, these framed as Redis wants them.

    ``size`` is their bytes bare; ``keys`` are the key bytes, for messages. ``slot`` is the cluster's, where there is one.
    """

    manner: _Manner
    arguments: bytes
    size: int
    keys: Any
    names: Any
    values: Any
    tail: bytes
    slot: int

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
        return _packed(self)

    def split(self) -> Sequence[_Call]:
        """The same rows, one by one."""
        rows = []
        for number, (name, value) in enumerate(zip(self.names.to_pylist(), self.values.to_pylist(), strict=True)):
            arguments = _bulk(name) + _bulk(value) + (b"" if self.manner is _Manner.INSERT else self.tail)
            keys, names, values = (column.slice(number, 1) for column in (self.keys, self.names, self.values))
            size = len(name) + len(value)
            rows.append(replace(self, arguments=arguments, size=size, keys=keys, names=names, values=values))
        return rows

    def touched(self) -> bytes:
        """A write to the same slot that leaves nothing behind: a key that ends after a millisecond."""
        name = self.names[0].as_py()
        name = b"%bwait:{%b}" % (name.partition(b"{")[0], tag_of(name))
        return b"*5\r\n$3\r\nSET\r\n%b$0\r\n\r\n$2\r\nPX\r\n$1\r\n1\r\n" % _bulk(name)

    def for_script(self) -> _Call:
        """The same rows for the script."""
        from spark_fs.online import encode

        pieces = [encode.row_bytes(encode.bulk_strings(column)) for column in (self.names, self.values)]
        return replace(self, manner=_Manner.BY_HASH, arguments=b"".join([*pieces, self.tail]))


_BY_HASH = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % DIGEST
_BY_TEXT = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(SCRIPT), SCRIPT)
_BY_FUNCTION = b"$5\r\nFCALL\r\n$%d\r\n%b\r\n" % (len(FUNCTION), FUNCTION)


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def _packed(call: _Call) -> bytes:
    """The command as it goes to the server."""
    if call.manner is _Manner.INSERT:
        return b"*%d\r\n$6\r\nMSETNX\r\n%b" % (2 * len(call.keys) + 1, call.arguments)
    script = {_Manner.BY_TEXT: _BY_TEXT, _Manner.BY_FUNCTION: _BY_FUNCTION}.get(call.manner, _BY_HASH)
    return b"".join([b"*%d\r\n" % (2 * len(call.keys) + 5), script, _bulk(b"%d" % len(call.keys)), call.arguments])


def _tail(target: OnlineTarget) -> bytes:
    """The script's last two arguments: the ttl in milliseconds, or nothing, and whether to restate."""
    ttl = b"%d" % -(-target.ttl // timedelta(milliseconds=1)) if target.ttl else b""
    return _bulk(ttl) + _bulk(b"1" if target.restating else b"0")


def _calls(keys: Any, values: Any, target: OnlineTarget, *, insert: bool, tags: Any = None) -> Iterator[_Call]:
    """Rows, as key bytes and stored values, as calls in their order: ≤ CALL_ROWS rows and about CALL_BYTES each.

    Where their ``tags`` are given, each call has rows of one tag, and so of one slot of a cluster.
    """
    import numpy as np  # numpy and pyarrow are needed to write only: reading does without
    import pyarrow as pa

    from spark_fs.online import encode

    by_slot = tags is not None
    tags = tags.to_numpy() if by_slot else encode.key_tags(keys)
    heads = pa.array([b"%b{%d}:" % (target.prefix, tag) for tag in range(ONLINE_SLOTS)], pa.large_binary())
    names = encode.join(heads.take(pa.array(tags)), keys)
    sizes = [np.diff(encode.offsets(column)) for column in (names, values)]
    _refuse_oversized(keys, sizes)
    ends = np.cumsum(sizes[0] + sizes[1])
    framed = [encode.bulk_strings(column) for column in (names, values)]
    if insert:  # key, value, key, value …; the script wants all keys, then all values
        framed = [encode.join(*framed)]
    buffers = [memoryview(encode.data(column)) for column in framed]
    cuts = [encode.offsets(column) for column in framed]
    manner, tail = _Manner.INSERT if insert else _Manner.BY_HASH, _tail(target)
    ending = b"" if insert else tail
    start, done = 0, 0
    while start < len(keys):
        stop = min(start + CALL_ROWS, len(keys), max(start + 1, int(np.searchsorted(ends, done + CALL_BYTES, "right"))))
        if by_slot:
            stop = start + int(np.argmax(np.append(tags[start:stop] != tags[start], True)))
        pieces = [buffer[cut[start] : cut[stop]] for buffer, cut in zip(buffers, cuts, strict=True)]
        part_keys, part_names, part_values = (column.slice(start, stop - start) for column in (keys, names, values))
        size, slot = int(ends[stop - 1]) - done, slot_of(b"%d" % tags[start]) if by_slot else 0
        yield _Call(manner, b"".join([*pieces, ending]), size, part_keys, part_names, part_values, tail, slot)
        start, done = stop, int(ends[stop - 1])


def _refuse_oversized(keys: Any, sizes: list[Any]) -> None:
    for what, lengths in zip(("key", "value"), sizes, strict=True):
        if len(lengths) and lengths.max() > MAX_VALUE_BYTES:
            worst, count = int(lengths.argmax()), int((lengths > MAX_VALUE_BYTES).sum())
            raise InvalidError.of(
                "SFS-608",
                f"The {what} of entity {shown_key(keys[worst].as_py())} takes {lengths[worst]:,} bytes online; "
                f"at most {MAX_VALUE_BYTES:,} are allowed.",
                why=f"One such row would hold up every reader of the server; {count:,} of {len(keys):,} rows here are so.",
                fix="keep large values elsewhere and store a reference, or leave the feature out of the online store",
            )


# ---- calls → server


class _Writer:
    """Sends calls and counts what became of their rows."""

    def __init__(self, target: OnlineTarget, *, inserting: bool) -> None:
        self._target = target
        #: Whether the server has had none of the keys so far, so that there is nothing to compare with.
        self.inserting = inserting
        #: Whether the login may not run scripts, so that the function is called in their place.
        self._by_function = False
        self._counts = WriteCounts()
        self._links = open_links(
            target.url, target.socket_timeout_seconds, self._answered, calls=CALLS_IN_FLIGHT, tries=MAX_FAILURES
        )
        #: Whether a call may have rows of one slot only.
        self.by_slot = self._links.is_cluster

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._links.disconnect()

    def send(self, call: _Call) -> None:
        """Send a call; waits for the oldest answers while too many are open."""
        if call.manner is _Manner.INSERT and not self.inserting:
            call = call.for_script()
        self._links.send(self._allowed(call))

    def finish(self) -> WriteCounts:
        """Wait for all answers."""
        self._links.finish()
        if self._target.wait_replicas:
            replicas = self._links.replicas(self._target.wait_replicas, self._target.socket_timeout_seconds)
            self._counts += WriteCounts(replicas=replicas)
        return self._counts

    def _answered(self, call: _Call, reply: Any) -> _Call | None:
        """Count an answer; gives what is to be sent in the call's place where it was refused."""
        if isinstance(reply, redis.exceptions.NoScriptError):
            # The text of the script loads it again; only this call went unserved.
            return replace(call, manner=_Manner.BY_TEXT)
        if isinstance(reply, redis.RedisError):
            if forbids_scripts(reply):
                self._by_function = True
                return self._allowed(call)
            raise no_function(reply) if lacks_function(reply) else reply
        if call.manner is _Manner.INSERT:
            if not reply:
                self.inserting = False
                return self._allowed(call.for_script())
            self._counts += WriteCounts(applied=call.rows, bytes=call.size)
            return None
        if isinstance(reply, int):
            raise self._foreign_key(call, reply)
        applied, equal, stale, expired, fenced = reply
        self._counts += WriteCounts(applied, equal, stale, expired, fenced, call.size)
        return None

    def _allowed(self, call: _Call) -> _Call:
        """The call by the function where scripts are not allowed."""
        scripted = self._by_function and call.manner is not _Manner.INSERT
        return replace(call, manner=_Manner.BY_FUNCTION) if scripted else call

    def _foreign_key(self, call: _Call, position: int) -> SparkFSError:
        return InvalidError.of(
            "SFS-610",
            f"The online key of entity {shown_key(call.keys[position - 1].as_py())} of {self._target.prefix.decode()} "
            "holds something that spark_fs did not write.",
            why="Nothing of this call was written.",
            fix="give spark_fs a database or a project name of its own, or delete the key",
        )

"""Rows → Redis: the guarded write, its errors, and what is checked before it.

Calls of one Lua script carry up to 500 rows each, of a cluster the rows of one slot; several are in flight. The script
writes a row only where its version (event time, created time, build) is greater than the stored one, so writes may be
repeated, reordered and run side by side: the store ends the same. A restatement writes older rows, or none, on purpose;
its generation keeps out whatever began before it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import redis

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online import codec, pace
from spark_fs.online.codec import ONLINE_SLOTS, key_prefix, slot_of, tag_of
from spark_fs.online.links import open_links
from spark_fs.online.script import SCRIPT
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
#: So many for a cluster, for they are sorted by slot: the more of them, the more rows has a call. Some five times as much
#: memory is taken while they are encoded.
SORT_BYTES = 16 * 1024 * 1024
#: So many rows are written first, to see whether the server has them already.
TRIAL_ROWS = 2 * CALL_ROWS
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
    (``codec.key_digest``) of the keys that must never be written. With ``wait_replicas`` a write ends by waiting shortly for
    so many replicas, and tells how many there were. ``max_rows_per_second`` is the share of one task of the run's write
    budget (``pace.Pace``); None: as fast as the server answers.
    """

    url: str = field(repr=False)
    prefix: bytes
    features: tuple[Column, ...]
    generation: int = 1
    ttl: timedelta | None = None
    socket_timeout_seconds: float = 10.0
    restating: bool = False
    erased: frozenset[bytes] = frozenset()
    wait_replicas: int = 0
    max_rows_per_second: float | None = None

    @classmethod
    def of(
        cls,
        url: str,
        view: ViewSpec,
        *,
        generation: int = 1,
        socket_timeout_seconds: float = 10.0,
        max_rows_per_second: float = 0,
    ) -> OnlineTarget:
        """The target of a view version's rows; a budget of 0 is none. Raises SFS-629 for a budget below."""
        if max_rows_per_second < 0:
            fix = "give a number of rows above 0, or 0 for no limit"
            raise InvalidError.of("SFS-629", f"A write budget cannot be {max_rows_per_second} rows a second.", fix=fix)
        return cls(
            url,
            key_prefix(view),
            view.features,
            generation,
            view.ttl or None,
            socket_timeout_seconds,
            max_rows_per_second=max_rows_per_second or None,
        )


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
    While most rows turn out to be there already, they are compared here, with what MGET finds, which costs the server a
    fifth of the script's time; only those that differ go on to the script. Rows of erased keys are left out.

    A lost connection, a server that is loading, busy or read-only, and a lost script are retried for some seconds, and
    with sentinels or a cluster long enough for a failover; slots of a cluster may move meanwhile. Repeated rows count as
    equal. Raises SFS-608 for a key or value above 512 KB, SFS-609 for unfit rows, SFS-610 for a key of another program,
    and redis-py's errors as they are (``errors.translate`` knows them). After an error any part of the rows may be
    written; writing them again is safe.
    """
    from spark_fs.online import encode

    with _Writer(target, distinct=distinct) as writer:
        for number, part in enumerate(_parts(batches, target, by_slot=writer.by_slot)):
            values = encode.encode_values(part, target.features, target.generation)
            for call in _calls(encode.encode_keys(part), values, target, lambda: writer.manner, by_slot=writer.by_slot):
                writer.send(call)
            if number == 0:
                writer.settle()  # the answers tell in what manner the rest is best written
        return writer.finish()


def _parts(batches: Iterator[pa.RecordBatch], target: OnlineTarget, *, by_slot: bool) -> Iterator[pa.RecordBatch]:
    """The rows to write, in pieces to be encoded at once: first a few, then more."""
    from spark_fs.online import encode

    trial = TRIAL_ROWS
    for batch in encode.gathered(batches, SORT_BYTES) if by_slot else batches:
        kept = encode.without(batch, target.erased, target.prefix)
        if trial and kept.num_rows:
            yield kept.slice(0, trial)
            kept, trial = kept.slice(trial), 0
        yield from encode.slices(kept, SORT_BYTES if by_slot else ENCODE_BYTES)


def bury_batches(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> WriteCounts:
    """Put tombstones in the place of rows: batches with ``_key``. The target must be restating.

    A reader finds nothing then, and for ``codec.GRAVE`` no writer of a lower generation can write the keys. Errors as for
    ``write_batches``. Buried keys count as applied, those that a later restatement has written as stale or fenced.
    """
    import pyarrow as pa

    from spark_fs.online import encode

    tombstone = pa.scalar(codec.tombstone(target.generation), pa.large_binary())
    with _Writer(target, distinct=False) as writer:
        for batch in encode.gathered(batches, SORT_BYTES) if writer.by_slot else batches:
            keys = encode.encode_keys(batch)
            for call in _calls(keys, pa.repeat(tombstone, len(keys)), target, lambda: writer.manner, by_slot=writer.by_slot):
                writer.send(call)
        return writer.finish()


# ---- rows → calls


class _Manner(Enum):
    """How a call asks the server to write."""

    INSERT = "MSETNX: only if none of the keys is there"
    LOOK = "MGET: what is there; rows that differ from it go on to the script"
    BY_HASH = "the script, by its hash"
    BY_TEXT = "the script, with its text, which loads it"


@dataclass(frozen=True, slots=True)
class _Call:
    """Some rows to write at once: online keys and values, and ``arguments``, these framed as Redis wants them.

    ``size`` is their bytes bare; ``keys`` are the key bytes, for messages. ``slot`` is the cluster's, where there is one.
    ``differs``: LOOK has found something else in the place of these rows.
    """

    manner: _Manner
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

    def packed(self) -> bytes:
        """The command as it goes to the server."""
        return _packed(self)

    def split(self) -> Sequence[_Call]:
        """The same rows, one by one."""
        rows = []
        for number, (name, value) in enumerate(zip(self.names.to_pylist(), self.values.to_pylist(), strict=True)):
            arguments = _bulk(name) + (b"" if self.manner is _Manner.LOOK else _bulk(value))
            arguments += self.tail if self.manner in (_Manner.BY_HASH, _Manner.BY_TEXT) else b""
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
        size = encode.size_bytes(self.names) + encode.size_bytes(self.values)
        return replace(self, manner=_Manner.BY_HASH, arguments=b"".join([*pieces, self.tail]), size=size)

    def unlike(self, stored: Sequence[bytes | None]) -> _Call | None:
        """Those of the rows whose values are not what is stored, for the script; None where there are none."""
        import pyarrow as pa

        pairs = zip(stored, self.values.to_pylist(), strict=True)
        rows = [row for row, (old, new) in enumerate(pairs) if old != new]
        if not rows:
            return None
        keys, names, values = (column.take(pa.array(rows)) for column in (self.keys, self.names, self.values))
        return replace(self, keys=keys, names=names, values=values, differs=True).for_script()


_BY_HASH = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
_BY_TEXT = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(SCRIPT), SCRIPT)


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def _packed(call: _Call) -> bytes:
    """The command as it goes to the server."""
    if call.manner is _Manner.INSERT:
        return b"*%d\r\n$6\r\nMSETNX\r\n%b" % (2 * len(call.keys) + 1, call.arguments)
    if call.manner is _Manner.LOOK:
        return b"*%d\r\n$4\r\nMGET\r\n%b" % (len(call.keys) + 1, call.arguments)
    script = _BY_TEXT if call.manner is _Manner.BY_TEXT else _BY_HASH
    return b"".join([b"*%d\r\n" % (2 * len(call.keys) + 5), script, _bulk(b"%d" % len(call.keys)), call.arguments])


def _tail(target: OnlineTarget) -> bytes:
    """The script's last two arguments: the ttl in milliseconds, or nothing, and whether to restate."""
    ttl = b"%d" % -(-target.ttl // timedelta(milliseconds=1)) if target.ttl else b""
    return _bulk(ttl) + _bulk(b"1" if target.restating else b"0")


def _calls(
    keys: Any, values: Any, target: OnlineTarget, manner_now: Callable[[], _Manner], *, by_slot: bool
) -> Iterator[_Call]:
    """Rows, as key bytes and stored values, as calls: ≤ CALL_ROWS rows and about CALL_BYTES each.

    In their order, or ``by_slot``: each call has rows of one tag, and so of one slot of a cluster. Under a write budget they
    are smaller (``pace.call_rows``, ``pace.CALL_BYTES``). ``manner_now`` is asked before each call.
    """
    import numpy as np  # numpy and pyarrow are needed to write only: reading does without
    import pyarrow as pa

    from spark_fs.online import encode

    # One C call per key, 0.07 µs: cheaper than a table-driven CRC in numpy, whose cost grows with each byte of the
    # longest key.
    tags = np.fromiter(map(zlib.crc32, keys.to_pylist()), np.uint32, len(keys)) % ONLINE_SLOTS
    if by_slot:
        order = np.argsort(tags.astype(np.uint16), kind="stable")  # of 16 bits: by radix
        keys, values, tags = keys.take(pa.array(order)), values.take(pa.array(order)), tags[order]
    heads = pa.array([b"%b{%d}:" % (target.prefix, tag) for tag in range(ONLINE_SLOTS)], pa.large_binary())
    names = encode.join(heads.take(pa.array(tags)), keys)
    sizes = [np.diff(encode.offsets(column)) for column in (names, values)]
    _refuse_oversized(keys, sizes)
    ends = np.cumsum(sizes[0] + sizes[1])

    @cache  # for all rows at once, but only in the manners that are asked for
    def framed(manner: _Manner) -> list[tuple[memoryview, Any]]:
        columns = [encode.bulk_strings(column) for column in ([names] if manner is _Manner.LOOK else [names, values])]
        if manner is _Manner.INSERT:  # key, value, key, value …; the script wants all keys, then all values
            columns = [encode.join(*columns)]
        return [(memoryview(encode.data(column)), encode.offsets(column)) for column in columns]

    tail = _tail(target)
    most_rows, most_bytes = CALL_ROWS, CALL_BYTES
    if target.max_rows_per_second:
        most_rows, most_bytes = pace.call_rows(target.max_rows_per_second), pace.CALL_BYTES
    start, done = 0, 0
    while start < len(keys):
        stop = min(start + most_rows, len(keys), max(start + 1, int(np.searchsorted(ends, done + most_bytes, "right"))))
        if by_slot:
            stop = min(stop, int(np.searchsorted(tags, tags[start], "right")))
        manner = manner_now()
        pieces: list[bytes | memoryview] = [buffer[cut[start] : cut[stop]] for buffer, cut in framed(manner)]
        pieces += [tail] if manner is _Manner.BY_HASH else []
        part_keys, part_names, part_values = (column.slice(start, stop - start) for column in (keys, names, values))
        size = int(sizes[0][start:stop].sum()) if manner is _Manner.LOOK else int(ends[stop - 1]) - done
        slot = slot_of(b"%d" % tags[start]) if by_slot else 0
        yield _Call(manner, b"".join(pieces), size, part_keys, part_names, part_values, tail, slot)
        start, done = stop, int(ends[stop - 1])


def _refuse_oversized(keys: Any, sizes: list[Any]) -> None:
    for what, lengths in zip(("key", "value"), sizes, strict=True):
        if len(lengths) and lengths.max() > MAX_VALUE_BYTES:
            worst = int(lengths.argmax())
            raise InvalidError.of(
                "SFS-608",
                f"The {what} of entity {_shown(keys[worst].as_py())} takes {lengths[worst]:,} bytes online; "
                f"at most {MAX_VALUE_BYTES:,} are allowed.",
                why="One such row would hold up every reader of the server.",
                fix="keep large values elsewhere and store a reference, or leave the feature out of the online store",
            )


def _shown(key: bytes) -> str:
    """A key as a message may show it: escaped and short."""
    text = repr(key)[1:]
    return text if len(text) <= 80 else f"{text[:80]}…"


# ---- calls → server


class _Writer:
    """Sends calls and counts what became of their rows."""

    def __init__(self, target: OnlineTarget, *, distinct: bool) -> None:
        self._target, self._distinct = target, distinct
        #: How the next rows are best written, by what the answers so far tell.
        self.manner = _Manner.INSERT if distinct and target.ttl is None and not target.restating else _Manner.BY_HASH
        self._looked_for, self._met = 0, 0
        self._counts = WriteCounts()
        limits = {"calls": CALLS_IN_FLIGHT, "rows": CALLS_IN_FLIGHT * CALL_ROWS, "tries": MAX_FAILURES}
        self._links = open_links(target.url, target.socket_timeout_seconds, self._answered, **limits)
        #: Whether a call may have rows of one slot only.
        self.by_slot = self._links.is_cluster
        self._pace = pace.Pace(target.max_rows_per_second) if target.max_rows_per_second else None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._links.disconnect()

    def send(self, call: _Call) -> None:
        """Send a call; waits for the oldest answers while too many are open, under a write budget for all of them."""
        if self._pace is None:
            self._links.send(call)
            return
        with self._pace.call(call.rows):
            self._links.send(call)
            self._links.finish()

    def settle(self) -> None:
        """Wait for all answers."""
        self._links.finish()

    def finish(self) -> WriteCounts:
        """Wait for all answers, and for replicas where the target asks for some; what became of all rows."""
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
            raise reply
        if call.manner is _Manner.INSERT:
            if not reply:
                if self.manner is _Manner.INSERT:
                    self.manner = _Manner.BY_HASH
                return call.for_script()
            self._counts += WriteCounts(applied=call.rows, bytes=call.size)
            return None
        if call.manner is _Manner.LOOK:
            rest = call.unlike(reply)
            equal = call.rows - (rest.rows if rest else 0)
            self._counts += WriteCounts(equal=equal, bytes=call.size)
            self._judge(call, equal)
            return rest
        if isinstance(reply, int):
            raise self._foreign_key(call, reply)
        applied, equal, stale, expired, fenced = reply
        self._counts += WriteCounts(applied, equal, stale, expired, fenced, call.size)
        if not call.differs:
            self._judge(call, equal)
        return None

    def _judge(self, call: _Call, equal: int) -> None:
        """Look before writing while most rows are there already, as long as looking has found most of those looked for."""
        if call.manner is _Manner.LOOK:
            self._looked_for, self._met = self._looked_for + call.rows, self._met + equal
        looks = self._distinct and 2 * equal > call.rows and 2 * self._met >= self._looked_for
        self.manner = _Manner.LOOK if looks else _Manner.BY_HASH

    def _foreign_key(self, call: _Call, position: int) -> SparkFSError:
        return InvalidError.of(
            "SFS-610",
            f"The online key of entity {_shown(call.keys[position - 1].as_py())} of {self._target.prefix.decode()} "
            "holds something that spark_fs did not write.",
            why="Nothing of this call was written.",
            fix="give spark_fs a database or a project name of its own, or delete the key",
        )

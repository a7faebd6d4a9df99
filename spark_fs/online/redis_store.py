"""Rows → Redis: the guarded write, its errors, and what is checked before it.

Calls of one Lua script carry up to 500 rows each, of a cluster the rows of one slot; several are in flight. The script
writes a row only where its version (event time, created time, build) is greater than the stored one, so writes may be
repeated, reordered and run side by side: the store ends the same. A restatement writes older rows, or none, on purpose;
its generation keeps out whatever began before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import redis

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online import codec, pace
from spark_fs.online.calls import CALL_BYTES, CALL_ROWS, Call, Manner, bulk
from spark_fs.online.codec import ONLINE_SLOTS, key_prefix, shown_key, slot_of
from spark_fs.online.links import open_links
from spark_fs.online.script import forbids_scripts, lacks_function, no_function
from spark_fs.spec import Column, ViewSpec

if TYPE_CHECKING:
    import pyarrow as pa

#: A longer key or value is refused: it would hold up every reader of the server.
MAX_VALUE_BYTES = 512 * 1024
#: Calls sent and not yet answered: enough to keep the server busy while the next rows are encoded.
CALLS_IN_FLIGHT = 16
#: Rows encoded at once are cut at so many bytes; it bounds memory beside the batch itself.
ENCODE_BYTES = 4 * 1024 * 1024
#: For a cluster so many bytes of rows are sorted by tag first: the more of them, the more rows has a call. Some four times
#: as much memory is taken by it.
SORT_BYTES = 32 * 1024 * 1024
#: So many rows are written first, to see whether the server has them already.
TRIAL_ROWS = 2 * CALL_ROWS
#: Tries in a row without one answer before a write to a single server gives up; with the growing pause between
#: them some 6 seconds. Where replicas can take over it is ``connect.FAILOVER_SECONDS``.
MAX_FAILURES = 7


@dataclass(frozen=True, slots=True)
class OnlineTarget:
    """Where and how the rows of one view version are written; small, and survives pickling to the executors.

    ``url`` (``address.parse_address``) is left out of the repr, for it may hold a password.
    With a ``ttl`` Redis drops a row once its event time + ttl has passed; that is clean-up only, for readers judge
    the ttl themselves. ``generation`` counts the restatements of the view that were known when the writer began;
    ``restating``: the rows replace those of lower generations whatever their times. ``erased`` are the digests
    (``codec.key_digest``, made with ``key_space``) of the keys that must never be written. With ``wait_replicas`` a write
    ends by waiting shortly for so many replicas, and tells how many there were. ``max_rows_per_second`` is the share of one
    task of the run's write budget (``pace.Pace``); None: as fast as the server answers.
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
        target = cls(url, key_prefix(view), view.features, generation, view.ttl or None, socket_timeout_seconds)
        return replace(target, key_space=codec.key_space(view), max_rows_per_second=max_rows_per_second or None)

    def of_epoch(self, epoch: int) -> OnlineTarget:
        """The rows of an epoch, where this is the target of epoch 0."""
        return replace(self, prefix=codec.epoch_prefix(self.prefix, epoch))

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
    While most rows turn out to be there already, they are compared here, with what MGET finds, which costs the server a
    fifth of the script's time; only those that differ go on to the script. Rows of erased keys are left out.

    A lost connection, a server that is loading, busy or read-only, and a lost script are retried for some seconds, and
    with sentinels or a cluster long enough for a failover; slots of a cluster may move meanwhile. Repeated rows count as
    equal. Raises SFS-608 for a key or value above 512 KB, SFS-609 for unfit rows, SFS-610 for a key of another program,
    and redis-py's errors as they are (``errors.translate`` knows them). After an error any part of the rows may be
    written; writing them again is safe.
    """
    with Writer(target, distinct=distinct) as writer:
        return writer.write(batches) + writer.await_replicas()


def bury_batches(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> WriteCounts:
    """Put tombstones in the place of rows: batches with ``_key``. The target must be restating.

    A reader finds nothing then, and for ``codec.GRAVE`` no writer of a lower generation can write the keys. Errors as for
    ``write_batches``. Buried keys count as applied, those that a later restatement has written as stale or fenced.
    """
    with Writer(target, distinct=False) as writer:
        return writer.bury(batches) + writer.await_replicas()


class Writer:
    """Several writes one after the other, by the same connections, and by what the ones before have told of the server.

    ``distinct`` promises that no key occurs twice in any of them. Errors as for ``write_batches``; after one it is of no use.
    """

    def __init__(self, target: OnlineTarget, *, distinct: bool) -> None:
        self._target, self._distinct = target, distinct
        #: How the next rows are best written, by what the answers so far tell.
        self._manner = Manner.INSERT if distinct and target.ttl is None and not target.restating else Manner.BY_HASH
        #: How many more rows are written before any are looked up: fewer tell too little of the server.
        self._trial_rows = TRIAL_ROWS
        #: Whether the login may not run scripts, so that the function is called in their place.
        self._by_function = False
        self._looked_for, self._met = 0, 0
        self._counts = WriteCounts()
        self._links = open_links(target.url, target.socket_timeout_seconds, self, calls=CALLS_IN_FLIGHT, tries=MAX_FAILURES)
        self._pace = pace.Pace(target.max_rows_per_second) if target.max_rows_per_second else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._links.disconnect()

    def write(self, batches: Iterator[pa.RecordBatch]) -> WriteCounts:
        """As ``write_batches``, but for the wait for replicas."""
        from spark_fs.online import encode

        target = self._target
        for part in self._parts(batches):
            values = encode.encode_values(part, target.features, target.generation)
            self._send(encode.encode_keys(part), values, part)
            if self._trial_rows:
                self._links.finish()  # the answers tell in what manner the rest is best written
                self._trial_rows = max(0, self._trial_rows - part.num_rows)
        return self._finish()

    def bury(self, batches: Iterator[pa.RecordBatch]) -> WriteCounts:
        """As ``bury_batches``, but for the wait for replicas."""
        import pyarrow as pa

        from spark_fs.online import encode

        tombstone = pa.scalar(codec.tombstone(self._target.generation), pa.large_binary())
        for batch in self._sorted(batches):
            self._send(encode.encode_keys(batch), pa.repeat(tombstone, batch.num_rows), batch)
        return self._finish()

    def await_replicas(self) -> WriteCounts:
        """Wait shortly for the replicas that the target asks for, to have all that was written; gives only their number."""
        if not self._target.wait_replicas:
            return WriteCounts()
        return WriteCounts(replicas=self._links.replicas(self._target.wait_replicas, self._target.socket_timeout_seconds))

    def ready(self, call: Call) -> Call:
        """The call in the manner that is best now, and that the login may use, as far as that is known."""
        if call.manner is Manner.INSERT and self._manner is not Manner.INSERT:
            call = call.for_script()
        return replace(call, manner=Manner.BY_FUNCTION) if self._by_function and call.manner.is_script else call

    def answered(self, call: Call, reply: Any) -> Call | None:
        """Count an answer; gives what is to be sent in the call's place where it was refused."""
        if isinstance(reply, redis.exceptions.NoScriptError):
            # The text of the script loads it again; only this call went unserved.
            return replace(call, manner=Manner.BY_TEXT)
        if isinstance(reply, redis.RedisError):
            if forbids_scripts(reply):
                self._by_function = True
                return call
            raise no_function(reply) if lacks_function(reply) else reply
        if call.manner is Manner.INSERT:
            if not reply:
                if self._manner is Manner.INSERT:
                    self._manner = Manner.BY_HASH
                return call
            self._counts += WriteCounts(applied=call.rows, bytes=call.size)
            return None
        if call.manner is Manner.LOOK:
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

    def _judge(self, call: Call, equal: int) -> None:
        """Look before writing while most rows are there already, as long as looking has found most of those looked for."""
        if call.manner is Manner.LOOK:
            self._looked_for, self._met = self._looked_for + call.rows, self._met + equal
        looks = self._distinct and 2 * equal > call.rows and 2 * self._met >= self._looked_for
        self._manner = Manner.LOOK if looks else Manner.BY_HASH

    def _parts(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The rows to write, in pieces to be encoded at once: first a few, then more."""
        from spark_fs.online import encode

        for batch in self._sorted(map(self._target.without_erased, batches)):
            start = min(self._trial_rows, batch.num_rows)
            if start:
                yield batch.slice(0, start)
            yield from encode.slices(batch.slice(start), ENCODE_BYTES)

    def _sorted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The rows as they come; for a cluster, a call to which may have rows of one slot only, sorted by tag."""
        from spark_fs.online import encode

        return encode.by_tag(batches, SORT_BYTES) if self._links.is_cluster else batches

    def _send(self, keys: Any, values: Any, batch: pa.RecordBatch) -> None:
        """Send rows; waits for the oldest answers while too many calls are open, under a write budget for all of them."""
        from spark_fs.online import encode

        tags = batch.column(encode.TAG) if self._links.is_cluster else None
        for call in _calls(keys, values, self._target, self._manner_now, tags=tags):
            if self._pace is None:
                self._links.send(call)
                continue
            with self._pace.call(call.rows):
                self._links.send(call)
                self._links.finish()

    def _manner_now(self) -> Manner:
        return Manner.BY_HASH if self._trial_rows and self._manner is Manner.LOOK else self._manner

    def _finish(self) -> WriteCounts:
        """Wait for all answers; what became of the rows since the last time."""
        self._links.finish()
        counts, self._counts = self._counts, WriteCounts()
        return counts

    def _foreign_key(self, call: Call, position: int) -> SparkFSError:
        return InvalidError.of(
            "SFS-610",
            f"The online key of entity {shown_key(call.keys[position - 1].as_py())} of {self._target.prefix.decode()} "
            "holds something that spark_fs did not write.",
            why="Nothing of this call was written.",
            fix="give spark_fs a database or a project name of its own, or delete the key",
        )


# ---- rows → calls


def _tail(target: OnlineTarget) -> bytes:
    """The script's last two arguments: the ttl in milliseconds, or nothing, and whether to restate."""
    ttl = b"%d" % -(-target.ttl // timedelta(milliseconds=1)) if target.ttl else b""
    return bulk(ttl) + bulk(b"1" if target.restating else b"0")


def _calls(
    keys: Any, values: Any, target: OnlineTarget, manner_now: Callable[[], Manner], *, tags: Any = None
) -> Iterator[Call]:
    """Rows, as key bytes and stored values, as calls in their order: ≤ CALL_ROWS rows and about CALL_BYTES each.

    Where their ``tags`` are given, each call has rows of one tag, and so of one slot of a cluster. Under a write budget calls
    are smaller (``pace.call_rows``, ``pace.CALL_BYTES``). ``manner_now`` is asked before each call.
    """
    import numpy as np  # numpy and pyarrow are needed to write only: reading does without
    import pyarrow as pa

    from spark_fs.online import encode

    by_slot = tags is not None
    tags = tags.to_numpy() if by_slot else encode.tag_array(keys)
    heads = pa.array([b"%b{%d}:" % (target.prefix, tag) for tag in range(ONLINE_SLOTS)], pa.large_binary())
    names = encode.join(heads.take(pa.array(tags)), keys)
    sizes = [np.diff(encode.offsets(column)) for column in (names, values)]
    _refuse_oversized(keys, sizes)
    ends = np.cumsum(sizes[0] + sizes[1])

    @cache  # for all rows at once, but only in the manners that are asked for
    def framed(manner: Manner) -> list[tuple[memoryview, Any]]:
        columns = [encode.bulk_strings(column) for column in ([names] if manner is Manner.LOOK else [names, values])]
        if manner is Manner.INSERT:  # key, value, key, value …; the script wants all keys, then all values
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
            stop = start + int(np.argmax(np.append(tags[start:stop] != tags[start], True)))
        manner = manner_now()
        pieces: list[bytes | memoryview] = [buffer[cut[start] : cut[stop]] for buffer, cut in framed(manner)]
        pieces += [tail] if manner is Manner.BY_HASH else []
        part_keys, part_names, part_values = (column.slice(start, stop - start) for column in (keys, names, values))
        size = int(sizes[0][start:stop].sum()) if manner is Manner.LOOK else int(ends[stop - 1]) - done
        slot = slot_of(b"%d" % tags[start]) if by_slot else 0
        yield Call(manner, b"".join(pieces), size, part_keys, part_names, part_values, tail, slot)
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

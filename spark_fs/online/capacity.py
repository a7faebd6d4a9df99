"""Whether the rows of a run fit into the online store: told with figures before the first is written.

A full server keeps what it has and refuses the rest, so that a view is half new and half old until there is more memory. What
a run may add is known before: at most one key for each of its rows, each as large as rows of a sample turn out to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import redis

from spark_fs.errors import InvalidError
from spark_fs.online.codec import redis_key
from spark_fs.online.connect import redis_errors
from spark_fs.online.redis_store import OnlineTarget

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows that are written to learn how much memory one takes; more change the mean little.
SAMPLE_ROWS = 200
#: How much of the free memory a run may take: replicas, clients and growing tables need some as well.
MOST_PERCENT = 90
#: How long the rows of the sample stay where their removal fails.
_SAMPLE_LIFE = timedelta(seconds=60)
#: What a server keeps for each key beside what MEMORY USAGE tells: its place in a table that doubles when it is full.
_TABLE_BYTES = 24
#: The same in the table of expiry times, and the entry there.
_EXPIRY_BYTES = 56
#: Of a key that is not measured: the object and the entry that lead to it.
_OBJECT_BYTES, _ENTRY_BYTES = 16, 32


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run may add to the online store: at most ``keys`` keys of ``bytes_per_key`` bytes; ``free_bytes`` are free."""

    keys: int
    bytes_per_key: int
    free_bytes: int

    @property
    def bytes(self) -> int:
        """The memory that the keys take."""
        return self.keys * self.bytes_per_key

    @property
    def fits(self) -> bool:
        """Whether that is nothing, or at most ``MOST_PERCENT`` of what is free."""
        return not self.bytes or 100 * self.bytes <= MOST_PERCENT * self.free_bytes


def check_capacity(demand: Demand, count_new_keys: Callable[[], int]) -> Demand:
    """Refuse what does not fit: InvalidError SFS-621 with the figures.

    ``demand.keys`` is an upper bound, such as the number of rows. Only where so many do not fit ``count_new_keys`` is asked
    how many keys there really are that are not online yet. Returns the demand that was judged last.
    """
    if demand.fits:
        return demand
    demand = replace(demand, keys=min(demand.keys, count_new_keys()))
    if demand.fits:
        return demand
    raise InvalidError.of(
        "SFS-621",
        f"The online store has no room: about {demand.keys:,} new keys of {demand.bytes_per_key:,} bytes take "
        f"{demand.bytes:,} bytes; {max(demand.free_bytes, 0):,} are free.",
        why=f"At most {MOST_PERCENT} % of what is free is used. Nothing was written.",
        fix="raise maxmemory, give the server more memory, or materialize a shorter interval or fewer views; "
        "then run the same command again",
    )


def free_bytes(masters: Sequence[redis.Redis]) -> int | None:
    """How many bytes may still be written to a server, or to all masters of a cluster; None where they do not tell.

    Free is what ``maxmemory`` leaves, or without it the machine's memory. In a cluster keys are spread evenly, so that the
    master with the least room counts for each. Negative for a server that holds more than it may. Raises SFS-601 and SFS-602.
    """
    with redis_errors():
        rooms = [_free_on(master) for master in masters]
    known = [room for room in rooms if room is not None]
    return min(known) * len(rooms) if known else None


def _free_on(master: redis.Redis) -> int | None:
    memory: Any = master.info("memory")
    if limit := int(memory.get("maxmemory", 0)):
        return limit - int(memory["used_memory"])
    machine = int(memory.get("total_system_memory", 0))
    return machine - int(memory["used_memory_rss"]) if machine else None


def bytes_per_key(sample: pa.RecordBatch, target: OnlineTarget, masters: Sequence[redis.Redis]) -> int:
    """The memory that a row takes online, on average over the first ``SAMPLE_ROWS`` rows of a batch; 0 for no rows.

    The batch is as for ``redis_store.write_batches``. Its rows are written to one of the masters, under names that no reader or
    run looks at, measured by MEMORY USAGE and removed. Where that is not allowed, or the server is full, the size is
    computed. Raises SFS-609 for rows that do not fit their types, SFS-601 and SFS-602.
    """
    from spark_fs.online import encode

    rows = sample.slice(0, SAMPLE_ROWS)
    if not rows.num_rows:
        return 0
    names = [redis_key(target.prefix, key) for key in encode.encode_keys(rows).to_pylist()]
    values = encode.encode_values(rows, target.features, target.generation).to_pylist()
    # A reader asks for ``prefix{tag}:key``, and SCAN for what begins with ``prefix{``: these names stay in their slot.
    aside = [b"%b~%b" % (target.prefix, name.removeprefix(target.prefix)) for name in names]
    measured = _measured(aside, values, masters)
    sizes = measured or [_computed(name, value) for name, value in zip(names, values, strict=True)]
    return -(-sum(sizes) // len(sizes)) + _TABLE_BYTES + (_EXPIRY_BYTES if target.ttl else 0)


def _measured(names: Sequence[bytes], values: Sequence[bytes], masters: Sequence[redis.Redis]) -> list[int]:
    """What MEMORY USAGE says of the values under these names, of those that it says something of."""
    for master in masters:
        pipeline: Any = master.pipeline(transaction=False)
        for name, value in zip(names, values, strict=True):
            pipeline.set(name, value, px=_SAMPLE_LIFE)
            pipeline.memory_usage(name, samples=0)
            pipeline.unlink(name)
        with redis_errors():
            replies = pipeline.execute(raise_on_error=False)
        # An error is an answer too: not allowed, no memory, or in a cluster a key of another master.
        sizes = [size for size in replies[1::3] if isinstance(size, int)]
        if sizes:
            return sizes
    return []


def _computed(name: bytes, value: bytes) -> int:
    """What MEMORY USAGE would say of a key, about."""
    return _allocated(len(name)) + _allocated(len(value)) + _OBJECT_BYTES + _ENTRY_BYTES


def _allocated(length: int) -> int:
    """The memory that Redis takes for a string of so many bytes: with a header, in one of the sizes that its allocator has."""
    size = length + (4 if length < 256 else 6 if length < 65_536 else 10)
    step = 16 if size <= 128 else 1 << ((size - 1).bit_length() - 3)  # four sizes from each power of two to the next
    return -(-size // step) * step


def share_online(keys: Sequence[bytes], target: OnlineTarget, masters: Sequence[redis.Redis]) -> float:
    """The share of the view's entities with these key bytes that are online, from 0 to 1; 0 where none could be asked for.

    Raises SFS-601 and SFS-602.
    """
    there, asked = 0, 0
    for master in masters:
        pipeline: Any = master.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(redis_key(target.prefix, key))
        with redis_errors():
            replies = pipeline.execute(raise_on_error=False)
        answers = [reply for reply in replies if isinstance(reply, int)]  # each key is one master's
        there, asked = there + sum(answers), asked + len(answers)
    return there / asked if asked else 0.0

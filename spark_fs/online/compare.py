"""What is stored online beside what should be: row by row and feature by feature, in Spark's workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from spark_fs.online.codec import HEADER, SIGN_BIT, Decoder, read_header, redis_key, schema_id
from spark_fs.online.connect import Client, masters, open_client, redis_errors, scanned
from spark_fs.online.lookup import stored_values
from spark_fs.online.redis_store import OnlineTarget

if TYPE_CHECKING:
    import pyarrow as pa

#: The row or value is as it should be. EXPIRED: past its ttl, so that readers see none, whatever is stored.
EQUAL, EXPIRED = "equal", "expired"
#: Something else is stored, and that is known to be right: by a restatement, or by a run that was not noted as published.
RESTATED, AHEAD = "restated", "ahead"
#: What is wrong: no row; an older row; another value, or a value of another schema; a row of a key that should have none.
MISSING, STALE, WRONG, EXTRA = "missing", "stale", "wrong", "extra"
FAULTS = (MISSING, STALE, WRONG, EXTRA)

#: Keys asked for at once.
_CALL_KEYS = 500
_FINDING = ("feature", "status", "rows", "key", "expected", "found")
#: The columns of what ``compare_rows`` yields: a count of rows by feature and status (no key), or one finding.
FINDINGS = "feature string, status string, rows bigint, key binary, expected string, found string"
#: How long a value is shown at most.
_SHOWN = 200
_TIMES = slice(4, 20)  # of a header: event and created time


def compare_rows(batches: Iterator[pa.RecordBatch], target: OnlineTarget, restated: frozenset[int]) -> Iterator[pa.RecordBatch]:
    """Compare rows that should be online with what is; batches as for ``redis_store.write_batches``, keys distinct.

    Yields ``FINDINGS``: for each feature and status how many rows, and one finding for each value that is at fault, or
    with no feature for a row that is. A row older than the one expected is restated where its generation is one of
    ``restated``. Erased keys are left out. Age is judged by the server's clock just after it was asked for the row.
    """
    from spark_fs.online import encode

    judge = _judge(target, restated)
    counts: Counter[tuple[str, str]] = Counter()
    with redis_errors(), open_client(target.url, socket_timeout_seconds=target.socket_timeout_seconds) as client:
        for batch in batches:
            kept = target.without_erased(batch)
            keys = encode.encode_keys(kept).to_pylist()
            expected = encode.encode_values(kept, target.features, target.generation).to_pylist()
            findings: list[tuple[Any, ...]] = []
            for start in range(0, len(keys), _CALL_KEYS):
                part = slice(start, start + _CALL_KEYS)
                stored, now_us = _stored(client, [redis_key(target.prefix, key) for key in keys[part]])
                for key, wanted, found in zip(keys[part], expected[part], stored, strict=True):
                    faults = judge(wanted, found, now_us, counts)
                    findings += [(feature, status, 1, key, *shown) for feature, status, *shown in faults]
            if findings:
                yield _batch(findings)
    yield _batch([(feature, status, rows, None, None, None) for (feature, status), rows in counts.items()])


def _stored(client: Client, names: Sequence[bytes]) -> tuple[list[bytes | None], int]:
    """What is stored under these names, and the time after that, in microseconds since 1970, of the server furthest ahead.

    It is the clock by which servers drop rows: one that has gone by itself is past its ttl at that time.
    """
    stored, times = stored_values(client, names), [server.time() for server in masters(client)]
    return stored, max(seconds * 1_000_000 + micros for seconds, micros in times)


def stored_keys(batches: Iterator[pa.RecordBatch], target: OnlineTarget) -> Iterator[pa.RecordBatch]:
    """The key bytes of all rows that are online, as ``_key``, some of them perhaps twice; tombstones are none. For one task.

    ``_erased``: whether the key must not be there.
    """
    import pyarrow as pa

    for _ in batches:
        pass
    with redis_errors(), open_client(target.url, socket_timeout_seconds=target.socket_timeout_seconds) as client:
        for server in masters(client):
            for names in scanned(server, target.prefix):
                lengths = server.pipeline(transaction=False)
                for name in names:
                    lengths.strlen(name)
                rows = [name for name, length in zip(names, lengths.execute(), strict=True) if length != HEADER.size]
                # After the prefix comes the tag in braces, then a colon.
                keys = [name[len(target.prefix) :].partition(b"}:")[2] for name in rows]
                columns = {"_key": pa.array(keys, pa.binary()), "_erased": pa.array(target.is_erased(keys), pa.bool_())}
                yield pa.RecordBatch.from_pydict(columns)


def _judge(target: OnlineTarget, restated: frozenset[int]) -> Callable[..., list[tuple[Any, ...]]]:
    """(expected value, stored value or None, clock, counts) → what is at fault: (feature or None, status, expected, found)."""
    names = [feature.name for feature in target.features]
    decode, schema = Decoder(target.features).decode, schema_id(target.features)
    ttl_us = target.ttl // timedelta(microseconds=1) if target.ttl else None

    def judge(expected: bytes, stored: bytes | None, now_us: int, counts: Counter[tuple[str, str]]) -> list[tuple[Any, ...]]:
        oldest_us = -SIGN_BIT if ttl_us is None else now_us - ttl_us
        status = _row_status(expected, stored, schema, restated, oldest_us)
        if status is not None:
            counts.update((name, status) for name in names)
            if status not in FAULTS:
                return []
            return [(None, status, str(read_header(expected)), None if stored is None else _header_of(stored))]
        assert stored is not None
        # A later build of the same rows is not sent again; where values differ the older one tells.
        build, of = read_header(stored).build, read_header(expected).build
        fault = WRONG if build == of else STALE if build < of else AHEAD
        findings = []
        for name, wanted, found in zip(names, decode(expected), decode(stored), strict=True):
            # By their text, in which NaN is NaN; and as runs compare them, for which 0.0 is -0.0.
            same = repr(wanted) == repr(found) or wanted == found
            counts[name, EQUAL if same else fault] += 1
            findings += [] if same or fault == AHEAD else [(name, fault, repr(wanted)[:_SHOWN], repr(found)[:_SHOWN])]
        return findings

    return judge


def _row_status(expected: bytes, stored: bytes | None, schema: int, restated: frozenset[int], oldest_us: int) -> str | None:
    """What is to be said of the row as a whole; None where its values have to be compared."""
    if read_header(expected).event_us < oldest_us:
        return EXPIRED
    if stored is None or len(stored) == HEADER.size:
        return MISSING
    if len(stored) < HEADER.size or read_header(stored).schema_id != schema:
        return WRONG
    if stored[4:] == expected[4:]:
        return EQUAL
    if stored[_TIMES] != expected[_TIMES]:
        if stored[_TIMES] > expected[_TIMES]:
            return AHEAD
        return RESTATED if read_header(stored).generation in restated else STALE
    return None


def _header_of(stored: bytes) -> str:
    return str(read_header(stored)) if len(stored) >= HEADER.size else f"{len(stored)} bytes"


def _batch(rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.int64(), pa.binary(), pa.string(), pa.string())
    columns = zip(*rows, strict=True) if rows else ([] for _ in types)
    arrays = [pa.array(list(values), type_) for values, type_ in zip(columns, types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=list(_FINDING))

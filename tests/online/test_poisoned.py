"""One row that cannot be written stops the run; the error names its entity, so that it can be found at the source."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from spark_fs.errors import ExitCode, InvalidError, SparkFSError, UnavailableError, translate
from spark_fs.online import encode
from spark_fs.online.redis_store import bury_batches, write_batches
from spark_fs.spec import Column
from spark_fs.types import Bytes, Decimal, Embedding, Int64, Timestamp
from tests.online.servers import NOON, batch, target_of, view_of

FEATURES = (Column("n", Int64), Column("v", Embedding(2)), Column("d", Decimal(4, 2)), Column("t", Timestamp))
INSTANT, ROWS = pa.timestamp("us", tz="UTC"), 50
NAMES = [b"user-%d" % number for number in range(ROWS)]


def good(**changed: pa.Array) -> pa.RecordBatch:
    """Rows of all the features, with some columns replaced."""
    rows = batch(NAMES, features=FEATURES, n=range(ROWS), v=[[1.0, 2.0]] * ROWS)
    for name, column in changed.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def but(value: Any, wrong: Any, kind: pa.DataType, places: tuple[int, ...] = (7, 20, 41)) -> pa.Array:
    """A column of one value, but for some places."""
    return pa.array([wrong if place in places else value for place in range(ROWS)], kind)


NANO = pa.timestamp("ns", tz="UTC")
POISON: dict[str, tuple[Callable[[], pa.RecordBatch], str]] = {
    "a fraction": (lambda: good(n=but(1.0, 1.5, pa.float64())), "'n' is not int64"),
    "no number": (lambda: good(n=but("1", "one\ntwo", pa.string())), "'n' is not int64"),
    "too large": (lambda: good(n=but(1, 2**64 - 1, pa.uint64())), "'n' is not int64"),
    "too many digits": (lambda: good(d=but(1, 1_000, pa.decimal128(6, 0))), "'d' is not decimal(4,2)"),
    "nanoseconds": (lambda: good(t=but(1_000, 1_001, NANO)), "'t' is not timestamp"),
    "a short vector": (lambda: good(v=but([0.0, 1.0], [0.0], pa.list_(pa.float32()))), "vectors of length 1"),
    "no event time": (lambda: good(event_timestamp=but(NOON, None, INSTANT)), "no event time"),
    "an event time in nanoseconds": (lambda: good(event_timestamp=but(1_000, 1_001, NANO)), "event time is no instant"),
    "a created time in nanoseconds": (lambda: good(created_timestamp=but(None, 1_001, NANO)), "created time is no instant"),
    "no build": (lambda: good(_build=but(1, None, pa.int64())), "no build"),
    "a negative build": (lambda: good(_build=but(1, -1, pa.int64())), "number of the build"),
    "a value too long": (
        lambda: batch(
            NAMES, features=(Column("b", Bytes),), b=[b"x" * (600_000 if n in (7, 20, 41) else 1) for n in range(ROWS)]
        ),
        "takes 600,0",
    ),
}


@pytest.mark.parametrize("what", POISON)
def test_a_poisoned_row_is_named_and_counted(url: str, client: redis.Redis, what: str) -> None:
    """The first of three in fifty rows, on one line, for that is what comes out of a Spark worker; nothing is written."""
    make, words = POISON[what]
    rows = make()
    features = FEATURES if "n" in rows.schema.names else (Column("b", Bytes),)
    with pytest.raises(InvalidError, match=r"SFS-60[89]") as caught:
        write_batches(iter([rows]), target_of(url, view_of(features=features)))
    told = str(caught.value)
    assert "'user-7'" in told
    assert "3 of 50 rows here are so" in told
    assert words in told
    assert "\n" not in told
    assert client.dbsize() == 0


def test_types_that_do_not_go_together_name_no_row() -> None:
    """It is no row's fault."""
    with pytest.raises(InvalidError, match=r"SFS-609.*'n' is not int64") as caught:
        encode.encode_values(good(n=pa.array([[1]] * ROWS, pa.list_(pa.int64()))), FEATURES, 1)
    assert "user-" not in str(caught.value)


def test_of_a_row_without_key_the_event_time_is_told(url: str) -> None:
    """There is nothing else to find it by; a row to be buried has not even that."""
    keys = pa.array([None if n == 3 else name for n, name in enumerate(NAMES)], pa.binary())
    events = pa.array([NOON + timedelta(hours=n) for n in range(ROWS)], INSTANT)
    with pytest.raises(InvalidError, match=r"SFS-609.*1 of 50 rows.*null join key.*2013-07-01 15:00:00"):
        write_batches(iter([good(_key=keys, event_timestamp=events)]), target_of(url, view_of(features=FEATURES)))
    with pytest.raises(InvalidError, match=r"SFS-609.*1 of 50 rows have a null join key\. Fix"):
        bury_batches(iter([pa.RecordBatch.from_pydict({"_key": keys})]), replace(target_of(url), generation=2, restating=True))


def test_a_key_is_shown_escaped_and_short() -> None:
    """Whatever bytes it has."""
    for key, shown in ((b"a\r\n\xff", r"'a\r\n\xff'"), (b"k" * 500, "'" + "k" * 79 + "…")):
        rows = batch([key], features=(Column("n", Int64),))
        with pytest.raises(InvalidError) as caught:
            encode.encode_values(rows.set_column(4, "n", pa.array([0.5])), (Column("n", Int64),), 1)
        assert f"the first of entity {shown}." in str(caught.value)


@pytest.mark.parametrize("seed", range(5))
def test_lossy_values_are_found_wherever_they_are(seed: int) -> None:
    """Any of them, none, or all; a slice of a column is as good as a column."""
    choose = random.Random(seed)
    wrong = [choose.random() < (0.0, 0.01, 0.3, 0.9, 1.0)[seed] for _ in range(1_000)]
    column = pa.array([0.5] * 10 + [number + 0.5 if bad else float(number) for number, bad in enumerate(wrong)]).slice(10)
    assert encode._lossy(column, pa.int64()).tolist() == wrong, f"seed {seed}"


def test_one_bad_value_among_many_is_found_without_looking_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """About two casts for each halving: 40 of them for a million values."""
    column = pa.array(np.where(np.arange(1_000_000) == 777_777, 0.5, 1.0))
    pieces = []

    class Counted:
        """A column that counts its slices."""

        def __len__(self) -> int:
            return len(column)

        def slice(self, start: int, length: int) -> pa.Array:
            pieces.append(length)
            return column.slice(start, length)

    assert np.flatnonzero(encode._lossy(Counted(), pa.int64())).tolist() == [777_777]
    assert len(pieces) <= 45


# ---- the way to the driver


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (InvalidError.of("SFS-608", "The value of entity 'a' is too long.", fix="mend it"), ExitCode.INVALID),
        (UnavailableError.of("SFS-601", "The online store cannot be reached."), ExitCode.FAILED),
        (SparkFSError.of("SFS-603", "The online store is full."), ExitCode.FAILED),
    ],
)
def test_an_error_of_a_worker_keeps_its_kind(error: SparkFSError, exit_code: ExitCode) -> None:
    """From the text that Spark makes of it: whether a scheduler may try again goes by the kind."""
    name = f"{type(error).__module__}.{type(error).__name__}"
    told = translate(RuntimeError(f"Job aborted.\nTraceback (most recent call last):\n  File x\n{name}: {error}\n"))
    assert told is not None
    assert type(told) is type(error)
    assert (told.exit_code, told.retryable, str(told)) == (exit_code, error.retryable, str(error))
    assert pickle.loads(pickle.dumps(told)).problems == told.problems


def test_an_error_in_a_text_of_another_kind_is_still_ours() -> None:
    """Without its class before it, or with that of a stranger."""
    for text in ("it said: [SFS-608] too long", "spark_fs.errors.Stranger: [SFS-608] too long"):
        told = translate(RuntimeError(text))
        assert told is not None
        assert (type(told), str(told)) == (SparkFSError, "[SFS-608] too long")

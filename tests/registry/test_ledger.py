"""What runs meant to publish and have confirmed, and who may work on a view: on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import pytest
import sqlalchemy as sa

from spark_fs import ledger
from spark_fs.errors import ConflictError
from spark_fs.ledger import Part
from spark_fs.registry import Registry
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Float64, Int64

UTC = timezone.utc
SOURCE = SourceSpec("payments", "delta", "paid_at", path="data/payments")
VIEW = ViewSpec("shop", "spending", 1, ("user",), (Column("user_id", Int64),), (Column("amount", Float64),), SOURCE)
PLAN = {"todo": {"fresh": [[0, 1]], "compared": []}, "buckets": 4}


def part(bucket: int, applied: int, step: str = "fresh", generation: int = 1) -> Part:
    return Part(step, bucket, generation, {"applied": applied})


def test_what_a_run_left_is_found_with_its_confirmed_buckets(registry, url):
    """Oldest first, by any process; a bucket that is noted again has the new counts; what is finished is left no more."""
    first = registry.ledger.begin(VIEW, "run1", PLAN, "mark1")
    second = registry.ledger.begin(VIEW, "run2", {**PLAN, "buckets": 2}, "mark2")
    registry.ledger.note_parts(first, [part(3, 10), part(1, 20)])
    registry.ledger.note_parts(first, [part(3, 11)])
    left = Registry(url, "shop").ledger.unfinished(VIEW)
    assert [(intent.run_id, intent.token, intent.plan["buckets"]) for intent in left] == [
        ("run1", "mark1", 4),
        ("run2", "mark2", 2),
    ]
    assert left[0].parts == (part(1, 20), part(3, 11))
    assert [intent.buckets_left for intent in left] == [2, 2]
    registry.ledger.finish(first)
    assert [intent.intent_id for intent in registry.ledger.unfinished(VIEW)] == [second]
    (shown,) = registry.ledger.of_run("run1")
    assert (shown.state, shown.view, shown.buckets_left, len(shown.parts)) == ("done", "spending@1", 0, 2)
    assert Registry(url, "other").ledger.unfinished(VIEW) == Registry(url, "other").ledger.of_run("run1") == []


def test_of_what_is_done_the_last_is_kept(registry, monkeypatch):
    """The ledger does not grow for ever; what is not done stays, and so does what other views have."""
    monkeypatch.setattr(ledger, "KEPT_INTENTS", 2)
    other = ViewSpec("shop", "other", 1, ("user",), VIEW.keys, VIEW.features, SOURCE)
    left = registry.ledger.begin(VIEW, "left", PLAN, "mark")
    kept = registry.ledger.begin(other, "other", PLAN, "mark")
    registry.ledger.finish(kept)
    for number in range(4):
        intent = registry.ledger.begin(VIEW, f"run{number}", PLAN, "mark")
        registry.ledger.note_parts(intent, [part(0, number)])
        registry.ledger.finish(intent)
    assert [len(registry.ledger.of_run(f"run{number}")) for number in range(4)] == [0, 0, 1, 1]
    assert registry.ledger.of_run("run3")[0].parts == (part(0, 3),)
    assert [intent.intent_id for intent in registry.ledger.unfinished(VIEW)] == [left]
    assert len(registry.ledger.of_run("other")) == 1


def test_forgetting_a_view_leaves_nothing_of_it(registry):
    """Its table and its online values are gone."""
    intent = registry.ledger.begin(VIEW, "run1", PLAN, "mark1")
    registry.ledger.note_parts(intent, [part(0, 1)])
    assert registry.ledger.take(VIEW, "run1", 60) is None
    registry.forget_builds(VIEW)
    assert registry.ledger.unfinished(VIEW) == registry.ledger.of_run("run1") == []
    assert registry.ledger.take(VIEW, "run2", 60) is None


def test_a_view_is_one_runs_at_a_time(registry, url):
    """Others are told whose; a run may take its own again, and what is given back is free."""
    assert registry.ledger.take(VIEW, "run1", 60) is None
    there = Registry(url, "shop").ledger.take(VIEW, "run2", 60)
    assert there is not None
    assert (there.run_id, there.pid) == ("run1", os.getpid())
    assert there.holder.endswith(f"@{there.host}")
    assert datetime.fromisoformat(there.expires_at) > datetime.now(UTC)
    assert registry.ledger.take(VIEW, "run1", 60) is None
    registry.ledger.release(VIEW, "run2")
    assert registry.ledger.take(VIEW, "run2", 60) is not None
    registry.ledger.release(VIEW, "run1")
    assert registry.ledger.take(VIEW, "run2", 60) is None
    assert not registry.ledger.renew(VIEW, "run1", 60)
    assert registry.ledger.renew(VIEW, "run2", 60)


def test_a_lease_that_ran_out_is_taken_over_and_its_run_noted_as_interrupted(registry):
    """The run that lost it is told so when it renews."""
    registry.begin_run("run1", "materialize", "spending@1")
    assert registry.ledger.take(VIEW, "run1", 0.05) is None
    assert registry.ledger.take(VIEW, "run2", 60) is not None
    time.sleep(0.06)
    assert registry.ledger.take(VIEW, "run2", 60) is None
    assert not registry.ledger.renew(VIEW, "run1", 60)
    (run,) = registry.runs()
    assert (run["state"], run["details"]) == ("interrupted", {"taken_over_by": "run2"})


def test_the_lease_of_a_process_that_was_killed_here_is_free_at_once(registry, url):
    """Nobody waits a minute on the machine where everybody can see that it is dead."""
    script = """
import sys
from spark_fs.registry import Registry
from tests.registry.test_ledger import VIEW
assert Registry(sys.argv[1], "shop").ledger.take(VIEW, "dead", 600) is None
print("taken", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        assert registry.ledger.take(VIEW, "run2", 60) is not None
        process.kill()
        # Not waited for: what is left of it is a zombie.
        deadline = time.monotonic() + 20
        while (there := registry.ledger.take(VIEW, "run2", 60)) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert there is None


def test_of_many_that_take_at_once_one_gets_it(url):
    """Also when it is the first lease of the view, and when one that ran out is taken over."""
    many = 8
    registries = [Registry(url, "shop") for _ in range(many)]
    barrier = threading.Barrier(many)

    def take(number: int) -> list[int]:
        barrier.wait()
        return [number] if registries[number].ledger.take(VIEW, f"{turn}-{number}", 3 if turn == 0 else 60) is None else []

    with ThreadPoolExecutor(many) as pool:
        for turn in range(2):
            time.sleep(3.1 * turn)
            assert sum(len(won) for won in pool.map(take, range(many))) == 1


def test_a_run_waits_for_another_and_is_told_if_that_takes_too_long(registry, url, monkeypatch):
    """SFS-617, exit code 6, names the other; a run that lives keeps its lease beyond its first end."""
    monkeypatch.setattr(ledger, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(ledger, "_RENEW_SECONDS", 0.1)
    other = Registry(url, "shop").ledger
    with registry.ledger.held(VIEW, "run1", 0):
        with pytest.raises(ConflictError, match=r"SFS-617.*spending@1.*run1") as caught, other.held(VIEW, "run2", 1.0):
            pass
        assert caught.value.exit_code == 6

    def wait() -> str:
        with other.held(VIEW, "run2", 20), sa.create_engine(url).connect() as connection:
            return str(connection.execute(sa.text("SELECT run_id FROM sfs_leases")).scalar())

    with ThreadPoolExecutor(1) as pool:
        with registry.ledger.held(VIEW, "run1", 0):
            waiting = pool.submit(wait)
            time.sleep(1)
            assert not waiting.done()
        assert waiting.result() == "run2"

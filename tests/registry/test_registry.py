"""The contract of the registry, held by SQLite and by PostgreSQL alike: serials, versions, builds, runs, datasets."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from spark_fs.errors import ConflictError, InvalidError, SparkFSError, UnavailableError
from spark_fs.intervals import Interval
from spark_fs.ledger import Published
from spark_fs.registry import Change, Registry
from spark_fs.registry_tables import FORMAT
from spark_fs.spec import Column, ServiceSpec, ServiceView, SourceSpec, ViewSpec
from spark_fs.types import Float64, Int64

NOON = datetime(2013, 7, 1, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
TODAY = Interval(NOON - 12 * HOUR, NOON + 12 * HOUR)
SOURCE = SourceSpec("payments", "delta", "paid_at", path="data/payments")
VIEW = ViewSpec("shop", "spending", 1, ("user",), (Column("user_id", Int64),), (Column("amount", Float64),), SOURCE)
CHURN = ServiceSpec("churn", (ServiceView("spending", 1),))

#: Applies until it has won so often, then begins builds; prints what it won. Run by several processes at once.
WORKER = """
import json, sys
from datetime import datetime, timezone
from spark_fs.errors import ConflictError
from spark_fs.intervals import Interval
from spark_fs.registry import Change, Registry
from spark_fs.spec import ViewSpec

url, name, wins, builds, view = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5])
registry, view = Registry(url, "shop"), ViewSpec.from_json(view)
interval = Interval(datetime(2013, 7, 1, tzinfo=timezone.utc), datetime(2013, 7, 2, tzinfo=timezone.utc))
sys.stdin.readline()
won = []
while len(won) < wins:
    try:
        change = Change("entity", f"{name}_{len(won)}", 0, {"name": name, "number": len(won)})
        won.append(registry.commit(registry.state().serial, [change], f"{name} {len(won)}"))
    except ConflictError:
        pass
print(json.dumps({"serials": won, "builds": [registry.begin_build(view, interval) for _ in range(builds)]}))
"""


def add(*views: ViewSpec, services: tuple[ServiceSpec, ...] = ()) -> list[Change]:
    return [
        *(Change("view", view.name, view.version, view.to_json()) for view in views),
        *(Change("service", service.name, 0, service.to_json()) for service in services),
    ]


def run_sql(url: str, *statements: str) -> None:
    """Change the database behind the registry's back."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


# Definitions.


def test_a_new_registry_is_empty_at_serial_zero(registry):
    """Nothing is applied, and asking for something says so."""
    state = registry.state()
    assert (state.serial, state.views, state.services, registry.history()) == (0, {}, {}, [])
    with pytest.raises(InvalidError, match=r"SFS-303.*no feature view 'spending'.*Fix: run spark-fs apply"):
        state.require_view("spending")


def test_what_was_applied_is_what_is_read(registry, url):
    """Also by another process: specs are equal, down to types and ttl."""
    entity = {"name": "user", "tags": {"é": "ü"}}
    changes = [
        Change("entity", "user", 0, entity),
        Change(
            "source",
            "payments",
            0,
            {"name": "payments", "kind": "delta", "timestamp_field": "paid_at", "path": "data/payments"},
        ),
        *add(VIEW, services=(CHURN,)),
    ]
    assert registry.commit(0, changes, "first") == 1
    state = Registry(url, "shop").state()
    assert (state.serial, state.entities, state.sources) == (1, {"user": entity}, {"payments": SOURCE})
    assert (state.views, state.services) == ({"spending": VIEW}, {"churn": CHURN})


def test_old_versions_stay_readable(registry):
    """The newest is the current one; each can be asked for by number."""
    two = ViewSpec.from_json({**VIEW.to_json(), "version": 2, "owner": "me"})
    registry.commit(0, add(VIEW), "one")
    registry.commit(1, add(two), "two")
    state = registry.state()
    assert state.views == {"spending": two}
    assert state.require_view("spending", 1) == VIEW
    with pytest.raises(InvalidError, match=r"no feature view 'spending@3'.*Known: spending@1, spending@2"):
        state.require_view("spending", 3)


def test_a_removed_view_keeps_its_versions_and_other_objects_go(registry):
    """Tables and datasets of the view may still be there."""
    registry.commit(0, [*add(VIEW, services=(CHURN,)), Change("entity", "user", 0, {"name": "user"})], "all")
    gone = [Change("view", "spending", 1, None), Change("service", "churn", 0, None), Change("entity", "user", 0, None)]
    registry.commit(1, gone, "none")
    state = registry.state()
    assert (state.views, state.services, state.entities) == ({}, {}, {})
    assert state.require_view("spending", 1) == VIEW


def test_projects_in_one_database_do_not_meet(registry, url):
    """Each has its own serial, definitions, builds, runs and datasets."""
    other = Registry(url, "bank")
    registry.commit(0, add(VIEW), "shop")
    registry.begin_build(VIEW, Interval(NOON, NOON + HOUR))
    registry.begin_run("r1", "build", "spending@1")
    registry.datasets.add("d", 1, {"name": "d", "version": 1})
    registry.set_published(VIEW, None, Published(1, (TODAY,)), 1)
    registry.raise_generation(VIEW)
    registry.erase(VIEW, [b"digest"])
    assert (other.state().serial, other.state().views, other.history(), other.runs(), other.datasets.all()) == (
        0,
        {},
        [],
        [],
        [],
    )
    assert (other.published(VIEW), other.generation(VIEW), other.erased(VIEW)) == (None, 1, frozenset())
    assert other.begin_build(VIEW, Interval(NOON, NOON + HOUR)) == 1
    assert other.commit(0, [], "bank") == 1


@pytest.mark.parametrize("planned_at", [0, 1, 3, 99])
def test_a_commit_against_another_serial_changes_nothing(registry, planned_at):
    """SFS-305, exit code 6: neither older, nor newer, nor never."""
    registry.commit(0, add(VIEW), "one")
    registry.commit(1, [], "two")
    before = registry.state()
    with pytest.raises(ConflictError, match=rf"SFS-305.*planned against serial {planned_at}") as caught:
        registry.commit(planned_at, [Change("view", "spending", 1, None)], "late")
    assert (caught.value.exit_code, caught.value.retryable) == (6, True)
    assert registry.state() == before
    assert [apply["serial"] for apply in registry.history()] == [2, 1]


def test_a_commit_that_fails_half_way_changes_nothing(registry):
    """Neither the serial nor the objects before the one that cannot be written."""
    registry.commit(0, add(VIEW), "one")
    before = registry.state()
    with pytest.raises(TypeError):
        registry.commit(
            1, [Change("entity", "user", 0, {"name": "user"}), Change("entity", "bad", 0, {"name": object()})], "two"
        )
    assert registry.state() == before
    assert registry.commit(1, [], "three") == 2


def test_the_history_names_serial_time_person_and_summary(registry):
    """Newest first; times are UTC."""
    registry.commit(0, [], "one")
    registry.commit(1, [], "two")
    newest, oldest = registry.history()
    assert (newest["serial"], newest["summary"], oldest["summary"]) == (2, "two", "one")
    assert newest["by"]
    assert newest["at"].endswith("Z")


def test_a_state_is_all_from_one_moment(url):
    """Whoever applies while it is read comes wholly before or wholly after."""
    reader, writer = Registry(url, "shop"), Registry(url, "shop")
    writer.commit(0, [Change("entity", "serial", 0, {"number": 1})], "one")
    threads: list[threading.Thread] = []

    def apply_in_between(connection, cursor, statement, *_):
        if "sfs_serials" in statement and statement.startswith("SELECT") and not threads:
            change = Change("entity", "serial", 0, {"number": 2})
            threads.append(threading.Thread(target=writer.commit, args=(1, [change], "two")))
            threads[0].start()
            threads[0].join(timeout=1)  # where the reader keeps it out, it comes in afterwards

    sa.event.listen(sa.Engine, "after_cursor_execute", apply_in_between)
    try:
        state = reader.state()
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", apply_in_between)
        threads[0].join()
    assert state.entities["serial"]["number"] == state.serial
    assert reader.state().entities["serial"]["number"] == reader.state().serial == 2


# Many at once.


def test_of_many_processes_that_apply_one_wins_each_serial_and_nothing_is_lost(registry, url):
    """Eight processes, three wins each: serials without gap or double, every object and apply there; builds likewise."""
    processes, wins, builds = 8, 3, 5
    registry.commit(0, add(VIEW), "first")
    argv = [sys.executable, "-c", WORKER, url]
    workers = [
        subprocess.Popen(
            [*argv, f"w{n}", str(wins), str(builds), json.dumps(VIEW.to_json())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(processes)
    ]  # fmt: skip
    with ThreadPoolExecutor(processes) as pool:
        answers = list(pool.map(lambda worker: worker.communicate("go\n", timeout=120), workers))
    assert [(w.returncode, error[-500:]) for w, (_, error) in zip(workers, answers, strict=True)] == [(0, "")] * processes
    results = [json.loads(out) for out, _ in answers]

    assert sorted(serial for r in results for serial in r["serials"]) == list(range(2, 2 + processes * wins))
    state = registry.state()
    assert state.serial == 1 + processes * wins
    assert set(state.entities) == {f"w{n}_{i}" for n in range(processes) for i in range(wins)}
    assert [a["serial"] for a in registry.history()] == list(range(state.serial, 0, -1))
    assert sorted(number for r in results for number in r["builds"]) == list(range(1, 1 + processes * builds))


@pytest.mark.parametrize("attempt", range(3))
def test_many_may_open_a_new_registry_at_once(url, attempt):
    """One of them makes the tables; all of them can use it."""
    many = 8
    barrier = threading.Barrier(many)

    def open_and_read(_: int) -> int:
        barrier.wait()
        return Registry(url, "shop").state().serial

    with ThreadPoolExecutor(many) as pool:
        assert list(pool.map(open_and_read, range(many))) == [0] * many


def test_builds_begun_at_once_get_numbers_of_their_own(url):
    """A number signs rows of the feature table: it must be nobody else's."""
    many = 8
    registries = [Registry(url, "shop") for _ in range(many)]
    barrier = threading.Barrier(many)

    def begin(registry: Registry) -> list[int]:
        barrier.wait()
        return [registry.begin_build(VIEW, Interval(NOON, NOON + HOUR)) for _ in range(5)]

    with ThreadPoolExecutor(many) as pool:
        numbers = [number for begun in pool.map(begin, registries) for number in begun]
    assert sorted(numbers) == list(range(1, 5 * many + 1))


def test_of_runs_that_publish_at_once_one_is_noted(url):
    """Also when it is the view's first: each round is one of a new view version."""
    many = 8
    registries = [Registry(url, "shop") for _ in range(many)]
    barrier = threading.Barrier(many)

    for version in range(1, 21):
        view, before = replace(VIEW, version=version), None
        for turn in range(2):

            def publish(
                numbered: tuple[int, Registry], view: ViewSpec = view, before: Published | None = before, turn: int = turn
            ) -> list[int]:
                mine = 100 * turn + numbered[0]
                barrier.wait()
                return [mine] if numbered[1].set_published(view, before, Published(mine, (TODAY,)), 1) else []

            with ThreadPoolExecutor(many) as pool:
                won = [number for numbers in pool.map(publish, enumerate(registries)) for number in numbers]
            before = registries[0].published(view)
            assert before is not None
            assert won == [before.table_version]


def test_generations_raised_at_once_are_all_different(url):
    """Each restatement has a number of its own, and the last is the one that writers take up."""
    many = 8
    registries = [Registry(url, "shop") for _ in range(many)]

    def raise_some(registry: Registry) -> list[int]:
        return [registry.raise_generation(VIEW) for _ in range(5)]

    with ThreadPoolExecutor(many) as pool:
        numbers = [number for raised in pool.map(raise_some, registries) for number in raised]
    assert sorted(numbers) == list(range(2, 5 * many + 2))
    assert registries[0].generation(VIEW) == max(numbers)


# Builds, what is published, runs, datasets.


def test_only_finished_builds_count_and_their_intervals_are_merged(registry):
    """A running, failed or interrupted one leaves its interval missing."""
    for hour, state in enumerate(["done", "done", "failed", "done", "interrupted"]):
        build = registry.begin_build(VIEW, Interval(NOON + hour * HOUR, NOON + (hour + 1) * HOUR))
        assert build == hour + 1
        registry.finish_build(VIEW, build, state, {"rows": hour})
    registry.begin_build(VIEW, Interval(NOON + 9 * HOUR, NOON + 10 * HOUR))
    assert registry.built(VIEW) == [Interval(NOON, NOON + 2 * HOUR), Interval(NOON + 3 * HOUR, NOON + 4 * HOUR)]


def test_each_version_of_a_view_has_builds_of_its_own(registry):
    """Version 2 begins with nothing built, at build 1."""
    registry.finish_build(VIEW, registry.begin_build(VIEW, Interval(NOON, NOON + HOUR)), "done", {})
    two = ViewSpec.from_json({**VIEW.to_json(), "version": 2})
    assert registry.built(two) == []
    assert registry.begin_build(two, Interval(NOON, NOON + HOUR)) == 1


def test_an_interval_keeps_its_microseconds(registry):
    """And its years: from year 1 on, beyond 64-bit nanoseconds."""
    whole = Interval(datetime(1, 1, 1, tzinfo=timezone.utc), NOON + timedelta(microseconds=1))
    registry.finish_build(VIEW, registry.begin_build(VIEW, whole), "done", {})
    assert registry.built(VIEW) == [whole]


def test_forgetting_builds_leaves_nothing_built_or_published(registry):
    """But numbers go on: rows of a new build must not carry an old number."""
    registry.finish_build(VIEW, registry.begin_build(VIEW, Interval(NOON, NOON + HOUR)), "done", {})
    registry.set_published(VIEW, None, Published(5, (TODAY,)), 1)
    registry.raise_generation(VIEW)
    registry.forget_builds(VIEW)
    assert registry.built(VIEW) == []
    assert registry.published(VIEW) is None
    assert registry.generation(VIEW) == 2  # what began before may still write
    assert registry.begin_build(VIEW, Interval(NOON, NOON + HOUR)) == 2


def test_what_is_published_is_noted_only_in_the_place_of_what_was_seen(registry):
    """A slow run that ends late does not undo another's note; intervals keep their microseconds."""
    first = Published(5, (Interval(datetime(1, 1, 1, tzinfo=timezone.utc), NOON), Interval(NOON + HOUR, NOON + 2 * HOUR)))
    second = Published(6, (Interval(NOON, NOON + timedelta(microseconds=1)),))
    assert registry.published(VIEW) is None
    assert not registry.set_published(VIEW, second, first, 1)
    assert registry.set_published(VIEW, None, first, 1)
    assert registry.published(VIEW) == first
    assert not registry.set_published(VIEW, None, second, 1)
    assert not registry.set_published(VIEW, second, second, 1)
    assert registry.set_published(VIEW, first, second, 1)
    assert registry.published(VIEW) == second
    registry.raise_generation(VIEW)
    assert not registry.set_published(VIEW, second, first, 1)
    assert registry.set_published(VIEW, second, first, 2)


def test_what_was_published_before_a_refresh_is_kept(registry):
    """Runs of the new epoch leave it; going back to it keeps what was there."""
    old, new = Published(7, (TODAY,), "one"), Published(8, (TODAY,), "two", epoch=1)
    assert registry.previous(VIEW) is None
    assert registry.set_published(VIEW, None, old, 1)
    assert registry.previous(VIEW) is None
    assert registry.set_published(VIEW, old, new, 1)
    newer = replace(new, table_version=9)
    assert registry.set_published(VIEW, new, newer, 1)
    assert (registry.published(VIEW), registry.previous(VIEW)) == (newer, old)
    assert registry.set_published(VIEW, newer, old, 1)
    assert (registry.published(VIEW), registry.previous(VIEW)) == (old, newer)


def test_an_erased_key_is_noted_for_all_versions_of_its_view(registry):
    """Once, until it is forgotten; other views do not know of it."""
    two = replace(VIEW, version=2)
    for _ in range(2):
        registry.erase(VIEW, [b"one", b"two"])
    assert registry.erased(two) == {b"one", b"two"}
    assert registry.erased(replace(VIEW, name="other")) == frozenset()
    assert registry.forget_erasures(two, [b"one", b"three"]) == 1
    assert registry.erased(VIEW) == {b"two"}


def test_runs_are_listed_newest_first_with_how_they_ended(registry):
    """At most as many as asked for; a run that never ended stays running."""
    for number in range(3):
        registry.begin_run(f"r{number}", "build", "spending@1")
        threading.Event().wait(0.002)  # times are in milliseconds
    registry.finish_run("r1", "failed", {"error": "é"})
    runs = registry.runs()
    assert [(run["run_id"], run["state"]) for run in runs] == [("r2", "running"), ("r1", "failed"), ("r0", "running")]
    assert runs[1]["details"] == {"error": "é"}
    assert runs[1]["finished_at"] >= runs[1]["started_at"]
    assert [run["run_id"] for run in registry.runs(limit=1)] == ["r2"]


def test_a_dataset_version_is_written_once(registry):
    """SFS-307 for the second; the first stays."""
    registry.datasets.add("d", 1, {"name": "d", "version": 1, "rows": 5})
    with pytest.raises(ConflictError, match=r"SFS-307.*'d' got a version 1 meanwhile"):
        registry.datasets.add("d", 1, {"name": "d", "version": 1, "rows": 6})
    assert registry.datasets.require("d", 1)["rows"] == 5


def test_the_newest_dataset_is_the_one_with_the_highest_number(registry):
    """Not the last in the alphabet; unknown names and versions are told with the known ones."""
    for version in (2, 10, 1):
        registry.datasets.add("d", version, {"name": "d", "version": version})
    assert registry.datasets.require("d")["version"] == 10
    assert [manifest["version"] for manifest in registry.datasets.all()] == [1, 2, 10]
    with pytest.raises(InvalidError, match=r"SFS-303.*no dataset 'dd'\. Did you mean 'd'"):
        registry.datasets.require("dd")
    with pytest.raises(InvalidError, match=r"no dataset 'd@3'.*d@10"):
        registry.datasets.require("d", 3)


# Registries that cannot be trusted are refused, never read as empty.


def test_a_registry_of_a_newer_format_is_refused(registry, url):
    """SFS-302, exit code 2, with the fix."""
    registry.commit(0, add(VIEW), "one")
    run_sql(url, f"UPDATE sfs_format SET version = {FORMAT + 1}")
    with pytest.raises(InvalidError, match=rf"SFS-302.*format {FORMAT + 1}; this spark_fs knows {FORMAT}.*Fix: upgrade"):
        Registry(url, "shop")


def test_a_registry_that_lost_its_format_is_refused(registry, url):
    """It may be of any format."""
    registry.commit(0, add(VIEW), "one")
    run_sql(url, "DELETE FROM sfs_format")
    with pytest.raises(SparkFSError, match="SFS-302"):
        Registry(url, "shop")


def test_a_registry_of_format_1_is_brought_up(registry, url):
    """Its watermarks become published intervals; whatever else it holds stays."""
    registry.commit(0, add(VIEW), "one")
    for table in ("sfs_published", "sfs_generations", "sfs_erasures", "sfs_intents", "sfs_parts", "sfs_leases"):
        run_sql(url, f"DROP TABLE {table}")
    run_sql(url, "DELETE FROM sfs_format")
    run_sql(url, "INSERT INTO sfs_format VALUES (1)")
    columns = "project TEXT, view TEXT, version INTEGER, table_version BIGINT, end_us BIGINT"
    run_sql(url, f"CREATE TABLE sfs_watermarks ({columns})")
    run_sql(url, "INSERT INTO sfs_watermarks VALUES ('shop', 'spending', 1, 7, 3600000000)")
    for _ in range(2):
        found = Registry(url, "shop")
        until = Interval(datetime(1, 1, 1, tzinfo=timezone.utc), datetime(1970, 1, 1, 1, tzinfo=timezone.utc))
        assert found.published(VIEW) == Published(7, (until,))
        assert found.state().serial == 1
    assert found.raise_generation(VIEW) == 2


def test_a_registry_of_format_2_is_brought_up(registry, url):
    """What was published stays, of epoch 0; also where several processes open it at once."""
    registry.commit(0, add(VIEW), "one")
    assert registry.set_published(VIEW, None, Published(7, (TODAY,), "mark"), 1)
    for table in ("sfs_intents", "sfs_parts", "sfs_leases"):
        run_sql(url, f"DROP TABLE {table}")
    for column in ("epoch", "previous"):
        run_sql(url, f"ALTER TABLE sfs_published DROP COLUMN {column}")
    run_sql(url, f"UPDATE sfs_format SET version = 2 WHERE version = {FORMAT}")
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Registry(url, "shop"), range(4)))
    for each in (*opened, Registry(url, "shop")):
        assert each.published(VIEW) == Published(7, (TODAY,), "mark")
        assert each.ledger.unfinished(VIEW) == []


@pytest.mark.parametrize(
    "table",
    [
        "sfs_serials",
        "sfs_objects",
        "sfs_applies",
        "sfs_builds",
        "sfs_runs",
        "sfs_published",
        "sfs_datasets",
        "sfs_generations",
        "sfs_erasures",
        "sfs_intents",
        "sfs_parts",
        "sfs_leases",
    ],
)
def test_a_registry_that_lost_a_table_is_refused(registry, url, table):
    """An empty table in its place would read as if nothing had been applied, built or published."""
    registry.commit(0, add(VIEW), "one")
    run_sql(url, f"DROP TABLE {table}")
    with pytest.raises(SparkFSError, match="SFS-302"):
        Registry(url, "shop")


@pytest.fixture
def file(tmp_path) -> Path:
    """A registry file with one apply."""
    file = tmp_path / "registry.db"
    Registry(f"sqlite:///{file}", "shop").commit(0, [*add(VIEW), Change("entity", "pad", 0, {"pad": "x" * 20_000})], "one")
    return file


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "random bytes": lambda body: bytes(range(256)) * (len(body) // 256),
    "zero bytes": lambda body: bytes(len(body)),
    "text": lambda _: b"not a database",
    "zero length": lambda _: b"",
    "one byte": lambda body: body[:1],
    "half": lambda body: body[: len(body) // 2],
    "first page only": lambda body: body[:4096],
    "last page gone": lambda body: body[:-4096],
    "a page of noise": lambda body: body[:4096] + b"\xff" * 4096 + body[8192:],
    "noise from the third page on": lambda body: body[:8192] + b"\xa5" * (len(body) - 8192),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_and_left_as_it_is(file, kind):
    """SFS-302, exit code 1: at opening or at the first read; the file is kept for whoever mends it."""
    damaged = DAMAGE[kind](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(SparkFSError, match="SFS-302"):
        Registry(f"sqlite:///{file}", "shop").state()
    assert file.read_bytes() == damaged


def test_a_database_of_somebody_else_is_not_taken_for_a_registry_of_ours(tmp_path):
    """Its tables stay as they are; ours come beside them."""
    file = tmp_path / "other.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
        connection.execute("INSERT INTO orders VALUES (1)")
    assert Registry(f"sqlite:///{file}", "shop").state().serial == 0
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT * FROM orders").fetchall() == [(1,)]


def test_a_body_that_cannot_be_read_is_told_as_damage(registry, url):
    """SFS-302, not a crash of whatever reads it."""
    registry.commit(0, add(VIEW), "one")
    run_sql(url, "UPDATE sfs_objects SET body = '{\"cut'")
    with pytest.raises(SparkFSError, match="SFS-302"):
        registry.state()


def test_a_database_that_does_not_answer_is_told_without_its_password():
    """SFS-301: trying again may help."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UnavailableError, match="SFS-301") as caught:
        Registry(f"postgresql+psycopg://me:hunter2@127.0.0.1:{port}/db", "shop")
    assert "hunter2" not in str(caught.value)


def test_a_registry_is_printed_without_its_password(postgresql):
    """The server trusts everybody, so that any password is one."""
    url = postgresql.url.set(password="hunter2").render_as_string(hide_password=False)
    registry = Registry(url, "shop")
    assert "hunter2" in url
    assert "hunter2" not in repr(registry)

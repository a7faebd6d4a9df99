"""A master that sentinels watch: writes and reads follow it when another one takes over, and loss is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from spark_fs.errors import InvalidError, SparkFSError, translate
from spark_fs.online import codec, connect, redis_store
from spark_fs.online.connect import check_server, has_token, leave_token
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import select
from tests.online.servers import FEATURES, batch, target_of, view_of
from tests.online.topologies import PASSWORD, SENTINEL_PASSWORD, SERVICE, Sentinels, eventually, sentinels

KEYS = [b"%d" % number for number in range(6_000)]
DECODE = codec.Decoder(FEATURES).decode


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with sentinels(tmp_path_factory.mktemp("sentinel")) as setup:
        yield setup


@pytest.fixture
def setup(started: Sentinels) -> Sentinels:
    """A whole setup whose master is empty."""
    started.heal()
    return started


def stored(client: redis.Redis) -> list[int]:
    found = client.mget([codec.redis_key(target_of("").prefix, key) for key in KEYS])
    return [DECODE(value)[0] for value in found if value is not None]  # type: ignore[union-attr]


def test_a_write_outlives_its_master_and_the_return_of_the_old_one(setup: Sentinels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle: the replica takes over, no row is lost, readers go on; the old one comes back as a replica."""
    monkeypatch.setattr(redis_store, "CALLS_IN_FLIGHT", 2)
    target, rows = target_of(setup.url, socket_timeout_seconds=2.0), batch(KEYS, n=range(6_000))
    old, heir = setup.master, setup.replica

    def batches() -> Iterator[object]:
        for start in range(0, 6_000, 500):
            if start == 3_000:
                eventually(lambda: old.client.dbsize() >= 1_000, "rows on the master")  # type: ignore[operator]
                old.kill()
            yield rows.slice(start, 500)

    with OnlineReader(setup.url, socket_timeout_seconds=2.0) as reader:
        asked = {"origin": [str(n) for n in range(0, 6_000, 100)]}
        reader.read([select(view_of(), ["n"])], asked)
        counts = write_batches(batches(), target)  # type: ignore[arg-type]
        assert counts.applied + counts.equal == counts.rows == 6_000
        assert setup.master is heir
        assert reader.read([select(view_of(), ["n"])], asked).to_dict()["n"] == list(range(0, 6_000, 100))
        old.start()
        eventually(lambda: old.info("role") == "slave" and old.info("master_link_status") == "up", "the old master as replica")
        again = write_batches(iter([rows]), target)
        assert (again.equal, again.rows) == (6_000, 6_000)
        assert reader.read([select(view_of(), ["n"])], asked).to_dict()["n"] == list(range(0, 6_000, 100))
    assert stored(heir.client) == list(range(6_000))
    eventually(lambda: stored(old.client) == list(range(6_000)), "the rows on the replica")


def test_a_frozen_master_is_left_for_the_next(setup: Sentinels) -> None:
    """It holds its connections and answers nothing; when it goes on it is no master any more."""
    target, rows = target_of(setup.url, socket_timeout_seconds=1.0), batch(KEYS, n=range(6_000))
    old, heir = setup.master, setup.replica
    with old.frozen():
        counts = write_batches(iter([rows]), target)
    assert (counts.applied + counts.equal, counts.rows) == (6_000, 6_000)
    assert stored(heir.client) == list(range(6_000))
    again = write_batches(iter([rows]), target)
    assert (again.equal, again.rows) == (6_000, 6_000)


def test_writes_that_a_failover_loses_are_noticed_and_replicas_are_counted(setup: Sentinels) -> None:
    """Confirmed by a master whose replica did not hear of them: the count says so before, the missing mark after."""
    target = target_of(setup.url, wait_replicas=1, socket_timeout_seconds=2.0)
    old, heir = setup.master, setup.replica
    assert write_batches(iter([batch(KEYS[:3_000], n=range(3_000))]), target).replicas == 1
    leave_token(setup.url, target.prefix, "kept")
    eventually(lambda: heir.client.exists(b"%bruns" % target.prefix), "the mark on the replica")
    with heir.frozen():
        old.client.client_kill_filter(_type="replica")
        counts = write_batches(iter([batch(KEYS, n=range(6_000))]), target)
        assert (counts.applied, counts.equal, counts.replicas) == (3_000, 3_000, 0)
        leave_token(setup.url, target.prefix, "lost")
        old.kill()
    eventually(lambda: setup.master is heir and heir.info("role") == "master", "the replica as master")
    assert len(stored(heir.client)) == 3_000
    assert [has_token(setup.url, target.prefix, token) for token in ("kept", "lost")] == [True, False]
    counts = write_batches(iter([batch(KEYS, n=range(6_000))]), target)
    assert (counts.applied, counts.equal) == (3_000, 3_000)


def test_a_mark_waits_for_the_next_master(setup: Sentinels) -> None:
    """A run does not fail at its last step because a master is lost there."""
    prefix, heir = target_of("").prefix, setup.replica
    setup.master.kill()
    leave_token(setup.url, prefix, "token", socket_timeout_seconds=1.0)
    assert has_token(setup.url, prefix, "token", socket_timeout_seconds=1.0)
    assert setup.master is heir


def test_what_the_address_names_is_checked(setup: Sentinels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentinels that refuse the login, do not know the name or are not there; and a sentinel's address as a server's."""
    report = check_server(setup.url)
    assert report.mode == "sentinel"
    monkeypatch.setattr(connect, "FAILOVER_SECONDS", 0.5)
    refused = setup.url.replace(SENTINEL_PASSWORD, "not-it")
    began = time.monotonic()
    for act in (check_server, lambda url: write(url), lambda url: has_token(url, b"p:v@1:", "token")):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            act(refused)
        assert "SFS-602" in str(translate(caught.value))
        assert "not-it" not in str(caught.value)
    with pytest.raises(SparkFSError, match="SFS-602"):
        check_server(setup.url.replace(PASSWORD, "not-it"))
    for wrong in (setup.url.replace(SERVICE, "unknown"), "redis+sentinel://127.0.0.1:1/any/0"):
        with pytest.raises(SparkFSError, match=r"SFS-601.*No master found") as lost:
            check_server(wrong)
        assert "redis.client" not in str(lost.value)  # of sentinels only their addresses are told
        with pytest.raises(redis.ConnectionError):
            write(wrong)
    assert time.monotonic() - began < 15
    data_node = f"redis+sentinel://:{PASSWORD}@127.0.0.1:{setup.master.port}/{SERVICE}/0?sentinel_password={PASSWORD}"
    with pytest.raises(InvalidError, match=r"SFS-604.*is no sentinel"):
        check_server(data_node)
    plain = f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{setup.sentinels[0].port}/0"
    with pytest.raises(InvalidError, match=r"SFS-604.*is a sentinel.*redis\+sentinel://"):
        check_server(plain)


def write(url: str) -> None:
    write_batches(iter([batch(KEYS[:10])]), target_of(url))

"""A cluster of three masters and three replicas: writes and reads, lost servers, slots that move, and what is told of loss."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from spark_fs.errors import InvalidError, SparkFSError, translate
from spark_fs.online import codec, connect, encode, redis_store
from spark_fs.online.calls import Manner
from spark_fs.online.compare import compare_rows, stored_keys
from spark_fs.online.connect import check_server, delete_prefix, erase_keys, has_token, leave_token, reopen_keys
from spark_fs.online.lookup import stored_values
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import OnlineTarget, WriteCounts, bury_batches, write_batches
from spark_fs.spec import Column, select
from spark_fs.types import Array, Bool, Embedding, Float64, Int64, String, Timestamp
from spark_fs.types import Decimal as DecimalType
from tests.online.servers import NOON, UTC, batch, redis_process, target_of, view_of
from tests.online.topologies import PASSWORD, Cluster, Node, cluster, eventually, port_with_bus

HOUR = timedelta(hours=1)
KEYS = [b"%d" % number for number in range(6_000)]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def nodes(started: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A whole, empty cluster; and calls of few rows, so that there are many while something goes wrong."""
    monkeypatch.setattr(redis_store, "SORT_BYTES", 40_000)
    started.heal()
    return started


def values_of(nodes: Cluster, target: OnlineTarget, keys: list[bytes]) -> list[Any]:
    """The feature ``n`` of each key, by redis-py's own cluster client."""
    decode = codec.Decoder(target.features).decode
    with connect.open_client(nodes.url) as client:
        found: Any = client.mget_nonatomic([codec.redis_key(target.prefix, key) for key in keys])  # type: ignore[union-attr]
    return [None if value is None else decode(value)[0] for value in found]


def assert_ends_right(nodes: Cluster, target: OnlineTarget, rows: pa.RecordBatch) -> None:
    """Stored is what was written, and writing it again changes nothing."""
    keys = rows.column("_key").to_pylist()
    assert values_of(nodes, target, keys) == rows.column("n").to_pylist()
    again = write_batches(iter([rows]), target)
    assert (again.equal, again.rows) == (len(keys), len(keys))


def disturbed(nodes: Cluster, rows: pa.RecordBatch, disturb: Callable[[], None], *, at: int) -> Iterator[pa.RecordBatch]:
    """The rows in batches of 500; once so many keys are stored, something is done to the cluster."""
    done = False
    for start in range(0, rows.num_rows, 500):
        yield rows.slice(start, 500)
        if not done and sum(node.client.dbsize() for node in nodes.masters) >= at:  # type: ignore[misc]
            done = True
            disturb()
    assert done


def refusals(nodes: Cluster, kind: str) -> int:
    """How often the servers have given this error since they were healed."""
    states = [node.client.info("errorstats") for node in nodes.running]
    return sum(int(state.get(f"errorstat_{kind}", {}).get("count", 0)) for state in states)  # type: ignore[union-attr]


# ---- writing and reading


def test_calls_are_of_one_slot_and_lose_no_row() -> None:
    """Rows are put together by tag, each once; without a cluster they stay in their order."""
    target = target_of("")
    rows = batch(KEYS, n=range(6_000))
    (together,) = encode.by_tag(iter([rows.slice(0, 4_000), rows.slice(4_000)]), 1 << 30)
    keys, values = encode.encode_keys(together), encode.encode_values(together, target.features, 1)
    calls = list(redis_store._calls(keys, values, target, lambda: Manner.BY_HASH, tags=together.column(encode.TAG)))
    for call in calls:
        slots = {codec.slot_of(codec.tag_of(name)) for name in call.names.to_pylist()}
        assert slots == {call.slot}
    assert len(calls) == len({codec.tag_of(codec.redis_key(b"", key)) for key in KEYS})
    decode = codec.Decoder(target.features).decode
    pairs = [pair for call in calls for pair in zip(call.keys.to_pylist(), call.values.to_pylist(), strict=True)]
    found = {key: decode(value)[0] for key, value in pairs}
    assert len(pairs) == 6_000
    assert found == {key: n for n, key in enumerate(KEYS)}
    apart = [part.num_rows for part in encode.by_tag(iter([rows] * 3), rows.nbytes * 2)]
    assert apart == [12_000, 6_000]
    plain = list(redis_store._calls(encode.encode_keys(rows), values, target, lambda: Manner.BY_HASH))
    assert [key for call in plain for key in call.keys.to_pylist()] == KEYS


FEATURES = (
    Column("n", Int64),
    Column("s", String),
    Column("f", Float64),
    Column("yes", Bool),
    Column("at", Timestamp),
    Column("exact", DecimalType(20, 3)),
    Column("words", Array(String)),
    Column("vector", Embedding(3)),
)


@pytest.mark.parametrize("distinct", [True, False])
def test_values_of_all_shapes_come_back(nodes: Cluster, distinct: bool) -> None:
    """Inserted or by the script, from one node's address, nulls and absent keys included; a second write changes nothing."""
    view = view_of(features=FEATURES)
    url = f"redis+cluster://:{PASSWORD}@127.0.0.1:{nodes.replica_of(nodes.masters[1]).port}"
    keys = [f"key {n}" for n in range(2_000)]
    columns: dict[str, list[Any]] = {
        "n": list(range(2_000)),
        "s": [None if n % 3 == 0 else "é" * (n % 50) for n in range(2_000)],
        "f": [n / 7 for n in range(2_000)],
        "yes": [n % 2 == 0 for n in range(2_000)],
        "at": [datetime(2013, 1, 1, tzinfo=UTC) + n * HOUR for n in range(2_000)],
        "exact": [Decimal(n).scaleb(-3) for n in range(2_000)],
        "words": [["a", None, "b" * (n % 5)] for n in range(2_000)],
        "vector": [[float(n), 0.5, -1.0] for n in range(2_000)],
    }
    rows = batch([key.encode() for key in keys], features=FEATURES, **columns)
    target = target_of(url, view)
    assert write_batches(iter([rows]), target, distinct=distinct).applied == 2_000
    again = write_batches(iter([rows]), target, distinct=distinct)
    assert (again.equal, again.rows) == (2_000, 2_000)
    with OnlineReader(url) as reader:
        found = reader.read([select(view, view.feature_names)], {"origin": [*keys, "absent", None]}).to_dict()
    assert {name: values[:-2] for name, values in found.items() if name != "origin"} == columns
    assert all(found[name][-2:] == [None, None] for name in columns)


def test_rows_with_a_ttl_and_tombstones_go_by_slot_too(nodes: Cluster) -> None:
    """Expiry, restatement and burial are those of a single server."""
    target = target_of(nodes.url, view_of(ttl=timedelta(days=365_000)))
    rows = batch(KEYS[:500], n=range(500), s=["x"] * 500)
    assert write_batches(iter([rows]), target).applied == 500
    restating = replace(target, generation=2, restating=True)
    assert bury_batches(iter([rows.slice(0, 100)]), restating).applied == 100
    assert write_batches(iter([rows]), target).fenced == 100
    with connect.open_client(nodes.url) as client:
        found = stored_values(client, [codec.redis_key(target.prefix, key) for key in KEYS[:500]])
    assert [value == codec.tombstone(2) for value in found] == [True] * 100 + [False] * 400


def test_a_foreign_key_is_named(nodes: Cluster) -> None:
    """The error of a single server, from whichever master."""
    target = target_of(nodes.url)
    with connect.open_client(nodes.url) as client:
        client.hset(codec.redis_key(target.prefix, b"7"), "x", "1")
    with pytest.raises(InvalidError, match=r"SFS-610.*'7'"):
        write_batches(iter([batch(KEYS[:20])]), target)


# ---- servers that are lost


@pytest.mark.parametrize("fault", ["killed", "frozen", "demoted"])
def test_a_master_that_is_lost_in_the_middle_of_a_write_costs_no_row(nodes: Cluster, fault: str) -> None:
    """Its replica takes over, and the write goes on there; readers err for no longer than that and are never wrong."""
    target = target_of(nodes.url, socket_timeout_seconds=2.0)
    older = batch(KEYS, NOON - HOUR, n=[-1] * 6_000)
    write_batches(iter([older]), target)
    eventually(nodes.is_whole, "replicas that have caught up")
    rows = batch(KEYS, n=range(6_000))
    victim = nodes.masters[1]
    heir = nodes.replica_of(victim)
    watch = Readers(nodes, KEYS[::40])

    def disturb() -> None:
        if fault == "killed":
            victim.kill()
        elif fault == "demoted":
            heir.client.execute_command("CLUSTER", "FAILOVER")

    def applied() -> Iterator[pa.RecordBatch]:
        for start in range(0, 6_000, 500):
            if start == 2_000:
                disturb()
            yield rows.slice(start, 500)

    with watch:
        if fault == "frozen":
            with victim.frozen():
                counts = write_batches(applied(), target)
        else:
            counts = write_batches(applied(), target)
        assert counts.applied + counts.equal == counts.rows == 6_000
        eventually(lambda: heir.info("role") == "master", "the replica as master")
        eventually(lambda: watch.last_error < time.monotonic() - 0.5, "readers that read again")
    assert watch.answers > 0
    assert watch.wrong == []
    assert_ends_right(nodes, target, rows)


class Readers(threading.Thread):
    """Reads some keys for the block: each has a value, and never an older one than was seen before."""

    def __init__(self, nodes: Cluster, keys: list[bytes]) -> None:
        super().__init__()
        self._nodes, self._keys = nodes, [key.decode() for key in keys]
        self.answers, self.last_error = 0, 0.0
        self.wrong: list[tuple[str, int | None, int | None]] = []
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        seen = dict.fromkeys(self._keys, -1)
        with OnlineReader(self._nodes.url, socket_timeout_seconds=1.0) as reader:
            while not self._ended.is_set():
                try:
                    found = reader.read([select(view_of(), ["n"])], {"origin": self._keys}).to_dict()["n"]
                except SparkFSError as error:
                    self.wrong += [] if error.code == "SFS-601" else [(str(error), None, None)]
                    self.last_error = time.monotonic()
                    continue
                self.answers += 1
                for key, value in zip(self._keys, found, strict=True):
                    if value is None or value < seen[key]:
                        self.wrong.append((key, seen[key], value))
                    else:
                        seen[key] = value


def test_a_replica_that_is_lost_in_the_middle_of_a_write_is_not_missed(nodes: Cluster) -> None:
    """Nothing is repeated, nothing waits."""
    target, rows = target_of(nodes.url), batch(KEYS, n=range(6_000))
    victim = nodes.replica_of(nodes.masters[0])
    counts = write_batches(disturbed(nodes, rows, victim.kill, at=1_000), target)
    assert (counts.applied, counts.rows) == (6_000, 6_000)
    assert_ends_right(nodes, target, rows)


def test_slots_without_a_master_are_waited_for_and_given_up_in_time(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A master and its replica are gone: the cluster is down. The write ends with an error in time, or once it is back."""
    target, rows = target_of(nodes.url, socket_timeout_seconds=2.0), batch(KEYS, n=range(6_000))
    victim = nodes.masters[2]
    heir = nodes.replica_of(victim)
    heir.kill()
    victim.kill()
    eventually(lambda: "down" in str(refused(nodes.masters[0])), "a cluster that is down")
    monkeypatch.setattr(connect, "FAILOVER_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(redis.RedisError) as caught:
        write_batches(iter([rows]), target)
    assert "SFS-601" in str(translate(caught.value))
    with pytest.raises(SparkFSError, match="SFS-601"):
        leave_token(nodes.url, target.prefix, "token", socket_timeout_seconds=2.0)
    assert 4 <= time.monotonic() - began < 15
    monkeypatch.undo()
    monkeypatch.setattr(redis_store, "SORT_BYTES", 40_000)
    back = threading.Timer(1.0, victim.start)
    back.start()
    counts = write_batches(iter([rows]), target)
    back.join()
    assert counts.applied + counts.equal == counts.rows == 6_000
    assert refusals(nodes, "CLUSTERDOWN") > 0
    assert_ends_right(nodes, target, rows)


def refused(node: Node, key: bytes = b"any") -> str:
    try:
        node.client.get(key)
    except redis.RedisError as error:
        return str(error)
    return ""


# ---- slots that move


class Resharding(threading.Thread):
    """Moves slots from the first master to the second, key by key, as ``redis-cli`` does it."""

    def __init__(
        self,
        nodes: Cluster,
        slots: list[int],
        source: Node | None = None,
        sink: Node | None = None,
        stop_after: int | None = None,
    ) -> None:
        super().__init__()
        self._nodes, self._slots, self._stop_after = nodes, slots, stop_after
        self._source, self._sink = source or nodes.masters[0], sink or nodes.masters[1]
        self._names = [node.client.execute_command("CLUSTER", "MYID").decode() for node in (self._source, self._sink)]
        self.moved = 0
        self._error: redis.RedisError | None = None

    def __enter__(self) -> Resharding:
        for node in self._nodes.nodes:
            node.client.config_resetstat()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            self._run()
        except redis.RedisError as error:
            self._error = error

    def _run(self) -> None:
        for slot in self._slots:
            self._sink.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self._names[0])
            self._source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._names[1])
            if self._stop_after:
                self._move(slot, self._stop_after)
                return
            self._complete(slot)

    def finish(self) -> None:
        """Complete what was stopped in the middle."""
        self._complete(self._slots[0])

    def _complete(self, slot: int) -> None:
        while self._move(slot, 2):
            time.sleep(0.01)
        for node in (self._sink, self._source, *self._nodes.masters):
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self._names[1])
        self.moved += 1

    def _move(self, slot: int, most: int) -> bool:
        keys = self._source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, most)
        to = ["127.0.0.1", self._sink.port, "", 0, 5_000, "REPLACE", "AUTH", PASSWORD, "KEYS"]
        return bool(keys) and bool(self._source.client.execute_command("MIGRATE", *to, *keys))


def test_slots_may_move_while_rows_are_written_and_read(nodes: Cluster) -> None:
    """MOVED, ASK and TRYAGAIN are followed: each row arrives once, readers see no hole and nothing older."""
    target = target_of(nodes.url)
    write_batches(iter([batch(KEYS[:3_000], NOON - HOUR, n=[0] * 3_000)]), target)
    tags = [codec.slot_of(b"%d" % tag) for tag in range(codec.ONLINE_SLOTS)]
    watch, turn = Readers(nodes, KEYS[:3_000:20]), 0
    with watch, Resharding(nodes, nodes.slots_of(nodes.masters[0], tags)[:40]) as resharding:
        while resharding.is_alive():
            turn += 1
            # Known keys and new ones, so that a slot on its way has some here and some there.
            keys = [*KEYS[:3_000], *(b"%d of %d" % (turn, n) for n in range(2_000))]
            counts = write_batches(iter([batch(keys, NOON + turn * HOUR, n=[turn] * 5_000)]), target, distinct=turn % 2 == 0)
            assert (counts.applied + counts.equal, counts.rows) == (5_000, 5_000)
    assert resharding.moved == 40
    assert values_of(nodes, target, KEYS[:3_000]) == [turn] * 3_000
    assert {kind: refusals(nodes, kind) > 0 for kind in ("MOVED", "ASK", "TRYAGAIN")} == dict.fromkeys(
        ("MOVED", "ASK", "TRYAGAIN"), True
    )
    assert watch.answers > 0
    assert watch.wrong == []


def test_rows_of_a_slot_that_is_half_moved_are_looked_up(nodes: Cluster) -> None:
    """A look is followed to where each row is, as a write is: all are found, and none is written again."""
    target, rows = target_of(nodes.url), batch(KEYS, n=range(6_000))
    write_batches(iter([rows]), target)
    source, sink, _ = nodes.masters
    # Of the later tags: the rows of the first ones show that looking is worth while.
    slot = next(slot for tag in range(900, 1024) if (slot := codec.slot_of(b"%d" % tag)) <= 5460)
    names = [node.client.execute_command("CLUSTER", "MYID").decode() for node in (source, sink)]
    to = ["127.0.0.1", sink.port, "", 0, 5_000, "REPLACE", "AUTH", PASSWORD, "KEYS"]
    sink.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[0])
    source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[1])
    keys = source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)
    assert len(keys) > 2
    try:
        source.client.execute_command("MIGRATE", *to, keys[0])
        for node in (source, sink):
            node.client.config_resetstat()
        counts = write_batches(iter([rows]), target, distinct=True)
        assert (counts.equal, counts.rows) == (6_000, 6_000)
        calls: dict[str, Any] = source.client.info("commandstats")["cmdstat_mget"]  # type: ignore[index]
        assert calls["rejected_calls"] >= 2  # TRYAGAIN for all, then ASK for the one
        assert {kind: refusals(nodes, kind) > 0 for kind in ("ASK", "TRYAGAIN")} == {"ASK": True, "TRYAGAIN": True}
    finally:
        source.client.execute_command("MIGRATE", *to, *keys[1:])
        for node in nodes.masters:
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", names[1])


def test_a_slot_that_is_half_moved_is_written_and_read_at_once(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that have moved, that have not, and new ones, in one call; nobody waits for the slot to arrive."""
    target = target_of(nodes.url)
    tag = codec.tag_of(codec.redis_key(b"", KEYS[0]))
    names = (b"key %d" % n for n in range(1_000_000))
    keys = list(islice((key for key in names if codec.tag_of(codec.redis_key(b"", key)) == tag), 60))
    write_batches(iter([batch(keys[:40], NOON - HOUR, n=[0] * 40)]), target)
    source = next(node for node in nodes.masters if not refused(node, codec.redis_key(target.prefix, keys[0])))
    sink = next(node for node in nodes.masters if node is not source)
    resharding = Resharding(nodes, [codec.slot_of(tag)], source, sink, stop_after=20)
    with resharding:
        pass
    monkeypatch.setattr(connect, "FAILOVER_SECONDS", 2.0)
    try:
        for distinct, hour in ((True, 0), (False, 1)):
            counts = write_batches(iter([batch(keys, NOON + hour * HOUR, n=range(60))]), target, distinct=distinct)
            assert (counts.applied, counts.rows) == (60, 60)
        assert all(refusals(nodes, kind) > 0 for kind in ("ASK", "TRYAGAIN"))
        with OnlineReader(nodes.url) as reader:
            found = reader.read([select(view_of(), ["n"])], {"origin": [key.decode() for key in keys]}).to_dict()["n"]
        assert found == list(range(60))
    finally:
        resharding.finish()
    assert_ends_right(nodes, target, batch(keys, NOON + HOUR, n=range(60)))


def test_masters_that_send_a_call_to_each_other_are_given_up_in_time(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resharding that stopped in the middle: MOVED there and back again. It ends with an error, and can be repeated."""
    target, key = target_of(nodes.url), KEYS[0]
    slot = codec.slot_of(codec.tag_of(codec.redis_key(target.prefix, key)))
    owner = next(node for node in nodes.masters if not refused(node, codec.redis_key(target.prefix, key)))
    other = next(node for node in nodes.masters if node is not owner)
    name = other.client.execute_command("CLUSTER", "MYID").decode()
    owner.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", name)
    monkeypatch.setattr(connect, "FAILOVER_SECONDS", 1.0)
    began = time.monotonic()
    try:
        with pytest.raises(redis.exceptions.MovedError) as caught:
            write_batches(iter([batch([key], n=[1])]), target)
    finally:
        other.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", name)
    assert "SFS-601" in str(translate(caught.value))
    assert time.monotonic() - began < 5
    assert write_batches(iter([batch([key], n=[1])]), target).applied == 1


def test_tls(tmp_path: Path) -> None:
    """rediss+cluster:// encrypts and checks certificates, of nodes that are found by others too."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *request, *files], check=True, capture_output=True)
    tls = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate, "--tls-cluster", "yes"]
    port = port_with_bus()
    with cluster(tmp_path, replicas=False, options=[*tls, "--tls-auth-clients", "no", "--tls-port", str(port)], count=1):
        secure = f"rediss+cluster://:{PASSWORD}@127.0.0.1:{port}"
        target = target_of(f"{secure}?ssl_ca_certs={certificate}")
        assert write_batches(iter([batch(KEYS, n=range(6_000))]), target).applied == 6_000
        with OnlineReader(target.url) as reader:
            assert reader.read([select(view_of(), ["n"])], {"origin": ["7"]}).to_dict()["n"] == [7]
        for act in (check_server, lambda url: write_batches(iter([batch(KEYS[:9])]), target_of(url))):
            began = time.monotonic()
            with pytest.raises((SparkFSError, redis.RedisError)) as caught:
                act(secure)
            assert "SFS-631" in str(translate(caught.value))
            assert time.monotonic() - began < 5


def test_connections_that_are_cut_in_the_middle_of_a_read_cost_no_value(nodes: Cluster) -> None:
    """What a lost connection has not answered is asked for again, or the read fails: no value reads as absent."""
    write_batches(iter([batch(KEYS[:100], n=range(100))]), target_of(nodes.url))
    watch, until = Readers(nodes, KEYS[:100]), time.monotonic() + 2.0
    with watch:
        while time.monotonic() < until:
            for node in nodes.masters:
                node.client.client_kill_filter(_type="normal", skipme=True)
    assert watch.answers > 20
    assert watch.wrong == []


# ---- what is told of loss


def test_writes_that_a_failover_loses_are_noticed_and_replicas_are_counted(nodes: Cluster) -> None:
    """Confirmed by a master whose replica did not hear of them: the count says so before, the missing mark after."""
    target = target_of(nodes.url, wait_replicas=1, socket_timeout_seconds=2.0)
    assert write_batches(iter([batch(KEYS[:3_000], n=range(3_000))]), target).replicas == 1
    assert write_batches(iter([]), target).replicas is None
    leave_token(nodes.url, target.prefix, "kept")
    victim = nodes.masters[0]
    heir = nodes.replica_of(victim)
    eventually(lambda: heir.info("slave_repl_offset") == victim.info("master_repl_offset"), "a replica that has caught up")
    with heir.frozen():
        victim.client.client_kill_filter(_type="replica")
        counts = write_batches(iter([batch(KEYS, n=range(6_000))]), target)
        assert (counts.applied, counts.equal, counts.replicas) == (3_000, 3_000, 0)
        leave_token(nodes.url, target.prefix, "lost")
        assert has_token(nodes.url, target.prefix, "lost")
        victim.kill()
    eventually(lambda: heir.info("role") == "master", "the replica as master")
    lost = eventually(lambda: values_of(nodes, target, KEYS).count(None), "lost keys, as all nodes see it")
    assert 500 < lost < 1_500
    assert [has_token(nodes.url, target.prefix, token) for token in ("kept", "lost")] == [True, False]
    counts = write_batches(iter([batch(KEYS, n=range(6_000))]), target)
    assert (counts.applied, counts.equal) == (lost, 6_000 - lost)
    assert_ends_right(nodes, target, batch(KEYS, n=range(6_000)))


def test_each_master_has_marks_of_its_own() -> None:
    """However a cluster of up to 32 masters is cut, each has a list of marks."""
    slots = sorted(codec.slot_of(b"%d" % tag) for tag in connect._MARK_TAGS)
    assert len(slots) == 64
    assert max(after - before for before, after in pairwise([-1, *slots, 16_384])) <= 512


def test_the_least_count_of_replicas_is_told() -> None:
    """Of tasks that asked; None is no count."""
    counts = [WriteCounts(replicas=n) for n in (2, None, 1)]
    assert sum(counts, WriteCounts()).replicas == 1
    assert (WriteCounts() + WriteCounts()).replicas is None


# ---- the rest of the online store


def test_keys_of_all_masters_are_listed_compared_erased_and_removed(nodes: Cluster) -> None:
    """Scans walk through each master; an erasure, its undoing and a removal find each key where it lies."""
    target = target_of(nodes.url)
    rows = batch(KEYS[:1_000], n=range(1_000))
    write_batches(iter([rows]), target)
    write_batches(iter([rows]), replace(target, prefix=b"flights:weather@10:"))
    leave_token(nodes.url, target.prefix, "token")
    listed = pa.Table.from_batches(stored_keys(iter([]), target))["_key"].to_pylist()
    assert sorted(set(listed)) == sorted(KEYS[:1_000])
    changed = batch(KEYS[:1_001], n=[7, *range(1, 1_001)])
    found = pa.Table.from_batches(compare_rows(iter([changed]), target, frozenset())).to_pylist()
    assert [(row["key"], row["status"]) for row in found if row["key"] is not None] == [(b"0", "wrong"), (b"1000", "missing")]

    names = [codec.redis_key(target.prefix, key) for key in KEYS[:100]]
    erase_keys(nodes.url, names)
    assert write_batches(iter([rows]), target).fenced == 100
    reopen_keys(nodes.url, names)
    assert write_batches(iter([rows]), target).applied == 100
    assert delete_prefix(nodes.url, target.prefix) == 1_000
    assert not has_token(nodes.url, target.prefix, "token")
    assert sum(node.client.dbsize() for node in nodes.masters) == 1_000  # type: ignore[misc]


def test_what_the_address_names_is_checked(nodes: Cluster, tmp_path: Path) -> None:
    """All masters are looked at; the kind of address must be that of the servers; no password is shown."""
    report = check_server(nodes.url)
    assert (report.mode, report.max_bytes) == ("cluster", 0)
    plain = f"redis://:{PASSWORD}@127.0.0.1:{nodes.nodes[0].port}/0"
    with pytest.raises(InvalidError, match=r"SFS-604.*one node of a cluster.*redis\+cluster://"):
        check_server(plain)
    with redis_process(tmp_path, password=PASSWORD) as single:
        alone = single.replace("redis://", "redis+cluster://")
        for act in (check_server, lambda url: write_batches(iter([batch(KEYS[:9])]), target_of(url))):
            with pytest.raises(InvalidError, match=r"SFS-604.*is no cluster"):
                act(alone)
    last = nodes.masters[2].client
    last.config_set("maxmemory", "1gb")
    last.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(InvalidError, match=r"SFS-604.*allkeys-lru"):
            check_server(nodes.url)
    finally:
        last.config_set("maxmemory", "0")
        last.config_set("maxmemory-policy", "noeviction")
    refused = nodes.url.replace(PASSWORD, "not-it-4711")
    for act in (check_server, lambda url: write_batches(iter([batch(KEYS[:9])]), target_of(url))):
        with pytest.raises((SparkFSError, redis.RedisError)) as caught:
            act(refused)
        assert "SFS-602" in str(translate(caught.value))
        assert "4711" not in str(caught.value)
    with OnlineReader(refused) as reader, pytest.raises(InvalidError, match="SFS-602"):
        reader.read([select(view_of(), ["n"])], {"origin": ["0"]})


def test_a_full_master_fails_the_write_and_keeps_what_it_has(nodes: Cluster) -> None:
    """It is told at once; with more memory the same write ends well."""
    target, rows = target_of(nodes.url), batch(KEYS, n=range(6_000), s=["x" * 500] * 6_000)
    full = nodes.masters[1].client
    full.config_set("maxmemory", int(nodes.masters[1].info("used_memory")) + 300_000)
    began = time.monotonic()
    try:
        with pytest.raises(redis.OutOfMemoryError):
            write_batches(iter([rows]), target)
        assert time.monotonic() - began < 5
    finally:
        full.config_set("maxmemory", 0)
    counts = write_batches(iter([rows]), target)
    assert counts.applied + counts.equal == counts.rows == 6_000
    assert counts.equal > 0
    assert_ends_right(nodes, target, rows)

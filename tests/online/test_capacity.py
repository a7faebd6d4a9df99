"""What rows will take online, told before they are written, against what servers then take."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from spark_fs.errors import InvalidError, UnavailableError
from spark_fs.online import capacity, codec
from spark_fs.online.capacity import Demand, bytes_per_key, check_capacity, free_bytes, share_online
from spark_fs.online.compare import stored_keys
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import Column
from spark_fs.types import Bytes, Embedding, Float64
from tests.online.servers import UTC, batch, free_port, redis_process, target_of, view_of

MEGABYTE = 1_000_000


def never() -> int:
    raise AssertionError("the keys were counted though all rows fit")


# ---- the decision


def test_rows_that_fit_are_not_counted_by_key() -> None:
    """As many keys as rows: where those take at most 90 % of what is free, nothing else is asked."""
    demand = Demand(keys=9, bytes_per_key=100, free_bytes=1_000)
    assert check_capacity(demand, never) == demand


@pytest.mark.parametrize("free", [10**9, 0, -1])
def test_nothing_new_always_fits(free: int) -> None:
    """Also on a server that is full: rows in the place of others take no more room."""
    assert check_capacity(Demand(10, 10**9, free), lambda: 0).keys == 0


def test_only_new_keys_count_where_rows_are_too_many() -> None:
    """A key with many rows is one; one byte beyond 90 % is refused."""
    assert check_capacity(Demand(10_000, 100, 1_000), lambda: 9).keys == 9
    with pytest.raises(InvalidError, match="SFS-621"):
        check_capacity(Demand(10_000, 1, 1_000), lambda: 901)


def test_a_count_never_raises_the_bound() -> None:
    """Keys are counted about; there are never more than rows."""
    with pytest.raises(InvalidError, match=r"about 10 new keys"):
        check_capacity(Demand(10, 100, 1_000), lambda: 11)


def test_a_refusal_tells_its_figures() -> None:
    """Keys, bytes of each, bytes of all, what is free, and what to do."""
    with pytest.raises(InvalidError) as caught:
        check_capacity(Demand(5_000_000, 120, 40_000_000), lambda: 3_000_000)
    for part in ("3,000,000 new keys of 120 bytes", "360,000,000 bytes", "40,000,000 are free", "90 %", "maxmemory"):
        assert part in str(caught.value)


# ---- what is free


def test_free_is_what_maxmemory_leaves(tmp_path: Path) -> None:
    """On a full server it is negative, and it falls as rows come."""
    with redis_process(tmp_path, "--maxmemory", "50mb") as url, redis.Redis.from_url(url) as client:
        before = free_bytes([client])
        assert before is not None
        assert 40 * MEGABYTE < before < 50 * 1024 * 1024
        client.setrange("x", 10 * MEGABYTE, b"x")
        after = free_bytes([client])
        assert after is not None
        assert 9 * MEGABYTE < before - after < 12 * MEGABYTE
        client.config_set("maxmemory", 5 * MEGABYTE)
        assert (free_bytes([client]) or 0) < 0


def test_without_a_limit_the_machine_is_one(url: str, client: redis.Redis) -> None:
    """Less than its memory, and more than none."""
    memory: Any = client.info("memory")
    free = free_bytes([client])
    assert free is not None
    assert 0 < free < memory["total_system_memory"]


def test_the_fullest_master_counts_for_each(tmp_path: Path) -> None:
    """Keys are spread evenly: the others cannot take what one has no room for."""
    with (
        redis_process(tmp_path, "--maxmemory", "50mb") as wide,
        redis_process(tmp_path, "--maxmemory", "10mb") as narrow,
        redis.Redis.from_url(wide) as first,
        redis.Redis.from_url(narrow) as second,
    ):
        least = free_bytes([second])
        assert least is not None
        assert abs((free_bytes([first, second]) or 0) - 2 * least) < MEGABYTE // 10


def test_a_dead_server_is_told() -> None:
    """As everywhere else."""
    with redis.Redis(port=free_port()) as client, pytest.raises(UnavailableError, match="SFS-601"):
        free_bytes([client])


# ---- what a row takes

FLOATS = tuple(Column(f"f{number}", Float64) for number in range(5))
BLOB = (Column("blob", Bytes),)
VECTOR = (Column("v", Embedding(128)),)
#: Features, and a value of each for row ``n``.
SHAPES: dict[str, tuple[Sequence[Column], Any]] = {
    "floats": (FLOATS, lambda n: dict.fromkeys((column.name for column in FLOATS), n / 7)),
    "small blobs": (BLOB, lambda n: {"blob": b"x" * (n % 40)}),
    "blobs of all sizes": (BLOB, lambda n: {"blob": b"x" * (n * 15 % 3_000)}),
    "vectors": (VECTOR, lambda n: {"v": [float(n)] * 128}),
}


def rows_of(shape: str, count: int, events: datetime, first: int = 0) -> Any:
    features, values = SHAPES[shape]
    columns: dict[str, list[Any]] = {column.name: [] for column in features}
    for number in range(first, first + count):
        for name, value in values(number).items():
            columns[name].append(value)
    keys = [b"user:%012d" % number for number in range(first, first + count)]
    return batch(keys, events, features=features, **columns)


@pytest.mark.parametrize("ttl", [None, timedelta(days=2)])
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "computed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_rows_take_is_told_before(
    url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, shape: str, measured: bool, ttl: timedelta | None
) -> None:
    """Not less than the server takes for many rows then, and little more; nothing is left of the sample.

    Valkey packs rows more densely than Redis does, which shows where the size is computed.
    """
    if not measured:
        monkeypatch.setattr(capacity, "_measured", lambda *_: [])
    now, count = datetime.now(UTC), 100_000 if shape in ("floats", "small blobs") else 8_000
    target = target_of(url, view_of(features=SHAPES[shape][0], ttl=ttl))
    told = bytes_per_key(rows_of(shape, 200, now), target, [client])
    assert client.dbsize() == 0

    def used() -> int:
        memory: Any = client.info("memory")
        return int(memory["used_memory"]) - int(memory["mem_clients_normal"])  # buffers of clients come and go

    while client.info("memory")["lazyfree_pending_objects"]:  # type: ignore[index]
        time.sleep(0.01)  # the rows of the last test are being freed
    before = used()
    write_batches(iter([rows_of(shape, count, now)]), target)
    taken = (used() - before) / count
    assert 0.98 * taken <= told <= (1.4 if measured else 1.65) * taken, f"{shape}: {told} told, {taken:.1f} taken"


def test_no_row_takes_nothing(url: str, client: redis.Redis) -> None:
    """An empty sample measures nothing."""
    assert bytes_per_key(batch([]), target_of(url), [client]) == 0


def test_a_row_that_does_not_fit_its_type_is_told(url: str, client: redis.Redis) -> None:
    """It would stop the run later anyhow."""
    sample = batch([b"a"]).set_column(4, "n", batch([b"a"], features=BLOB, blob=[b"x"]).column("blob"))
    with pytest.raises(InvalidError, match="SFS-609"):
        bytes_per_key(sample, target_of(url), [client])


def test_rows_of_a_sample_are_seen_by_nobody(url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under the names of rows, not by an audit; where they cannot be removed they go by themselves, and soon."""
    target, seen = target_of(url), []
    client.set(codec.redis_key(target.prefix, b"a"), "there")
    real = redis.client.Pipeline.unlink

    def kept(pipeline: Any, name: bytes) -> Any:
        seen.append(name)
        return real(pipeline, b"another")

    monkeypatch.setattr(redis.client.Pipeline, "unlink", kept)
    assert bytes_per_key(batch([b"a"], n=[1], s=["x"]), target, [client]) > 0
    (name,) = seen
    assert client.get(codec.redis_key(target.prefix, b"a")) == b"there"
    assert name.startswith(b"flights:")
    assert 0 < client.pttl(name) <= 60_000  # type: ignore[operator]
    listed = [key for found in stored_keys(iter([]), target) for key in found.column("_key").to_pylist()]
    assert listed == [b"a"]


@pytest.mark.parametrize("denied", ["+@all -memory", "+@all -set"])
def test_a_user_who_may_not_measure_gets_a_computed_size(tmp_path: Path, denied: str) -> None:
    """With few rights, as writers have; the two sizes are about the same."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.execute_command("ACL", "SETUSER", "writer", "on", ">pw", "~flights:*", *denied.split())
        sample = rows_of("floats", 200, datetime.now(UTC))
        target = target_of(url, view_of(features=FLOATS))
        measured = bytes_per_key(sample, target, [client])
        with redis.Redis.from_url(url.replace("redis://", "redis://writer:pw@")) as writer:
            computed = bytes_per_key(sample, target, [writer])
            assert capacity._measured([b"flights:x"], [b"1"], [writer]) == []
        assert abs(computed - measured) <= 0.15 * measured
        assert client.dbsize() == 0


def test_a_full_server_gets_a_computed_size(tmp_path: Path) -> None:
    """There is no room for the sample; that it is full is found by the check then."""
    with redis_process(tmp_path, "--maxmemory", "1") as url, redis.Redis.from_url(url) as client:
        target = target_of(url, view_of(features=FLOATS))
        assert 100 < bytes_per_key(rows_of("floats", 200, datetime.now(UTC)), target, [client]) < 300


# ---- which keys are online


def test_the_share_of_keys_online(url: str, client: redis.Redis) -> None:
    """Of those asked for; other views' keys are none of them."""
    target = target_of(url)
    keys = [b"%d" % number for number in range(100)]
    write_batches(iter([batch(keys[:25])]), target)
    write_batches(iter([batch(keys)]), replace(target, prefix=b"flights:weather@2:"))
    assert share_online(keys, target, [client]) == 0.25
    assert share_online([], target, [client]) == 0.0


@contextmanager
def cluster(folder: Path) -> Iterator[list[redis.Redis]]:
    """A client for each of three masters."""
    with ExitStack() as stack:
        ports, masters = [], []
        for number in range(3):
            home = folder / str(number)
            home.mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", str(free_port())]
            url = stack.enter_context(redis_process(home, *options))
            masters.append(stack.enter_context(redis.Redis.from_url(url)))
            ports.append(url.split(":")[-1].partition("/")[0])
        nodes = [f"127.0.0.1:{port}" for port in ports]
        subprocess.run(
            ["redis-cli", "--cluster", "create", *nodes, "--cluster-yes"], check=True, capture_output=True, timeout=60
        )
        while not all(master.cluster("INFO")["cluster_state"] == "ok" for master in masters):
            time.sleep(0.05)
        yield masters


def test_in_a_cluster_each_key_is_its_masters(tmp_path: Path) -> None:
    """The others answer that it is elsewhere: sizes are those of one master's rows, keys are looked up on all."""
    with cluster(tmp_path) as masters:
        target = target_of("redis://nowhere")
        keys = [b"%d" % number for number in range(300)]
        for name in (codec.redis_key(target.prefix, key) for key in keys[:100]):
            slots = [master.cluster("KEYSLOT", name) for master in masters]
            assert len(set(slots)) == 1
            masters[min(2, int(slots[0]) * 3 // 16_384)].set(name, "x" * 28)
        assert sum(int(master.dbsize()) for master in masters) == 100  # type: ignore[arg-type]
        assert share_online(keys, target, masters) == pytest.approx(1 / 3)
        sample = batch(keys, n=range(300), s=["x"] * 300)
        size = bytes_per_key(sample, target, masters)
        assert 100 < size < 250
        assert capacity._measured([codec.redis_key(target.prefix, keys[0]) + b"x"], [b"x"], masters) != []
        assert sum(int(master.dbsize()) for master in masters) == 100  # type: ignore[arg-type]

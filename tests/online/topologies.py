"""Real servers that stand in for each other: a master, its replica and sentinels; and a cluster. Stopped by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from tests.online.servers import await_answer, free_port, redis_binary

PASSWORD = "sesame"
SENTINEL_PASSWORD = "4711-open"
SERVICE = "features"


def eventually(holds: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Return what ``holds`` gives once it is true; an error of a server counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = holds()
        except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
            found, what_else = None, f": {error}"
        else:
            what_else = ""
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}{what_else}"
        time.sleep(0.02)


@dataclass
class Node:
    """One server process, which may be killed, frozen and started again on its port."""

    folder: Path
    options: Sequence[str]
    port: int = field(default_factory=free_port)
    password: str = PASSWORD
    process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> redis.Redis:
        """A plain client; the same one each time."""
        if not hasattr(self, "_client"):
            retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
            self._client = redis.Redis(port=self.port, password=self.password, socket_timeout=5, retry=retry)
        return self._client

    def start(self) -> None:
        self.process = subprocess.Popen([redis_binary(), *self.options], stdout=subprocess.DEVNULL)
        await_answer(f"redis://:{self.password}@127.0.0.1:{self.port}/0")

    @property
    def is_running(self) -> bool:
        return self.process is not None

    def kill(self) -> None:
        """As a power cut: nothing is saved."""
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None
            self.client.close()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The process stands still for the block: connections stay, and nothing is answered."""
        assert self.process is not None
        process = self.process
        os.kill(process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)

    def info(self, name: str) -> Any:
        return self.client.info()[name]  # type: ignore[index]


def port_with_bus() -> int:
    """A free port of which the one 10,000 above it is free too: there the nodes of a cluster talk with each other."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as probe:
            if port < 55_000:
                probe.bind(("127.0.0.1", port + 10_000))
                return port


def _data_node(folder: Path, *options: str) -> Node:
    port = port_with_bus()
    place = folder / str(port)
    place.mkdir()
    login = ["--requirepass", PASSWORD, "--masterauth", PASSWORD]
    # Replicas begin at once; without it a full copy waits for five seconds.
    copying = ["--repl-diskless-sync-delay", "0", "--repl-timeout", "5"]
    common = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(place), "--save", "", *login, *copying]
    return Node(place, [*common, *options], port)


# ---- sentinels


@dataclass
class Sentinels:
    """A master, its replica, and three sentinels of which two must agree."""

    servers: list[Node]
    sentinels: list[Node]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.sentinels)
        return f"redis+sentinel://:{PASSWORD}@{hosts}/{SERVICE}/0?sentinel_password={SENTINEL_PASSWORD}"

    @property
    def master(self) -> Node:
        """The server that the sentinels name."""
        port = int(self.sentinels[0].client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
        return next(node for node in self.servers if node.port == port)

    @property
    def replica(self) -> Node:
        return next(node for node in self.servers if node is not self.master)

    def is_whole(self) -> bool:
        """Whether all is as after a quiet start: a master, a replica that has caught up, sentinels that know both."""
        master, replica = self.master, self.replica
        state = replica.client.info("replication")
        agreed = all(node.client.sentinel_master(SERVICE)["port"] == master.port for node in self.sentinels)  # type: ignore[index]
        known = all(
            node.client.sentinel_master(SERVICE)["num-other-sentinels"] == 2
            and [r["flags"] for r in node.client.sentinel_slaves(SERVICE)] == ["slave"]
            for node in self.sentinels
        )
        roles = [node.info("role") for node in (master, replica)]
        return (
            agreed
            and known
            and roles == ["master", "slave"]
            and state["master_port"] == master.port  # type: ignore[index]
            and state["master_link_status"] == "up"  # type: ignore[index]
        )

    def heal(self) -> None:
        """Start what was killed, wait until all is whole, and empty it."""
        for node in [*self.servers, *self.sentinels]:
            if not node.is_running:
                node.start()
        master = self.master
        if self.replica.info("master_host" if self.replica.info("role") == "slave" else "role") == "master":
            # The sentinels would do it too, some ten seconds later.
            self.replica.client.replicaof("127.0.0.1", str(master.port))
        eventually(self.is_whole, "a master with its replica, known to all sentinels", 60)
        self.master.client.flushall()


@contextmanager
def sentinels(folder: Path) -> Iterator[Sentinels]:
    """A master, a replica and three sentinels for the block."""
    with ExitStack() as stack:
        servers = [_data_node(folder) for _ in range(2)]
        for node in servers:
            stack.callback(node.kill)
            node.start()
        servers[1].client.replicaof("127.0.0.1", str(servers[0].port))
        watchers = []
        for _ in range(3):
            port = free_port()
            place = folder / f"sentinel{port}"
            place.mkdir()
            (place / "sentinel.conf").write_text(
                "\n".join(
                    [
                        f"port {port}",
                        "bind 127.0.0.1",
                        f"dir {place}",
                        f"requirepass {SENTINEL_PASSWORD}",
                        f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
                        f"sentinel monitor {SERVICE} 127.0.0.1 {servers[0].port} 2",
                        f"sentinel auth-pass {SERVICE} {PASSWORD}",
                        f"sentinel down-after-milliseconds {SERVICE} 1000",
                        f"sentinel failover-timeout {SERVICE} 1000",
                        "",
                    ]
                )
            )
            node = Node(place, [str(place / "sentinel.conf"), "--sentinel"], port, SENTINEL_PASSWORD)
            stack.callback(node.kill)
            node.start()
            watchers.append(node)
        setup = Sentinels(servers, watchers)
        setup.heal()
        yield setup


# ---- cluster


@dataclass
class Cluster:
    """Masters of a cluster, each with a replica."""

    nodes: list[Node]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])
        return f"redis+cluster://:{PASSWORD}@{hosts}"

    @property
    def running(self) -> list[Node]:
        return [node for node in self.nodes if node.is_running]

    @property
    def masters(self) -> list[Node]:
        """The masters that run, by what they say of themselves, in the order of their slots."""
        own = {node.port: node for node in self.running if node.info("role") == "master"}
        ranges: Any = self.running[0].client.execute_command("CLUSTER SLOTS")
        ports = dict.fromkeys(master[1] for _, _, master, *_ in sorted(ranges, key=lambda found: found[0]))
        return [own[port] for port in ports if port in own]

    def slots_of(self, master: Node, among: Sequence[int]) -> list[int]:
        """Those of the slots that a master has, in their order: earlier tests may have moved some."""
        ranges: Any = master.client.execute_command("CLUSTER SLOTS")
        return [slot for slot in sorted(among) if any(a <= slot <= b and at[1] == master.port for a, b, at, *_ in ranges)]

    def replica_of(self, master: Node) -> Node:
        found = [n for n in self.running if n.info("role") == "slave" and n.info("master_port") == master.port]
        return found[0]

    def is_whole(self) -> bool:
        """Whether all slots are served and each master has a replica that has caught up, in the eyes of all nodes."""
        for node in self.nodes:
            state: Any = node.client.execute_command("CLUSTER INFO")
            if state["cluster_state"] != "ok" or state["cluster_slots_ok"] != "16384":
                return False
            known: Any = node.client.execute_command("CLUSTER NODES")
            if len(known) != len(self.nodes) or any("fail" in entry["flags"] for entry in known.values()):
                return False
        replicas = [node for node in self.nodes if node.info("role") == "slave"]
        served = {node.info("master_port") for node in replicas if node.info("master_link_status") == "up"}
        return len(served) == len(replicas) == len(self.nodes) // 2 and len(self.masters) == len(self.nodes) // 2

    def heal(self) -> None:
        """Start what was killed, wait until all is whole, and empty it."""
        for node in self.nodes:
            if not node.is_running:
                node.start()
        eventually(self.is_whole, "three masters with a replica each", 60)
        for node in self.masters:
            node.client.flushall()


@contextmanager
def cluster(folder: Path, *, count: int = 3, replicas: bool = True, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """Three masters, or one, each with a replica if wanted, for the block."""
    cluster_options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1500", "--cluster-replica-validity-factor", "0"]
    with ExitStack() as stack:
        nodes = [_data_node(folder, *cluster_options, *options) for _ in range(2 * count if replicas else count)]
        for node in nodes:
            stack.callback(node.kill)
            node.start()
        for number, node in enumerate(nodes[:count]):
            cuts = [-(-16384 * place // count) for place in (number, number + 1)]
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", cuts[0], cuts[1] - 1)
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            nodes[0].client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        for master, replica in zip(nodes[:count], nodes[count:], strict=False):
            name = master.client.execute_command("CLUSTER", "MYID").decode()

            def follow(replica: Node = replica, name: str = name) -> bool:
                return bool(replica.client.execute_command("CLUSTER", "REPLICATE", name))

            eventually(follow, "a replica that knows its master")
        setup = Cluster(nodes)
        if replicas:
            setup.heal()
        else:
            eventually(
                lambda: all(n.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for n in nodes), "a cluster"
            )
        yield setup

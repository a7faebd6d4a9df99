"""Redis for a benchmark: one server, or a cluster of three masters, on free ports; and what redis-benchmark gets out of it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import redis

HOST = "127.0.0.1"
PROGRAMS = ("redis-server", "redis-benchmark", "redis-cli")


def require_programs() -> None:
    """End the benchmark where Redis is not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} missing: apt-get install redis-server redis-tools")


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[str]:
    """A server without persistence for the block; gives its URL."""
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["redis-server", "--port", str(port), "--bind", HOST, "--save", "", "--dir", str(folder), *options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"redis://{HOST}:{port}/0"
            _await(url)
            yield url
        finally:
            process.terminate()


@contextmanager
def redis_cluster(folder: Path, masters: int = 3) -> Iterator[tuple[str, Sequence[str]]]:
    """A cluster without replicas for the block; gives its URL, and those of its masters."""
    with ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000")
        urls = [stack.enter_context(redis_server(folder / f"master-{n}", *options)) for n in range(masters)]
        nodes = [f"{HOST}:{url_port(url)}" for url in urls]
        create = ["redis-cli", "--cluster", "create", *nodes, "--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        for url in urls:
            with redis.Redis.from_url(url) as client:
                deadline = time.monotonic() + 30
                while client.cluster("info")["cluster_state"] != "ok":
                    assert time.monotonic() < deadline, "the cluster does not come up"
                    time.sleep(0.1)
        yield f"redis+cluster://{','.join(nodes)}", urls


def flush(*urls: str) -> None:
    """Empty these servers."""
    for url in urls:
        with redis.Redis.from_url(url, socket_timeout=60) as client:
            client.flushall()


def used_memory(url: str) -> int:
    """The bytes that the server has allocated, without the buffers of its clients."""
    with redis.Redis.from_url(url) as client:
        info = client.info("memory")
    return int(info["used_memory"]) - int(info["mem_clients_normal"])


def set_rate(url: str, keys: int, value_bytes: int) -> float:
    """SETs per second of redis-benchmark, 500 in a pipeline."""
    argv = ["redis-benchmark", "-p", str(url_port(url)), "-t", "set", "-n", str(keys), "-r", str(keys), "-P", "500"]
    out = subprocess.run([*argv, "-d", str(value_bytes), "--csv"], capture_output=True, text=True, check=True).stdout
    return float(out.splitlines()[-1].split(",")[1].strip('"'))


def url_port(url: str) -> int:
    """The port of one of these servers."""
    return int(url.rsplit(":", 1)[1].split("/")[0])


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
        if port + 10_000 < 65_536:  # where a node of a cluster also listens
            return port


def _await(url: str) -> None:
    deadline = time.monotonic() + 20
    with redis.Redis.from_url(url) as client:
        while time.monotonic() < deadline:
            with suppress(redis.ConnectionError):
                client.ping()
                return
            time.sleep(0.05)
    sys.exit("redis-server does not answer")

"""The embedded server: started once, kept apart, stopped with its data saved."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online import server
from spark_fs.online.connect import check_server, open_client
from tests.online.servers import free_port, redis_process


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A state folder with a space and a quote in its name; whatever runs there is stopped."""
    home = tmp_path / 'a "state" folder'
    yield home
    server.stop(home)


def test_start_is_idempotent_and_stop_keeps_the_data(folder: Path) -> None:
    """A second start finds the first server; after a stop a new one has the same data."""
    assert server.status(folder) is None
    first = server.start(folder)
    assert server.start(folder) == first == server.status(folder)
    with redis.Redis.from_url(first.url) as client:
        client.set("a", "1")
        assert client.info("server")["process_id"] == first.pid  # type: ignore[index]
    assert server.stop(folder)
    assert server.status(folder) is None
    assert not server.stop(folder)
    second = server.start(folder)
    assert second.run_id != first.run_id
    with redis.Redis.from_url(second.url) as client:
        assert client.get("a") == b"1"


def test_the_server_is_private_and_never_evicts(folder: Path) -> None:
    """It listens on loopback only, asks for a password that other users cannot read, and refuses writes when full."""
    state = server.start(folder)
    assert check_server(state.url).maxmemory_policy == "noeviction"
    with open_client(f"redis://127.0.0.1:{state.port}/0") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis.from_url(state.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"  # type: ignore[index]
    for name in ("server.json", "server.conf", "server.log"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    password = state.url.split(":")[2].split("@")[0]
    assert password not in repr(state)
    assert password not in Path(f"/proc/{state.pid}/cmdline").read_text() if sys.platform == "linux" else True


def test_the_server_outlives_the_process_that_started_it(folder: Path) -> None:
    """A command that starts the server may end: the server stays for the next one."""
    script = f"from pathlib import Path; from spark_fs.online import server; print(server.start(Path({str(folder)!r})).pid)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    state = server.status(folder)
    assert state is not None
    assert state.pid == int(ran.stdout)
    assert ran.stderr == ""


def test_two_starts_at_once_give_one_server(folder: Path) -> None:
    """Starts that race wait for each other and find the same server."""
    with ThreadPoolExecutor(4) as pool:
        states = set(pool.map(lambda _: server.start(folder), range(4)))
    assert len(states) == 1


def test_a_killed_server_is_started_again(folder: Path) -> None:
    """State that a dead server left behind is not believed."""
    state = server.start(folder)
    os.kill(state.pid, 9)
    os.waitpid(state.pid, 0)
    assert server.status(folder) is None
    assert server.start(folder).run_id != state.run_id


def test_a_reused_process_id_or_port_is_not_taken_for_the_server(folder: Path, tmp_path: Path) -> None:
    """Neither a living process of the same id nor a stranger on the same port is believed; the server is asked."""
    state = server.start(folder)
    server.stop(folder)
    with redis_process(tmp_path) as stranger:
        port = int(stranger.split(":")[2].split("/")[0])
        for url in (stranger, f"redis://:{'x' * 8}@127.0.0.1:{port}/0"):
            left = replace(state, url=url, pid=os.getpid(), port=port)
            (folder / "server.json").write_text(
                json.dumps({"url": left.url, "pid": left.pid, "port": left.port, "run_id": left.run_id})
            )
            assert server.status(folder) is None
            assert not server.stop(folder)
        with redis.Redis.from_url(stranger) as client:
            assert client.ping()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}'])
def test_a_damaged_state_file_is_no_server(folder: Path, text: str) -> None:
    """A state file cut short by a crash does not stop the next start."""
    folder.mkdir()
    (folder / "server.json").write_text(text)
    assert server.status(folder) is None
    assert server.start(folder).port > 0


def test_a_port_in_use_is_told_with_the_way_out(folder: Path) -> None:
    """A chosen port that is taken is an error that names it; a free one is used."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidError, match=rf"SFS-612.*{port}.*Fix: "):
            server.start(folder, port)
    assert server.status(folder) is None
    port = free_port()
    assert server.start(folder, port).port == port


def test_a_server_that_does_not_come_up_says_why(folder: Path) -> None:
    """A snapshot that cannot be read ends the start with the server's own words, and leaves nothing running."""
    folder.mkdir()
    (folder / "dump.rdb").write_bytes(b"REDIS0011 this is no snapshot")
    with pytest.raises(SparkFSError, match="SFS-613") as caught:
        server.start(folder)
    assert caught.value.problems[0].why
    assert server.status(folder) is None
    (folder / "dump.rdb").unlink()


def test_without_any_program_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the package nor a server on the PATH is found the error names what to install."""
    monkeypatch.setattr(server, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(InvalidError, match=r"SFS-611.*spark-fs\[local\]"):
        server.start(folder)

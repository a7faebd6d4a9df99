"""What happens when the ground gives way: interrupted, killed, out of disk, port taken. Each time the re-run succeeds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.errors import ExitCode, SparkFSError
from spark_fs.online import server
from tests.e2e.command import PATIENCE_SECONDS, processes, run, start, until, with_jars
from tests.project import open_project

UTC = timezone.utc
HOUR = timedelta(hours=1)
END = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
START = END - timedelta(days=10)

SETTINGS = """
spark:
  master: local[2]
  conf:
    spark.driver.memory: 1g
    spark.sql.shuffle.partitions: 2
    spark.databricks.delta.snapshotPartitions: 1
"""
#: While the file ``gate`` is there, a stage that reads the source says that it is under way and waits.
GATED = """
    from pathlib import Path

    FOLDER = "{folder}"

    def wait_at_gate(frame):
        def wait(batches):
            import time

            for batch in batches:
                while Path(FOLDER, "gate").exists():
                    Path(FOLDER, "waiting").touch()
                    time.sleep(0.05)
                yield batch

        return frame.mapInArrow(wait, frame.schema)

    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64)], payments, transformation=wait_at_gate)
"""
PLAIN = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64)], payments)
"""


def put(folder: Path, amounts: dict[int, int]) -> None:
    """Make one payment of each user all that the source holds."""
    (folder / "data").mkdir(exist_ok=True)
    rows = {"user_id": list(amounts), "at": [START + HOUR * user for user in amounts], "amount": list(amounts.values())}
    schema = pa.schema([("user_id", pa.int64()), ("at", pa.timestamp("us", tz="UTC")), ("amount", pa.int64())])
    pq.write_table(pa.table(rows, schema=schema), folder / "data" / "part.parquet")


def stored(root: Path) -> dict[int, int]:
    """What the feature table holds, read without Spark."""
    table = DeltaTable(str(root / "shop" / "spend" / "v1")).to_pyarrow_table().to_pydict()
    assert len(set(table["user_id"])) == len(table["user_id"])
    return dict(zip(table["user_id"], table["amount"], strict=True))


# ---- interrupted and killed


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """An applied project whose builds wait while its gate is closed."""
    folder = with_jars(tmp_path_factory.mktemp("gated"))
    fs = open_project(folder, GATED.format(folder=folder), settings=SETTINGS)
    fs.apply()
    yield fs
    server.stop(folder / ".spark_fs")


class StuckBuild:
    """A running ``spark-fs build`` with a stage that waits at the gate; its processes share one session."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        (folder / "waiting").unlink(missing_ok=True)
        (folder / "gate").touch()
        self.log = folder / "stderr"
        with open(self.log, "w") as err:
            self.process = start(folder, "--env", "test", "build", *arguments, err=err)
        until(lambda: (folder / "waiting").exists() and re.search(r"^stage \d+: ", self.log.read_text(), re.MULTILINE))

    def processes(self, program: str = "") -> list[int]:
        """The ids of its living processes whose command line has ``program`` in it."""
        return [other.pid for other in processes() if other.session == self.process.pid and program in other.line]

    def finish(self) -> tuple[int, str]:
        """Its exit code and all that it printed on stderr; opens the gate."""
        try:
            self.process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            (self.folder / "gate").unlink()
        return self.process.returncode, self.log.read_text()


def test_control_c_ends_cleanly_and_the_rerun_succeeds(gated: FeatureStore) -> None:
    """Ctrl-C while a stage runs: exit code 130, no Java left, the run is not left as running, the same command completes."""
    folder, root = gated.environment.root, Path(gated.environment.offline_root)
    put(folder, {1: 10, 2: 20, 3: 30})
    stuck = StuckBuild(folder)
    assert stuck.processes("java")
    os.killpg(stuck.process.pid, signal.SIGINT)
    code, told = stuck.finish()
    assert code == ExitCode.INTERRUPTED, told
    assert stuck.processes("java") == []
    until(lambda: stuck.processes() == [])
    assert [run["state"] for run in gated.registry.runs()] in (["interrupted"], ["failed"])
    assert gated.registry.built(gated.registry.state().require_view("spend")) == []

    again = run(folder, "--env", "test", "build", "--output", "json")
    assert again.code == 0, again.err
    assert [row["rows_written"] for row in again.json()] == [3]
    assert stored(root) == {1: 10, 2: 20, 3: 30}


def test_a_killed_driver_leaves_the_table_as_it_was(gated: FeatureStore) -> None:
    """Kill -9 of all processes in the middle of a rebuild: readers see the rows of before, the re-run those of now."""
    folder, root = gated.environment.root, Path(gated.environment.offline_root)
    before = stored(root)
    put(folder, {1: 11, 2: 20, 4: 40})
    interval = ("--start", START.isoformat(), "--end", END.isoformat())
    stuck = StuckBuild(folder, *interval)
    for pid in stuck.processes():
        os.kill(pid, signal.SIGKILL)
    stuck.finish()
    until(lambda: stuck.processes() == [])
    assert stored(root) == before

    again = run(folder, "--env", "test", "build", *interval)
    assert again.code == 0, again.err
    assert stored(root) == {1: 11, 2: 20, 4: 40}


# ---- no room, no port


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path, small_disk: Path, spark: SparkSession) -> None:
    """No space: SFS-404, the rows of before stay readable; with space the same build goes through."""
    fs = open_project(tmp_path, PLAIN, spark, settings=f"offline:\n  root: {small_disk}\n")
    fs.apply()
    put(tmp_path, {1: 10, 2: 20})
    fs.build(end=END)
    put(tmp_path, {user: user * 1_000_003 % 999_983 for user in range(100)})
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(SparkFSError) as caught:
        fs.build(start=START, end=END)
    assert caught.value.code == "SFS-404", caught.value
    assert "spend@1" in str(caught.value)
    assert fs.registry.runs()[0]["state"] == "failed"
    assert stored(small_disk) == {1: 10, 2: 20}
    filler.unlink()
    fs.build(start=START, end=END)
    assert stored(small_disk) == {user: user * 1_000_003 % 999_983 for user in range(100)}


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    """The embedded server does not take another port than the one that is set, and the message names it."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        open_project(tmp_path, PLAIN, settings=f"online:\n  port: {port}\n")
        done = run(tmp_path, "--env", "test", "online", "start")
    assert done.code == ExitCode.INVALID
    assert "[SFS-612]" in done.err
    assert str(port) in done.err
    assert run(tmp_path, "--env", "test", "online", "status", "--output", "json").json() == [{"running": False}]

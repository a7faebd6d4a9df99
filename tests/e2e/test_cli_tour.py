"""The tour a new user takes, by the real command in real processes: one project, the tests in their order."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from spark_fs import FeatureStore
from spark_fs.datasets.dataset import Dataset
from spark_fs.online import server
from tests.e2e.command import Done, environment, processes, run, start, watching, with_jars

#: A secret that the project's settings and source refer to by variable. It must appear nowhere.
CANARY = "hush-4f1c9a"
USERS = [str(user) for user in range(1, 11)]
NOW = datetime.now(timezone.utc)
#: Before the end of the template's data: some of it is published by `materialize`, the rest by the incremental run.
MIDDLE = (NOW - timedelta(days=10)).strftime("%Y-%m-%d")


class Tour:
    """The project, and the command run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"CANARY": CANARY, **watching(folder.parent / "watch")}

    def __call__(self, *arguments: str, expect: int = 0) -> Done:
        """Run ``spark-fs``; its exit code must be the expected one, and the secret must not be told."""
        return self.check(run(self.folder, *arguments, variables=self.variables), expect)

    def check(self, done: Done, expect: int = 0) -> Done:
        assert done.code == expect, done.out + done.err
        assert CANARY not in done.out + done.err
        return done

    def online(self, *features: str) -> dict[str, list[Any]]:
        """Column → values of all users, by the command."""
        named = [argument for feature in features for argument in ("--features", feature)]
        entities = [argument for user in USERS for argument in ("--entity", f"user_id={user}")]
        answer = self("get-online-features", *named, *entities, "--output", "json").json()
        columns = [result["values"] for result in answer["results"]]
        return dict(zip(answer["metadata"]["feature_names"], columns, strict=True))


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    folder = tmp_path_factory.mktemp("tour") / "my_features"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", CANARY)  # for the feature stores that tests open themselves
        yield Tour(folder)
    server.stop(folder / ".spark_fs")


def payments(tour: Tour) -> dict[int, list[tuple[str, float]]]:
    """The template's data: user → (time, amount) in order of time."""
    found: dict[int, list[tuple[str, float]]] = {}
    with open(tour.folder / "data" / "payments.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["user_id"]), []).append((row["paid_at"], float(row["amount"])))
    return {user: sorted(rows) for user, rows in found.items()}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# ---- definitions


def test_init_writes_a_project_that_is_valid(tour: Tour) -> None:
    """`init` lists the files it wrote and refuses to write them twice; the new project is valid as it stands."""
    written = tour("init").out.split()
    assert {"conf/base.yml", "feature_repo/features.py", "data/payments.csv"} <= set(written)
    assert all((tour.folder / name).is_file() for name in written)
    assert "[SFS-208]" in tour("init", expect=2).err
    assert tour("validate", "--output", "json").json() == [{"entities": 1, "sources": 1, "views": 1, "services": 1}]

    with_jars(tour.folder)
    edit(tour.folder / "conf" / "local.yml", "spark.driver.memory: 4g", "spark.driver.memory: 1g")
    guarded = "redis://:${CANARY}@127.0.0.1:1/0"  # nobody listens on port 1
    (tour.folder / "conf" / "guarded.yml").write_text(
        f"{(tour.folder / 'conf' / 'local.yml').read_text()}online:\n  url: {guarded}\n"
    )
    edit(tour.folder / "feature_repo" / "features.py", '"header": "true"', '"header": "true", "token": "${CANARY}"')
    tour("jars", "fetch")  # all are there: asks nobody


def test_wrong_use_is_told_with_exit_code_2(tour: Tour) -> None:
    """An environment that is not there names those that are; a wrong definition is listed with file and line."""
    unknown = tour("--env", "moon", "plan", expect=2)
    assert "[SFS-201]" in unknown.err
    assert "local" in unknown.err
    broken = tour.folder / "feature_repo" / "broken.py"
    broken.write_text("from spark_fs import FeatureService\n\nFeatureService('empty', [])\n")
    (problem,) = tour("validate", "--output", "json", expect=2).json()
    assert (problem["code"], problem["where"]) == ("SFS-101", "feature_repo/broken.py:3")
    broken.unlink()
    assert "[SFS-303]" in tour("get-online-features", "--features", "spending:amount", "--entity", "user_id=1", expect=2).err


def test_apply_does_what_the_plan_file_says(tour: Tour) -> None:
    """`plan` tells by exit code 3 that there is something to do; after `apply FILE` there is nothing; nobody is asked."""
    planned = tour("plan", "--detailed-exitcode", "--out", "first.json", "--output", "json", expect=3)
    assert planned.json() == json.loads((tour.folder / "first.json").read_text())
    assert planned.json()["summary"].startswith("4 to add")
    assert "[SFS-311]" in tour("apply", expect=2).err
    tour("apply", "first.json")
    assert tour("plan", "--detailed-exitcode", "--output", "json").json()["steps"] == []


def test_a_stale_plan_is_refused(tour: Tour) -> None:
    """A plan made before somebody else's apply ends with exit code 6 and changes nothing."""
    features = tour.folder / "feature_repo" / "features.py"
    edit(features, "Will the customer leave?", "Will she leave?")
    tour("plan", "--out", "stale.json")
    edit(features, "Will she leave?", "Will they leave?")
    tour("apply", "--yes")
    assert "[SFS-305]" in tour("apply", "stale.json", expect=6).err
    tour("plan", "--detailed-exitcode")


# ---- offline


def test_build_fills_the_feature_table(tour: Tour) -> None:
    """`build` reports its rows as one JSON document, with progress on stderr."""
    assert [row["view"] for row in tour("build", "--missing", "--output", "json").json()] == ["spending@1"]
    done = tour("build", "--output", "json")
    (built,) = done.json()
    assert (built["view"], built["rows_written"]) == ("spending@1", sum(map(len, payments(tour).values())))
    assert any(line.startswith("stage ") for line in done.err.splitlines())
    assert tour("build", "--missing", "--output", "json", "--end", NOW.isoformat()).json() == []


def test_a_printed_command_works_in_a_shell(tour: Tour) -> None:
    """`--print` gives a spark-submit line for schedulers, without secrets; run by sh it makes the dataset."""
    with open(tour.folder / "spine.csv", "w", newline="") as file:
        csv.writer(file).writerows([("user_id", "event_timestamp"), *((user, NOW.isoformat()) for user in USERS)])
    arguments = ["--entities", "spine.csv", "--features", "churn_v1", "--description", 'it\'s "new" $HOME']
    line = tour("dataset", "create", "latest", *arguments, "--output", "json", "--print").out
    assert line.count("\n") == 1
    shell = subprocess.run(
        ["sh", "-c", line], cwd=tour.folder.parent, env=environment(tour.variables), capture_output=True, text=True
    )
    tour.check(Done(shell.returncode, shell.stdout, shell.stderr))
    manifest = tour("dataset", "show", "latest", "--output", "json").json()
    assert json.dumps(manifest["checksum"]) in shell.stdout
    assert (manifest["name"], manifest["version"], manifest["rows"]) == ("latest", 1, 10)
    assert manifest["description"] == 'it\'s "new" $HOME'
    assert [column["nulls"] for column in manifest["columns"]] == [0, 0, 0, 0]


def test_a_dataset_from_sql_is_as_of_its_rows(tour: Tour) -> None:
    """Each row of the dataset has the last payment up to its time; show and list agree with what create told."""
    sql = f"SELECT id AS user_id, TIMESTAMP '{MIDDLE} 00:00:00Z' AS event_timestamp FROM range(1, 11)"
    made = tour("dataset", "create", "earlier", "--entities", sql, "--features", "spending:amount", "--output", "json").json()
    expected = {
        user: [amount for at, amount in rows if at <= f"{MIDDLE}T00:00:00Z"][-1] for user, rows in payments(tour).items()
    }
    rows = FeatureStore(tour.folder).get_dataset("earlier").to_arrow().to_pylist()
    assert {row["user_id"]: row["amount"] for row in rows} == expected
    assert tour("dataset", "show", "earlier", "--output", "json").json() == made
    listed = tour("dataset", "list", "--output", "json").json()
    assert {(row["name"], row["version"], row["rows"]) for row in listed} == {("earlier", 1, 10), ("latest", 1, 10)}
    assert "[SFS-303]" in tour("dataset", "show", "earlie", expect=2).err


def test_the_commands_of_the_page_on_datasets_run(tour: Tour) -> None:
    """Every one in docs/datasets.md, as it stands there: a dataset is saved, split, proven, compared, exported, deleted."""
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "spark-fs"
        if arguments[1] == "delete":
            look_at(FeatureStore(tour.folder).get_dataset("spending", version=1))
        told = tour(*arguments).out
        if arguments[1] == "verify":
            assert re.search(r"identical\s+\S?\s*True", told), told
    assert "[SFS-303]" in tour("dataset", "show", "spending", expect=2).err


def look_at(dataset: Dataset) -> None:
    """What the page does in Python."""
    assert dataset["train"].to_arrow().num_rows + dataset["test"].to_arrow().num_rows == dataset.to_arrow().num_rows == 10
    batches = list(dataset["train"].to_batches(1_000, seed=7))
    assert sum(batch.num_rows for batch in batches) == dataset.manifest.split.rows["train"]  # type: ignore[union-attr]


# ---- online


def test_what_is_published_is_what_training_saw(tour: Tour) -> None:
    """`materialize` publishes up to its end, the incremental run the rest; then online and dataset agree for each key."""
    tour("online", "start")
    (first,) = tour("materialize", "2000-01-01", MIDDLE, "--output", "json").json()
    assert (first["view"], first["applied"], first["stale"]) == ("spending@1", 10, 0)
    earlier = {row["user_id"]: row for row in FeatureStore(tour.folder).get_dataset("earlier").to_arrow().to_pylist()}
    assert tour.online("spending:amount")["amount"] == [earlier[int(user)]["amount"] for user in USERS]

    (rest,) = tour("materialize-incremental", "--output", "json").json()
    assert (rest["applied"], rest["equal"], rest["stale"]) == (10, 0, 0)
    latest = {row["user_id"]: row for row in FeatureStore(tour.folder).get_dataset("latest").to_arrow().to_pylist()}
    online = tour.online("churn_v1")
    for name in ("amount", "spent_so_far"):
        assert online[name] == [latest[int(user)][name] for user in USERS]
    assert online["amount"] == [payments(tour)[int(user)][-1][1] for user in USERS]


def test_the_table_tells_why_there_is_no_value(tour: Tour) -> None:
    """As a table a missing entity shows its status; a key of another type is exit code 2."""
    shown = tour("get-online-features", "--features", "spending:amount", "--entity", "user_id=1", "--entity", "user_id=77").out
    assert "NOT_FOUND" in shown
    assert str(payments(tour)[1][-1][1]) in shown
    assert "[SFS-606]" in tour("get-online-features", "--features", "churn_v1", "--entity", "user_id=x", expect=2).err


def test_many_unknown_keys_are_one_call(tour: Tour) -> None:
    """100,000 keys that were never published come back NOT_FOUND, each in its place."""
    response = FeatureStore(tour.folder).get_online_features("churn_v1", {"user_id": range(1_000, 101_000)})
    assert response.statuses["amount"] == ["NOT_FOUND"] * 100_000
    assert response.to_dict()["amount"] == [None] * 100_000


def test_values_outlive_a_restart_of_the_server(tour: Tour) -> None:
    """Stopped, the embedded server is gone; started again it has all values."""
    before = tour.online("churn_v1")
    (running,) = tour("online", "status", "--output", "json").json()
    tour("online", "stop")
    assert [process for process in processes() if process.pid == int(running["pid"])] == []
    assert tour("online", "status", "--output", "json").json() == [{"running": False}]
    (started,) = tour("online", "start", "--output", "json").json()
    assert started["running"]
    assert "***@" in started["url"]
    assert tour.online("churn_v1") == before


# ---- operations


def test_runs_tell_what_was_done(tour: Tour) -> None:
    """Every build and materialization of the tour is listed as done, newest first."""
    runs = tour("runs", "--output", "json").json()
    assert {run["state"] for run in runs} == {"done"}
    assert [run["started_at"] for run in runs] == sorted((run["started_at"] for run in runs), reverse=True)
    assert [run["kind"] for run in runs].count("materialize") == 2
    assert runs[-1]["kind"] == "build"


def test_doctor_finds_nothing_wrong(tour: Tour) -> None:
    """On a machine where the tour works, each check of `doctor` is fine."""
    checks = tour("doctor", "--output", "json").json()
    assert [check for check in checks if check["ok"] is False] == []
    assert len(checks) > 4


def test_a_job_of_the_user_runs_with_the_settings(tour: Tour) -> None:
    """`submit` hands on arguments, settings and Delta, and ends with the exit code of the file."""
    (tour.folder / "my_job.py").write_text(
        "import sys\n"
        "from pyspark.sql import SparkSession\n"
        "spark = SparkSession.builder.getOrCreate()\n"
        "count = spark.read.format('delta').load('.spark_fs/offline/my_features/spending/v1').count()\n"
        "print(sys.argv[1:], spark.conf.get('spark.sql.session.timeZone'), count)\n"
        "sys.exit(9)\n"
    )
    done = tour("submit", "my_job.py", "--day", "2013-07-01", expect=9)
    assert done.out.strip() == f"['--day', '2013-07-01'] UTC {sum(map(len, payments(tour).values()))}"


def test_a_secret_is_not_told_by_a_job(tour: Tour) -> None:
    """A job that fails to reach a server with a password shows the password neither in its messages nor its processes."""
    shown: set[str] = set()
    with start(tour.folder, "--env", "guarded", "materialize-incremental", variables=tour.variables) as process:
        waiter = threading.Thread(target=lambda: outputs.extend(process.communicate()))
        outputs: list[str] = []
        waiter.start()
        while waiter.is_alive():
            shown.update(other.line for other in processes() if other.session == process.pid)
            waiter.join(0.05)
    failed = tour.check(Done(process.returncode, *outputs), expect=1)
    assert "[SFS-601]" in failed.err
    assert any("org.apache.spark.deploy.SparkSubmit" in line for line in shown)
    assert [line for line in shown if CANARY in line] == []
    for arguments in (["online", "status"], ["get-online-features", "--features", "churn_v1", "--entity", "user_id=1"]):
        assert "[SFS-601]" in tour("--env", "guarded", *arguments, expect=1).err
    tour("--env", "guarded", "materialize-incremental", "--print")


def test_destroy_needs_no_pyspark(tour: Tour) -> None:
    """Like every command that starts no job, `destroy` does without pyspark."""
    assert "[SFS-303]" in tour("destroy", "nothing@1", "--yes", expect=2).err


def test_destroy_takes_only_what_nothing_uses(tour: Tour) -> None:
    """A view in use is refused; taken out of the repository, its table and online values go, and nothing else."""
    assert "[SFS-310]" in tour("destroy", "spending", "--yes", expect=2).err
    features = tour.folder / "feature_repo" / "features.py"
    features.write_text(features.read_text().partition("spending = ")[0])
    tour("apply", "--yes")
    assert "[SFS-311]" in tour("destroy", "spending@1", expect=2).err
    (gone,) = tour("destroy", "spending@1", "--yes", "--output", "json").json()
    assert gone["online_keys"] == 10
    assert not Path(gone["feature_table"]).exists()
    assert FeatureStore(tour.folder).get_dataset("latest").to_arrow().num_rows == 10


def test_the_secret_was_written_nowhere(tour: Tour) -> None:
    """After the whole tour no file of the project holds the secret: registry, logs, manifests, plans."""
    files = [file for file in tour.folder.rglob("*") if file.is_file() and file.suffix != ".jar"]
    assert any(file.name == "registry.db" for file in files)
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []

"""The command line as people and schedulers meet it: exit codes, what goes to which stream, what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from spark_fs import FeatureStore
from spark_fs.cli import main
from spark_fs.ledger import Part
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Int64

SPARK_FS = Path(sys.executable).with_name("spark-fs")
ADD_VIEW = """
FeatureView("visits", user, [Field("visits", Int64)], payments)
"""

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Whatever the shell has set; and as wide as a page, so that texts are not broken."""
    monkeypatch.delenv("SPARK_FS_ENV", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def project(tmp_path) -> Path:
    """A new project, made by init."""
    folder = tmp_path / "shop"
    assert CliRunner().invoke(main, ["init", str(folder)]).exit_code == 0
    return folder


@pytest.fixture
def run(project) -> Run:
    """Runs a command in the project."""
    return lambda *arguments: CliRunner().invoke(main, ["--repo", str(project), *arguments])


def definitions(project: Path) -> Path:
    return project / "feature_repo" / "features.py"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Help.


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)


@pytest.mark.parametrize("command", list(commands(main)), ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    """One that names the command itself, to copy and change."""
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"Examples?:\s+spark-fs( --\w+ \w+)* {' '.join(command)}\b", shown.output)


def test_help_lists_all_commands_and_exit_codes():
    """The first page says how to begin."""
    shown = CliRunner().invoke(main, ["--help"]).output
    assert all(name in shown for name in main.commands)
    assert "spark-fs init" in shown
    assert "6 conflict" in shown


def test_help_answers_in_300_ms():
    """A fresh process: nothing heavy is imported. The best of several, for the machine may be busy with other things."""

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([SPARK_FS, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    best = min(seconds() for _ in range(5))
    for _ in range(10):
        best = best if best < 0.3 else min(best, seconds())
    assert best < 0.3


def test_an_unknown_command_is_a_usage_error():
    """Exit code 2, as for every wrong argument."""
    shown = CliRunner().invoke(main, ["aply"])
    assert shown.exit_code == 2
    assert "No such command 'aply'" in shown.stderr


# A new project.


def test_a_new_project_validates_plans_and_applies(run, project):
    """Without a change to it; and then there is nothing left to do."""
    assert run("validate").exit_code == 0
    planned = run("plan")
    assert planned.exit_code == 0
    assert "+ view spending@1" in planned.stdout
    applied = run("apply", "--yes")
    assert applied.exit_code == 0
    assert "Applied: 4 to add" in applied.stdout
    assert run("plan", "--detailed-exitcode").exit_code == 0
    assert (project / ".spark_fs" / "registry.db").is_file()


def test_a_new_project_lists_its_files_and_keeps_its_state_out_of_git(tmp_path):
    """Each line is a file that is now there."""
    shown = CliRunner().invoke(main, ["init", str(tmp_path / "shop")])
    assert sorted(shown.stdout.splitlines()) == sorted(files_below(tmp_path / "shop"))
    assert ".spark_fs/" in (tmp_path / "shop" / ".gitignore").read_text()


@pytest.mark.parametrize("folder", ["my-features", "2024", "café", "x" * 100, "-", "Проект"])
def test_a_project_may_be_made_in_a_folder_of_any_name(tmp_path, folder):
    """The project's own name is made of what the folder's name gives."""
    assert CliRunner().invoke(main, ["init", str(tmp_path / folder)]).exit_code == 0
    shown = CliRunner().invoke(main, ["--repo", str(tmp_path / folder), "validate"])
    assert (shown.exit_code, shown.stderr) == (0, "")


def test_a_project_is_not_made_twice(run, project):
    """SFS-208, exit code 2; every file stays as it was, and none is added."""
    (project / "conf" / "prod.example.yml").unlink()
    append(definitions(project), "# mine\n")
    before = files_below(project)
    shown = CliRunner().invoke(main, ["init", str(project)])
    assert shown.exit_code == 2
    assert "[SFS-208]" in shown.stderr
    assert files_below(project) == before


# Validate.


def test_validate_counts_what_is_there_as_json(run):
    """One document on stdout, nothing on stderr."""
    shown = run("validate", "--output", "json")
    assert json.loads(shown.stdout) == [{"entities": 1, "sources": 1, "views": 1, "services": 1}]
    assert shown.stderr == ""


def test_validate_lists_all_problems_with_file_and_line(run, project):
    """Exit code 2; the messages go to stderr."""
    edit(definitions(project), '"user", [Field("user_id", Int64)]', '"user", [Field("user_id", Float64)]')
    append(definitions(project), 'FeatureView("v", "usr", [Field("x", Int64)], payments, ttl=timedelta(-1))\n')
    line = definitions(project).read_text().count("\n")
    shown = run("validate")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("3 problems:\n")
    assert "[SFS-106]" in shown.stderr
    assert f"Did you mean 'user'? Known: user. (feature_repo/features.py:{line})" in shown.stderr
    assert "ttl below zero" in shown.stderr


def test_validate_gives_problems_as_json_to_programs(run, project):
    """An array of code, what, why, where, fix; the exit code is the same."""
    append(definitions(project), 'FeatureView("v", "usr", [Field("x", Int64)], "nope")\n')
    shown = run("validate", "--output", "json")
    assert shown.exit_code == 2
    assert [problem["code"] for problem in json.loads(shown.stdout)] == ["SFS-103", "SFS-119"]
    assert set(json.loads(shown.stdout)[0]) == {"code", "what", "why", "where", "fix"}


@pytest.mark.parametrize("command", [["plan"], ["plan", "--out", "p.json"], ["apply", "--yes"]])
def test_an_invalid_repository_leaves_no_trace(run, project, command, monkeypatch):
    """Exit code 2: no registry, no plan file, nothing half-written."""
    monkeypatch.chdir(project)
    append(definitions(project), 'FeatureView("v", "usr", [Field("x", Int64)], payments)\n')
    before = files_below(project)
    shown = run(*command)
    assert shown.exit_code == 2
    assert "[SFS-103]" in shown.stderr
    assert set(files_below(project)) - set(before) == set()


def test_an_invalid_repository_leaves_what_was_applied(run, project):
    """The registry is byte for byte as before."""
    run("apply", "--yes")
    before = (project / ".spark_fs" / "registry.db").read_bytes()
    append(definitions(project), ADD_VIEW + "broken\n")
    assert run("apply", "--yes").exit_code == 2
    assert (project / ".spark_fs" / "registry.db").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ("online:\n\tport: 1\n", "SFS-202"),
        ("online:\n  port: 1\n  port: 2\n", "SFS-203"),
        ("online:\n  url: ${NOT_SET_ANYWHERE}\n", "SFS-204"),
        ("onlin:\n  port: 1\n", "SFS-205"),
        ("online:\n  port: high\n", "SFS-206"),
    ],
    ids=["tab", "duplicate", "undefined", "unknown", "wrong"],
)
def test_wrong_settings_stop_every_command_before_it_writes(run, project, settings, code):
    """Exit code 2 with file and line; the same message in each."""
    (project / "conf" / "local.yml").write_text(settings)
    before = files_below(project)
    for command in (["validate"], ["plan"], ["apply", "--yes"], ["build", "--print"], ["runs"], ["doctor"]):
        shown = run(*command)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert f"[{code}]" in shown.stderr
        assert "conf/local.yml:" in shown.stderr
    assert files_below(project) == before


def test_a_command_outside_of_a_project_says_what_to_do(tmp_path):
    """SFS-201, exit code 2, and no folder is made."""
    shown = CliRunner().invoke(main, ["--repo", str(tmp_path), "plan"])
    assert shown.exit_code == 2
    assert "spark-fs init" in shown.stderr
    assert list(tmp_path.iterdir()) == []


# Plan and apply.


def test_plan_tells_a_script_whether_there_are_changes(run):
    """0 either way without the switch; with it 3, and 0 once applied."""
    assert run("plan").exit_code == 0
    assert run("plan", "--detailed-exitcode").exit_code == 3
    run("apply", "--yes")
    assert run("plan", "--detailed-exitcode").exit_code == 0


def test_plan_speaks_text_json_and_markdown(run, project):
    """All three of the same steps."""
    run("apply", "--yes")
    edit(definitions(project), 'Field("amount", Float64), ', "")
    append(definitions(project), ADD_VIEW)
    text, document, markdown = (run("plan", "--output", kind).stdout for kind in ("text", "json", "markdown"))
    steps = json.loads(document)["steps"]
    assert [(step["action"], step["name"], step["version"]) for step in steps] == [("-/+", "spending", 2), ("+", "visits", 1)]
    assert "-/+ view spending@2" in text
    assert "feature 'amount' removed" in text
    assert "→ service churn_v1 keeps spending@1 until it is changed itself" in text
    assert "| `-/+` | view spending@2 | feature 'amount' removed;" in markdown


def test_a_plan_file_is_applied_as_it_is(run, project, tmp_path):
    """Though the repository has changed since: what was reviewed is what happens."""
    file = tmp_path / "plan.json"
    assert run("plan", "--out", str(file)).exit_code == 0
    append(definitions(project), ADD_VIEW)
    applied = run("apply", str(file))
    assert applied.exit_code == 0
    assert "visits" not in applied.stdout
    assert [step["name"] for step in json.loads(run("plan", "--output", "json").stdout)["steps"]] == ["visits"]


def test_a_stale_plan_file_is_refused_with_exit_code_6(run, project, tmp_path):
    """And nothing changes."""
    file = tmp_path / "plan.json"
    run("plan", "--out", str(file))
    run("apply", "--yes")
    before = (project / ".spark_fs" / "registry.db").read_bytes()
    stale = run("apply", str(file))
    assert stale.exit_code == 6
    assert "[SFS-305]" in stale.stderr
    assert "plan again" in stale.stderr
    assert (project / ".spark_fs" / "registry.db").read_bytes() == before


def test_of_two_applies_at_once_one_wins(run, project, tmp_path):
    """Two real processes with one plan: exit codes 0 and 6, one entry in the history."""
    file = tmp_path / "plan.json"
    run("plan", "--out", str(file))
    argv = [SPARK_FS, "--repo", project, "apply", file]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 6]
    assert sum("[SFS-305]" in error for error in errors) == 1
    assert run("plan", "--detailed-exitcode").exit_code == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"amount"', '"amuont"'),
        lambda text: text.replace('"serial": 0', '"serial": 1'),
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "null",
        lambda _: "{}",
    ],
    ids=["edited", "other serial", "cut", "empty", "list", "null", "object"],
)
def test_a_damaged_plan_file_is_refused(run, project, tmp_path, damage):
    """SFS-308, exit code 2; nothing is applied."""
    file = tmp_path / "plan.json"
    run("plan", "--out", str(file))
    file.write_text(damage(file.read_text()))
    shown = run("apply", str(file))
    assert shown.exit_code == 2
    assert "[SFS-308]" in shown.stderr
    assert run("plan", "--detailed-exitcode").exit_code == 3


def test_a_plan_of_another_project_is_refused(run, tmp_path):
    """SFS-309, exit code 2."""
    CliRunner().invoke(main, ["init", str(tmp_path / "bank")])
    CliRunner().invoke(main, ["--repo", str(tmp_path / "bank"), "plan", "--out", str(tmp_path / "plan.json")])
    shown = run("apply", str(tmp_path / "plan.json"))
    assert shown.exit_code == 2
    assert "[SFS-309]" in shown.stderr
    assert run("plan", "--detailed-exitcode").exit_code == 3


def test_apply_does_nothing_where_nobody_can_confirm(run):
    """SFS-311, exit code 2: in a script it needs --yes or a plan file."""
    shown = run("apply")
    assert shown.exit_code == 2
    assert "[SFS-311]" in shown.stderr
    assert run("plan", "--detailed-exitcode").exit_code == 3


def test_a_damaged_registry_is_told_and_not_replaced(run, project):
    """SFS-302, exit code 1, in every command that reads it."""
    run("apply", "--yes")
    file = project / ".spark_fs" / "registry.db"
    file.write_bytes(b"\x00garbage" * 500)
    for command in (["plan"], ["apply", "--yes"], ["runs"], ["dataset", "list"]):
        shown = run(*command)
        assert shown.exit_code == 1
        assert "[SFS-302]" in shown.stderr
    assert file.read_bytes() == b"\x00garbage" * 500


# Reading commands.


def test_missing_lists_what_is_not_built(run):
    """Of all views, up to the given time, without Spark."""
    run("apply", "--yes")
    shown = run("build", "--missing", "--end", "2024-02-01", "--output", "json")
    assert json.loads(shown.stdout) == [{"view": "spending@1", "start": "beginning", "end": "2024-02-01T00:00:00Z"}]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["build", "--missing", "--end", "soon"], "SFS-207"),
        (["build", "--missing", "--end", "9999-12-31T23:00:00-05:00"], "SFS-207"),
        (["build", "--missing", "--view", "spendin"], "SFS-303"),
        (["build", "--missing", "--view", "spending@7"], "SFS-303"),
        (["build", "--missing", "--view", "spending@latest"], "SFS-"),
        (["destroy", "spending@latest", "--yes"], "SFS-"),
        (["destroy", "spendin@1", "--yes"], "SFS-303"),
        (["destroy", "spending", "--yes"], "SFS-310"),
        (["destroy", "spending@1"], "SFS-311"),
        (["dataset", "show", "nothing"], "SFS-303"),
        (["get-online-features", "--features", "spending:amuont", "--entity", "user_id=1"], "SFS-501"),
        (["get-online-features", "--features", "spending", "--entity", "user_id=1"], "SFS-303"),
        (["get-online-features", "--features", "spending:amount", "--entity", "user_id=one"], "SFS-606"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_told_with_exit_code_2(run, command, code):
    """One message on stderr, nothing on stdout, no trace."""
    run("apply", "--yes")
    shown = run(*command)
    assert shown.exit_code == 2
    assert f"[{code}" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stdout == ""


def test_lists_that_are_empty_are_so_on_stdout(run):
    """A program gets an empty array, a person a line on stderr."""
    for command, line in ((["runs"], "No runs yet."), (["dataset", "list"], "No datasets yet.")):
        assert json.loads(run(*command, "--output", "json").stdout) == []
        shown = run(*command)
        assert (shown.exit_code, shown.stdout, shown.stderr.strip()) == (0, "", line)


def test_debug_adds_the_trace(run, project):
    """Without it an error is one message."""
    append(definitions(project), "broken\n")
    assert "Traceback" not in run("validate").stderr
    shown = CliRunner().invoke(main, ["--repo", str(project), "--debug", "validate"])
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr


# Commands that submit a job: what they would run.


@pytest.mark.parametrize(
    ("command", "job", "arguments"),
    [
        (["build", "--view", "a", "--view", "b", "--end", "2024-01-01"], "build.py", "--view a --view b --end 2024-01-01"),
        (["optimize"], "optimize.py", ""),
        (["optimize", "a", "b@2", "--buckets", "64"], "optimize.py", "--view a --view b@2 --buckets 64"),
        (["materialize", "2024-01-01", "2024-02-01"], "materialize.py", "--start 2024-01-01 --end 2024-02-01"),
        (["materialize-incremental", "--view", "a"], "materialize.py", "--view a"),
        (
            ["materialize", "2024-01-01", "2024-02-01", "--restate", "--all"],
            "materialize.py",
            "--start 2024-01-01 --end 2024-02-01 --restate --everything",
        ),
        (["materialize-incremental", "--max-rows-per-second", "0"], "materialize.py", "--max-rows-per-second 0"),
        (["repair", "a", "--max-rows-per-second", "5000"], "repair.py", "--view a --max-rows-per-second 5000"),
        (["audit"], "audit.py", ""),
        (["audit", "--all", "a"], "audit.py", "--view a"),
        (["audit", "a", "b@2", "--sample", "100"], "audit.py", "--view a --view b@2 --sample 100"),
        (["repair", "a"], "repair.py", "--view a"),
        (["dataset", "verify", "d", "--version", "3"], "dataset_verify.py", "--name d --version 3"),
        (["dataset", "diff", "d", "1"], "dataset_diff.py", "--name d --old 1"),
        (["dataset", "diff", "d", "1", "3"], "dataset_diff.py", "--name d --old 1 --new 3"),
        (["dataset", "delete", "d", "2"], "dataset_delete.py", "--name d --version 2"),
        (["dataset", "verify", "d", "--stored-only", "--strict"], "dataset_verify.py", "--name d --stored-only --strict"),
        (
            [
                *("dataset", "create", "d", "--entities", "s.parquet", "--features", "a:x", "--split", "random=0.8,0.2"),
                *("--split-by", "u", "--seed", "7", "--stratify", "l", "--label", "l", "--tag", "k=v", "--strict"),
            ],
            "dataset_create.py",
            "--name d --entities s.parquet --description '' --strategy auto --feature a:x --split-by u --label l --tag k=v "
            "--split random=0.8,0.2 --stratify l --seed 7 --strict",
        ),
        (
            ["dataset", "create", "d", "--entities", "SELECT 1", "--features", "churn_v1", "--known-at"],
            "dataset_create.py",
            "--name d --entities 'SELECT 1' --description '' --strategy auto --service churn_v1 --known-at",
        ),
        (
            ["dataset", "create", "d", "--entities", "s.parquet", "--features", "a:x", "--features", "b:y"],
            "dataset_create.py",
            "--name d --entities s.parquet --description '' --strategy auto --feature a:x --feature b:y",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_print_shows_the_command_for_a_scheduler(run, project, command, job, arguments):
    """One line that a shell takes as it is, with the job's file and all its arguments; nothing is run."""
    shown = run(*command, "--print")
    assert shown.exit_code == 0
    (line,) = shown.stdout.splitlines()
    before, _, after = line.partition(f"/{job} ")
    assert before.split()[0].endswith("spark-submit")
    assert "--master 'local[*]'" in before
    assert after == f"--repo {project} --env local --output table {arguments}".strip()
    assert not (project / ".spark_fs").exists()


@pytest.mark.parametrize("buckets", ["0", "3", "2048", "many"])
def test_an_impossible_number_of_buckets_is_refused_before_spark_starts(run, buckets):
    """Exit code 2: only a power of two up to 1024 will do."""
    shown = run("optimize", "--buckets", buckets)
    assert shown.exit_code == 2
    assert "--buckets" in shown.stderr


def test_an_audit_is_of_all_keys_or_of_some(run):
    """Both at once is a mistake in writing: exit code 2, before Spark starts."""
    shown = run("audit", "--all", "--sample", "10")
    assert shown.exit_code == 2
    assert "--all looks at every key, --sample at some" in shown.stderr
    assert shown.stdout == ""


def test_a_secret_for_spark_is_never_printed(run, project, monkeypatch):
    """SFS-209, exit code 2: the line would end up in logs and in schedulers' databases."""
    monkeypatch.setenv("S3_SECRET", "hunter2")
    append(project / "conf" / "local.yml", "    spark.hadoop.fs.s3a.secret.key: ${S3_SECRET}\n")
    shown = run("build", "--print")
    assert shown.exit_code == 2
    assert "[SFS-209]" in shown.stderr
    assert "hunter2" not in shown.output


def test_a_script_of_ones_own_is_submitted_with_its_arguments(run, project):
    """Options after the file are the script's, not ours."""
    script = project / "my_job.py"
    script.write_text("")
    shown = run("submit", "--print", str(script), "--day", "2024-01-01", "--output", "x")
    assert shown.stdout.strip().endswith(f"{script} --day 2024-01-01 --output x")


def test_the_environment_is_chosen_by_option_or_variable(run, project, monkeypatch):
    """The option wins."""
    for name in ("one", "two"):
        (project / "conf" / f"{name}.yml").write_text(f"spark:\n  master: spark://{name}:7077\n")
    monkeypatch.setenv("SPARK_FS_ENV", "one")
    assert "--master spark://one:7077" in run("build", "--print").stdout
    shown = CliRunner().invoke(main, ["--repo", str(project), "--env", "two", "build", "--print"])
    assert "--master spark://two:7077" in shown.stdout
    assert "--env two" in shown.stdout


def test_no_command_that_needs_no_spark_loads_it(project):
    """Real processes: plan, apply and lists never import pyspark."""
    script = (
        "import sys; from click.testing import CliRunner; from spark_fs.cli import main\n"
        "for command in (['validate'], ['plan'], ['apply', '--yes'], ['runs'], ['build', '--missing'], ['build', '--print']):\n"
        "    done = CliRunner().invoke(main, ['--repo', sys.argv[1], *command])\n"
        "    assert done.exit_code == 0, done.output\n"
        "assert not {'pyspark', 'py4j', 'pandas'} & set(sys.modules), 'Spark was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script, project], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_is_shown_with_what_it_published_bucket_by_bucket(run, project):
    """As tables, or as one JSON document; a number that no run has is told."""
    registry = FeatureStore(project).registry
    registry.begin_run("abc123", "materialize", "daily_spend@1")
    view = ViewSpec("shop", "daily_spend", 1, (), (), (Column("n", Int64),), SourceSpec("s", "delta", "ts", path="x"))
    plan = {"todo": {"version": 7, "fresh": [[0, 3_600_000_000]], "compared": []}, "buckets": 3}
    intent = registry.ledger.begin(view, "abc123", plan, "mark")
    registry.ledger.note_parts(intent, [Part("fresh", 2, 1, {"applied": 12_345})])
    shown = run("runs", "show", "abc123")
    assert shown.exit_code == 0
    for text in ("abc123", "running", "daily_spend@1", "1970-01-01T01:00:00", "12,345", "buckets_left"):
        assert text in shown.stdout
    told = json.loads(run("runs", "show", "abc123", "--output", "json").stdout)
    assert (told["state"], told["publications"][0]["table_version"], told["publications"][0]["buckets_left"]) == (
        "running",
        7,
        2,
    )
    assert told["publications"][0]["buckets"] == [{"step": "fresh", "bucket": 2, "generation": 1, "applied": 12_345}]
    assert json.loads(run("runs", "--output", "json").stdout)[0]["run_id"] == "abc123"
    unknown = run("runs", "show", "nobody")
    assert unknown.exit_code == 2
    assert "SFS-303" in unknown.stderr

"""(environment, job, arguments) → the spark-submit command, and running it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_fs.config import Environment
from spark_fs.console import RESULTS_VARIABLE, Terminated
from spark_fs.errors import InvalidError
from spark_fs.intervals import parse_instant
from spark_fs.session import spark_conf

#: Settings of the JVM that must be known before it starts; they have switches of their own.
_SWITCHES = {"spark.driver.memory": "--driver-memory"}
_STDERR = 2


@dataclass(frozen=True, slots=True)
class SubmitCommand:
    """A spark-submit command line; ``str()`` is what a shell or a scheduler takes."""

    argv: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.argv)

    def run(self) -> int:
        """Run it and return its exit code, 128 + n where signal n has ended it.

        Ctrl-C reaches the job itself, which cleans up; we wait for it. SIGTERM is passed on.
        """
        return self._wait()

    def run_job(self) -> int:
        """Run one of our jobs: as ``run``, with its results on stdout and all else on stderr.

        spark-submit sends what a Python driver says on stderr to stdout. So the results take a way of their own, a file
        (``console.run`` writes it), and what comes out on stdout goes to stderr.
        """
        with tempfile.TemporaryDirectory(prefix="spark-fs-") as folder:
            results = Path(folder, "results")
            code = self._wait({RESULTS_VARIABLE: str(results)}, stdout=_STDERR)
            if results.is_file():
                sys.stdout.write(results.read_text(encoding="utf-8"))
        return code

    def _wait(self, variables: Mapping[str, str] | None = None, stdout: int | None = None) -> int:
        python = {"PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
        environment = {**os.environ, **python, **(variables or {})}
        with subprocess.Popen(self.argv, env=environment, stdout=stdout) as process:
            while True:
                try:
                    code = process.wait()
                    return code if code >= 0 else 128 - code
                except Terminated:
                    process.terminate()
                except KeyboardInterrupt:
                    continue


def job_file(job: str) -> Path:
    """The file of one of our jobs (``build``, ``materialize`` …), wherever the package is installed."""
    spec = importlib.util.find_spec("spark_fs.jobs")
    assert spec is not None  # it is part of the package
    assert spec.submodule_search_locations is not None  # and a package itself
    return Path(next(iter(spec.submodule_search_locations))) / f"{job}.py"


def submit_command(environment: Environment, file: Path | str, arguments: Sequence[str]) -> SubmitCommand:
    """The command that runs a PySpark file with the environment's Spark settings.

    Uses $SPARK_HOME where set, else the installed pyspark. Raises InvalidError SFS-702 if there is neither.
    """
    spark = environment.config.spark
    argv = [_spark_submit(), "--master", spark.master, "--deploy-mode", spark.deploy_mode]
    argv += ["--name", f"spark_fs {environment.config.project} {Path(file).stem}"]
    for key, value in sorted(spark_conf(environment).items()):
        argv += [_SWITCHES[key], value] if key in _SWITCHES else ["--conf", f"{key}={value}"]
    return SubmitCommand((*argv, str(file), *arguments))


def _spark_submit() -> str:
    home = os.environ.get("SPARK_HOME")
    spec = importlib.util.find_spec("pyspark")
    folder = Path(home) if home else Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "bin" / "spark-submit").is_file():
        raise InvalidError.of(
            "SFS-702",
            "There is no spark-submit.",
            why=f"SPARK_HOME is {home}." if home else "Neither SPARK_HOME nor the package pyspark is here.",
            fix="pip install 'spark-fs[spark]', or set SPARK_HOME",
        )
    return str(folder / "bin" / "spark-submit")


def job_arguments(
    about: str | None,
    arguments: Sequence[str],
    *,
    names: Sequence[str] = (),
    many: Sequence[str] = (),
    flags: Sequence[str] = (),
    instants: Sequence[str] = (),
) -> argparse.Namespace:
    """The options of a job: --repo, --env, --output and --debug, and its own.

    ``names`` take a text, ``instants`` an ISO 8601 time, ``many`` may be repeated (None if never given), ``flags`` are
    switches.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repo", default=".")
    parser.add_argument("--env")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--debug", action="store_true")
    for name in names:
        parser.add_argument(f"--{name}")
    for name in many:
        parser.add_argument(f"--{name}", action="append")
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    for name in instants:
        parser.add_argument(f"--{name}", type=parse_instant)
    return parser.parse_args(arguments)

"""The real ``spark-fs`` command in processes of its own, and what can be seen of processes from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from tests.conftest import delta_jars

COMMAND = Path(sys.executable).with_name("spark-fs")
#: Longest wait for something that a healthy machine does in seconds.
PATIENCE_SECONDS = 180.0

#: Python runs this file at its start. Only in the process of the command itself: jobs may well import pyspark.
_WATCH_IMPORTS = """\
import atexit, os, sys

def check():
    if "pyspark" in sys.modules or "py4j" in sys.modules:
        print("pyspark was imported", file=sys.stderr, flush=True)
        os._exit(99)

if any(part.endswith("/spark-fs") for part in sys.orig_argv):
    atexit.register(check)
"""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its stdout, which must be exactly one JSON document."""
        return json.loads(self.out)


def watching(folder: Path) -> dict[str, str]:
    """Variables under which ``spark-fs`` ends with exit code 99 if it imports pyspark."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_WATCH_IMPORTS)
    return {"PYTHONPATH": str(folder)}


def with_jars(project: Path) -> Path:
    """Put the Delta jars where ``spark-fs jars fetch`` puts them; needs no network."""
    jars = delta_jars()
    if not jars:
        pytest.fail("no Delta jars in .spark_fs/jars; fetch them first or set SPARK_FS_JARS to the folder that has them")
    folder = project / ".spark_fs" / "jars"
    folder.mkdir(parents=True, exist_ok=True)
    for jar in jars:
        (folder / Path(jar).name).symlink_to(jar)
    return project


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process without those that would change what is tested."""
    ours = {"SPARK_HOME", "SPARK_CONF_DIR", "SPARK_FS_ENV", "PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT"}
    return {name: value for name, value in os.environ.items() if name not in ours} | dict(more)


def start(
    project: Path, *arguments: str, variables: Mapping[str, str] = {}, err: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start ``spark-fs`` in a session of its own, as a terminal would; ``err`` takes its stderr."""
    return subprocess.Popen(
        [COMMAND, *arguments], cwd=project, env=environment(variables), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
    )  # fmt: skip


def run(project: Path, *arguments: str, variables: Mapping[str, str] = {}) -> Done:
    """Run ``spark-fs`` in the project's folder to its end; nobody is there to answer questions."""
    with start(project, *arguments, variables=variables) as process:
        out, err = process.communicate()
    return Done(process.returncode, out, err)


def until(condition: Callable[[], Any]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Process:
    """A living process: its id, those of its parent and of its session, its command line."""

    pid: int
    parent: int
    session: int
    line: str


def processes() -> Iterator[Process]:
    """Every living process of this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            numbers = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if line:  # a process that has ended, but that nobody has waited for, has none
            yield Process(int(folder.name), int(numbers[1]), int(numbers[3]), line)

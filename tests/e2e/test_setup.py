"""Set-up: what is installed, what `make` says, and the errors of a machine on which something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_make(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would: without what an outer make or pip's configuration leaves in the environment."""
    inherited = {name: value for name, value in os.environ.items() if not re.match(r"MAKE|MFLAGS|PIP_|PYTHON", name)}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what set-up starts from, without .venv."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("spark_fs", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def make_program(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def test_make_alone_lists_every_target_with_a_description():
    """Whoever runs `make` sees all there is; a phony target that is not listed would be a secret."""
    done = run_make()
    listed = set(re.findall(r"^  make ([a-z-]+) +\S", done.stdout, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert done.returncode == 0
    assert listed == set(phony.group(1).split())
    assert {"demo", "test", "check"} <= listed


def test_a_wrong_java_ends_the_setup_before_it_begins(clone):
    """Java 11: one line with the wanted versions and the fix, and no half-made .venv."""
    make_program(clone / "jdk/bin/java", "echo 'openjdk version \"11.0.22\" 2024-01-16' >&2")
    done = run_make("setup", folder=clone, JAVA_HOME=str(clone / "jdk"))
    assert done.returncode != 0
    assert re.search(r"^\[SFS-216\] Java 11\.0\.22 .*17, 21.* Fix: ", done.stderr, flags=re.MULTILINE)
    assert not (clone / ".venv").exists()


def test_a_missing_java_ends_the_setup_before_it_begins(clone):
    """The same where JAVA_HOME points at nothing."""
    done = run_make("setup", folder=clone, JAVA_HOME=str(clone / "nothing"))
    assert done.returncode != 0
    assert "[SFS-215] JAVA_HOME is" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_is_too_old_is_named_with_the_fix(clone):
    """The version is checked before anything is run with it."""
    old = make_program(clone / "python3.9", "exit 1")
    done = run_make("setup", f"PYTHON={old}", folder=clone)
    assert done.returncode != 0
    assert f"{old} is not Python 3.10 or newer. Fix: make PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_failed_installation_says_how_to_go_on_and_leaves_no_stamp(clone):
    """The fix names network, proxy and mirror, and the next make starts the installation again."""
    # Stand for a finished virtual environment whose pip cannot reach its index.
    make_program(clone / ".venv/bin/pip", "exit 1")
    make_program(clone / ".venv/bin/python", "echo 'no matching distribution' >&2; exit 1")
    for _ in range(2):
        done = run_make("setup", folder=clone)
        assert done.returncode != 0
        assert "no matching distribution" in done.stderr
        assert re.search(r"^Fix: connect to the network.*HTTPS_PROXY.*PIP_INDEX_URL", done.stderr, flags=re.MULTILINE)
        assert not (clone / ".venv/.installed").exists()


def test_the_core_installs_neither_spark_nor_pandas():
    """What a pod that serves features installs; the versions that must fit each other are pinned in an extra."""
    requirements = importlib.metadata.requires("spark-fs")
    core = {re.match(r"[\w.-]+", line).group().lower() for line in requirements if "extra ==" not in line}
    assert core == {"click", "pydantic", "pyyaml", "redis", "rich", "sqlalchemy"}
    assert 'pyspark==4.2.0; extra == "spark"' in requirements


def test_the_jobs_are_importable_from_anywhere(tmp_path):
    """They stand in jobs/ and are installed as spark_fs.jobs."""
    command = [sys.executable, "-c", "import spark_fs.jobs as jobs; print(jobs.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.name == "jobs"


def test_the_console_script_answers_in_300_ms(tmp_path):
    """Help waits for nothing but its processor: its time there is measured, so that a busy machine does not count."""
    script = Path(sys.executable).with_name("spark-fs")
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert "Usage: spark-fs" in done.stdout
    assert min(seconds) < 0.3

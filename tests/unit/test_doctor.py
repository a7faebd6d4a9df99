"""The checks of the machine: each tells what it found, and how to mend what does not fit."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from spark_fs import doctor, jars
from spark_fs.errors import InvalidError


def make_java(folder: Path, banner: str, code: int = 0) -> Path:
    """A Java home whose program prints this banner."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{banner}\nEND\nexit {code}\n")
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime Environment', (17, 0, 15)),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "21" 2023-09-19', (21,)),
        ('java version "1.8.0_412"', (8, 0)),
        ('openjdk version "11.0.22+7" 2024-01-16', (11, 0, 22)),
        ('openjdk version "26-ea" 2026-03-17', (26,)),
        ("no version here", None),
    ],
)
def test_the_java_version_is_read_from_its_banner(banner, version):
    """Old and new numbering, options printed before, and early-access builds."""
    assert doctor.parse_java_version(banner) == version


@pytest.mark.parametrize(
    ("version", "supported"),
    [("1.8.0_412", False), ("11.0.22", False), ("17", True), ("17.0.15", True), ("18.0.2", False), ("21.0.7", True),
     ("24.0.1", False), ("25", False), ("25.0.2", False), ("25.0.3", True), ("26", False)],
)  # fmt: skip
def test_java_must_be_a_version_that_spark_supports(version, supported, tmp_path, monkeypatch):
    """17, 21, and 25 without its fault that corrupts data."""
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path, f'openjdk version "{version}"')))
    check = doctor.java()
    assert check.ok is supported
    assert str(tmp_path) in check.found
    assert bool(check.fix) is not supported


def test_a_wrong_java_is_an_error_with_the_wanted_versions(tmp_path, monkeypatch):
    """The error names what was found and where, and what to do."""
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path, 'openjdk version "11.0.22"')))
    with pytest.raises(InvalidError, match=r"Java 11\.0\.22 .*17, 21, or 25 .*Fix: ") as caught:
        doctor.require_java()
    assert caught.value.code == "SFS-216"


@pytest.mark.parametrize("home", ["missing", "broken", None])
def test_a_missing_java_is_an_error_with_the_fix(home, tmp_path, monkeypatch):
    """No program under JAVA_HOME, one that fails, and none on the PATH."""
    make_java(tmp_path / "broken", 'openjdk version "17.0.1"', code=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if home:
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / home))
    with pytest.raises(InvalidError, match="JAVA_HOME is .* does not run" if home else "no Java") as caught:
        doctor.require_java()
    assert caught.value.code == "SFS-215"
    assert "JAVA_HOME" in str(caught.value).partition("Fix: ")[2]


def test_java_home_goes_before_the_path(tmp_path, monkeypatch):
    """As spark-submit does it; without JAVA_HOME the PATH decides."""
    home = make_java(tmp_path / "home", 'openjdk version "17.0.1"')
    other = make_java(tmp_path / "other", 'openjdk version "21.0.1"')
    monkeypatch.setenv("PATH", f"{other / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert doctor.require_java().version == (17, 0, 1)
    monkeypatch.delenv("JAVA_HOME")
    assert doctor.require_java().version == (21, 0, 1)


def test_java_is_checked_before_anything_is_installed(tmp_path):
    """`python -m spark_fs.doctor` runs on a bare Python, without site-packages, and reports on stderr."""
    root = Path(doctor.__file__).parents[1]
    environment = {"JAVA_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-m", "spark_fs.doctor"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("[SFS-215] JAVA_HOME is")
    make_java(tmp_path, 'openjdk version "17.0.1"')
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("version", "specifier", "fits"),
    [
        ("4.2.0", "==4.2.0", True),
        ("4.2", "==4.2.0", True),
        ("4.2.1", "==4.2.0", False),
        ("2.3.3", "<3,>=2.2", True),
        ("3.0.0rc1", "<3,>=2.2", False),
        ("2.1.4", "<3,>=2.2", False),
        ("26.0.1", ">=18", True),
        ("9.0", ">=18", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, specifier, fits):
    """Part by part, not as text; a shorter version has zeros at its end."""
    assert doctor.satisfies(version, specifier) is fits


def test_the_needed_versions_are_those_of_the_spark_extra():
    """Other extras and the core dependencies do not count."""
    assert doctor.spark_requirements(
        [
            "click>=8.1",
            'pyspark==4.2.0; extra == "spark"',
            "pandas<3,>=2.2 ; extra == 'spark'",
            'polars>=1; extra == "demo"',
        ]
    ) == {"pyspark": "==4.2.0", "pandas": "<3,>=2.2"}


def test_the_state_of_the_delta_jars_is_told(tmp_path):
    """None at all may be meant; a damaged one is not, and the fix fetches it."""
    assert doctor.delta_jars(tmp_path).ok is None
    (tmp_path / jars.JARS[0].file_name).write_bytes(b"damaged")
    check = doctor.delta_jars(tmp_path)
    assert check.ok is False
    assert jars.JARS[0].file_name in check.found
    assert f"python -m spark_fs.jars {tmp_path}" in check.fix


def test_a_host_name_must_lead_to_an_address_of_this_machine(monkeypatch):
    """Loopback is fine; an address of somebody else (RFC 5737) cannot be listened on; the fix names SPARK_LOCAL_IP."""
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    assert doctor.host_name() == doctor.Check("host name", True, "127.0.0.1 (127.0.0.1)")
    monkeypatch.setenv("SPARK_LOCAL_IP", "203.0.113.7")
    check = doctor.host_name()
    assert check.ok is False
    assert "SPARK_LOCAL_IP" in check.fix


def test_a_folder_is_judged_where_it_would_be_created_and_left_as_it_was(tmp_path):
    """Neither the folder nor a test file remains."""
    check = doctor.folder("state folder", str(tmp_path / "a" / "b"))
    assert check.ok is True
    assert "GB free" in check.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_or_a_place_for_nobody_is_refused(tmp_path):
    """/proc takes no files from anyone, not even from root."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "b", Path("/proc/spark_fs")):
        check = doctor.folder("offline store", path.as_uri())
        assert check.ok is False
        assert check.fix


def test_a_remote_folder_is_not_judged_and_shows_no_secret():
    """What this machine cannot tell is None, neither good nor bad."""
    check = doctor.folder("offline store", "s3a://key:secret@bucket/features")
    assert check.ok is None
    assert "secret" not in check.found


def test_an_sqlite_registry_needs_a_writable_folder(tmp_path):
    """The file need not exist; checking does not create it."""
    assert doctor.registry(f"sqlite:///{tmp_path}/registry.db").ok is True
    assert list(tmp_path.iterdir()) == []
    assert doctor.registry("sqlite:////proc/registry.db").ok is False
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("create table t (a)")
    assert doctor.registry(f"sqlite:///{tmp_path}/registry.db").ok is True


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_database_that_does_not_answer_is_told_without_its_password(closed_port):
    """The fix names the setting."""
    check = doctor.registry(f"postgresql+psycopg://me:secret@127.0.0.1:{closed_port}/db")
    assert check.ok is False
    assert "secret" not in check.found
    assert "registry.url" in check.fix


def test_a_registry_url_that_is_none_or_of_an_unknown_kind_is_told():
    """Both are findings, not crashes."""
    assert doctor.registry("nonsense").ok is False
    assert doctor.registry("oracle9://host/db").ok is False


def test_an_online_store_that_does_not_answer_is_told(closed_port):
    """The check fails with a fix; the clock is then only held against the installation."""
    url = f"redis://127.0.0.1:{closed_port}/0"
    check = doctor.online_store(url)
    assert check.ok is False
    assert check.fix
    assert doctor.clock(url).ok is None
    assert doctor.online_store(None).ok is None


def test_a_clock_before_the_installation_is_wrong(monkeypatch):
    """Such a clock was reset, and would write versions that lose against all older ones."""
    monkeypatch.setattr(doctor.time, "time", lambda: 1_000_000_000.0)
    assert doctor.clock(None).ok is False


def test_run_gives_every_check_and_raises_nothing(tmp_path, closed_port):
    """Each failure has a fix; names are unique."""
    checks = doctor.run(
        state_dir=tmp_path / "state",
        offline_root="/proc/offline",
        registry_url="nonsense",
        online_url=f"redis://127.0.0.1:{closed_port}/0",
    )
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert {"Python", "Java", "Delta jars", "host name", "state folder", "registry", "clock"} <= set(names)
    assert all(check.fix for check in checks if check.ok is False)
    assert {"offline store", "registry", "online store"} <= {check.name for check in checks if check.ok is False}

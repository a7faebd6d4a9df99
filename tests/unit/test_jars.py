"""Fetching the Delta jars: what is fetched, what is refused, and what a person is told. Real Ivy, a repository in a folder."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from spark_fs import jars
from spark_fs.errors import InvalidError, SparkFSError, UnavailableError
from spark_fs.jars import Jar

BODIES = {"one": b"first jar" * 100_000, "two": b"second jar"}
ONE, TWO = (Jar(f"org.example:{name}:1.0", len(body), hashlib.sha256(body).hexdigest()) for name, body in BODIES.items())
BOTH = (ONE, TWO)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Maven repository in a folder, named by an Ivy settings file."""
    root = tmp_path / "maven2"
    for jar, body in zip(BOTH, BODIES.values(), strict=True):
        file = _place(root, jar)
        file.parent.mkdir(parents=True)
        file.write_bytes(body)
        group, artifact, version = jar.coordinate.split(":")
        project = f"<groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version>"
        file.with_suffix(".pom").write_text(f"<project><modelVersion>4.0.0</modelVersion>{project}</project>")
    settings = tmp_path / "ivysettings.xml"
    resolver = f'<ibiblio name="here" m2compatible="true" root="{root.as_uri()}/"/>'
    settings.write_text(f'<ivysettings><settings defaultResolver="here"/><resolvers>{resolver}</resolvers></ivysettings>')
    monkeypatch.setenv(jars.SETTINGS_VARIABLE, str(settings))
    return root


def _place(root: Path, jar: Jar) -> Path:
    group, artifact, version = jar.coordinate.split(":")
    return root / group.replace(".", "/") / artifact / version / jar.file_name


def test_fetch_brings_all_jars_and_asks_nothing_the_second_time(repository, tmp_path):
    """The first fetch brings each jar and tells of it; the second needs no repository."""
    folder, told = tmp_path / "state" / "jars", []
    expected = [folder / ONE.file_name, folder / TWO.file_name]
    assert jars.fetch(folder, told.append, BOTH) == expected
    assert [path.read_bytes() for path in expected] == list(BODIES.values())
    assert told == [ONE, TWO]
    repository.rename(tmp_path / "gone")
    assert jars.fetch(folder, told.append, BOTH) == expected
    assert told == [ONE, TWO]


def test_fetch_brings_only_what_is_missing_or_damaged(repository, tmp_path):
    """A jar of the right size but with other bytes is fetched again, an intact one is not."""
    folder, told = tmp_path / "jars", []
    jars.fetch(folder, jars=BOTH)
    (folder / TWO.file_name).write_bytes(bytes(TWO.size_bytes))
    assert jars.missing(folder, BOTH) == [TWO]
    jars.fetch(folder, told.append, BOTH)
    assert told == [TWO]
    assert jars.missing(folder, BOTH) == []


@pytest.mark.parametrize("body", [bytes(TWO.size_bytes), b"<html>"], ids=["same size", "shorter"])
def test_other_bytes_than_the_pinned_ones_are_refused(repository, tmp_path, body):
    """A wrong checksum is an error that names the file, and nothing of it stays."""
    _place(repository, TWO).write_bytes(body)
    folder = tmp_path / "jars"
    with pytest.raises(SparkFSError, match=r"two-1\.0\.jar is not the pinned file") as caught:
        jars.fetch(folder, jars=[TWO])
    assert caught.value.code == "SFS-213"
    assert [path.name for path in folder.iterdir()] == ["fetch.lock"]


def test_an_unreachable_repository_is_named_with_the_ways_out(repository, tmp_path):
    """What cannot be had is listed; the fix names the network, the proxy, a mirror and copying by hand."""
    _place(repository, TWO).unlink()
    folder = tmp_path / "jars"
    with pytest.raises(UnavailableError, match=r"two-1\.0\.jar") as caught:
        jars.fetch(folder, jars=BOTH)
    assert caught.value.code == "SFS-211"
    for way_out in ("HTTPS_PROXY", jars.SETTINGS_VARIABLE, "copy the jars", f"python -m spark_fs.jars {folder}"):
        assert way_out in str(caught.value)
    assert not (folder / TWO.file_name).exists()


def test_fetches_into_one_folder_wait_for_each_other(repository, tmp_path):
    """Two fetches at once both end with all jars; the second finds them."""
    folder, told = tmp_path / "jars", []
    threads = [threading.Thread(target=jars.fetch, args=(folder, told.append, BOTH)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [ONE, TWO]
    assert jars.missing(folder, BOTH) == []


def test_a_folder_that_cannot_be_written_is_an_error(repository, tmp_path):
    """A file in the place of the folder is named with the fix."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InvalidError) as caught:
        jars.fetch(blocked / "jars", jars=BOTH)
    assert caught.value.code == "SFS-214"


def test_without_java_the_error_says_so(repository, tmp_path, monkeypatch):
    """Ivy runs on Java; a JAVA_HOME without one is told, not a missing program."""
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(InvalidError, match="no Java") as caught:
        jars.fetch(tmp_path / "jars", jars=BOTH)
    assert caught.value.code == "SFS-212"


def test_paths_are_all_or_none_or_an_error(repository, tmp_path):
    """An empty folder has no jars (a cluster may bring its own); a partial set is refused with the command that mends it."""
    assert jars.paths(tmp_path / "nothing", BOTH) == []
    folder = tmp_path / "jars"
    jars.fetch(folder, jars=BOTH)
    assert jars.paths(folder, BOTH) == [folder / ONE.file_name, folder / TWO.file_name]
    (folder / ONE.file_name).unlink()
    with pytest.raises(InvalidError, match=r"1 of the 2 .* one-1\.0\.jar") as caught:
        jars.paths(folder, BOTH)
    assert caught.value.code == "SFS-210"


def test_the_pinned_jars_fit_the_pinned_packages():
    """The jars carry the version of delta-spark and the minor version of pyspark that setup.py pins."""
    setup = Path(jars.__file__).parent.parent.joinpath("setup.py").read_text()
    assert '"pyspark==4.2.0", "delta-spark==4.4.0"' in setup
    assert jars.JARS[0].coordinate == "io.delta:delta-spark_4.2_2.13:4.4.0"


def test_the_command_tells_how_it_is_used(capsys):
    """Without a folder, or with an option, the usage is printed and the exit code is 2."""
    assert jars.main([]) == 2
    assert jars.main(["--help"]) == 2
    assert "usage: python -m spark_fs.jars FOLDER" in capsys.readouterr().err

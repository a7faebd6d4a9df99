"""The Delta jars: which ones, where they lie in a project, and fetching them once.

A Spark session takes its jars from a folder of the project, so starting one needs no network. They are fetched by Apache
Ivy, which comes with pyspark, from Maven Central or where an Ivy settings file says; they are pinned by SHA-256, and fit
exactly the pyspark and delta-spark that ``setup.py`` pins.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from spark_fs.errors import InvalidError, SparkFSError, UnavailableError, without_secrets

#: Names an Ivy settings file, as for Spark's ``spark.jars.ivySettings``: a company's mirror, a login, a local folder.
SETTINGS_VARIABLE = "SPARK_FS_IVY_SETTINGS"

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Jar:
    """One pinned file of a Maven repository."""

    #: ``group:artifact:version``.
    coordinate: str
    size_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The file's name, in the repository and in a project."""
        _, artifact, version = self.coordinate.split(":")
        return f"{artifact}-{version}.jar"


#: Delta 4.4.0 for Spark 4.2 with all that it needs and pyspark does not bring along.
JARS = (
    Jar(
        "io.delta:delta-spark_4.2_2.13:4.4.0",
        9_515_916,
        "27d4fd8b1f879535c573ed1c718177d6a27f24d3e626ba02e216369725721ead",
    ),
    Jar(
        "io.delta:delta-storage:4.4.0",
        113_863,
        "c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc",
    ),
    Jar(
        "io.delta:delta-kernel-api:4.4.0",
        2_838_619,
        "ee9b5a14ac3b7efdff4d61a58478fe8eb0e5a3fbca43889dca7290795fe79a11",
    ),
    Jar(
        "io.delta:delta-kernel-defaults:4.4.0",
        227_185,
        "225c975199e4718b38ee5b7e6da7f19e9585024262b2cec2656b32151a856b0b",
    ),
    Jar(
        "io.delta:delta-kernel-unitycatalog:4.4.0",
        43_048,
        "cea22dfb4ac562b3cd27bf652697750e8336009d73fb06631363aaaad5345ffa",
    ),
    Jar(
        "io.unitycatalog:unitycatalog-client:0.6.0",
        564_136,
        "48257499a86b801a3e2372cec55ac226ca1c1c7eabe5c118e7302f29a1fdbc19",
    ),
    Jar(
        "io.unitycatalog:unitycatalog-hadoop:0.6.0",
        78_389,
        "c47b63c961c87102b9e1d63809a0915ba4c86b7652f57c8d39ca3a05b441a150",
    ),
)


def missing(folder: Path, jars: Sequence[Jar] = JARS) -> list[Jar]:
    """The jars that are absent from the folder or differ from the pinned ones, in their order. Reads some 13 MB."""
    return [jar for jar in jars if not _is_intact(folder / jar.file_name, jar)]


def paths(folder: Path, jars: Sequence[Jar] = JARS) -> list[Path]:
    """The jars' absolute paths, for ``spark.jars``; none when the folder holds no jar (a cluster may bring its own).

    Raises InvalidError SFS-210 when only some are there or one is damaged. Fetches nothing.
    """
    absent = missing(folder, jars)
    if not absent:
        return [(folder / jar.file_name).resolve() for jar in jars]
    if not any((folder / jar.file_name).exists() for jar in jars):
        return []
    raise InvalidError.of(
        "SFS-210",
        f"{len(absent)} of the {len(jars)} Delta jars are missing or damaged in {folder}:",
        why=f"{', '.join(jar.file_name for jar in absent)}.",
        fix=f"{_fetch_command(folder)} (needs the network once)",
    )


def fetch(folder: Path, progress: Callable[[Jar], None] | None = None, jars: Sequence[Jar] = JARS) -> list[Path]:
    """Download what is missing into the folder (created when absent) and return the paths of all jars.

    ``progress`` is told each jar before the download. Nothing is asked from the network when all jars are there. A jar
    appears under its name only when it is complete and its checksum is right. Processes that fetch into the same folder
    wait for each other. A proxy is taken from ``HTTPS_PROXY``, a mirror from the file that ``SPARK_FS_IVY_SETTINGS`` names.

    Raises UnavailableError SFS-211 (what Ivy could not get), InvalidError SFS-212 (no pyspark or no Java to run Ivy with),
    SparkFSError SFS-213 (other bytes than the pinned ones) and InvalidError SFS-214 (the folder cannot be written).
    """
    if missing(folder, jars):
        with _alone_in(folder):
            absent = missing(folder, jars)
            for jar in absent:
                if progress is not None:
                    progress(jar)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as workplace:
                _download(absent, Path(workplace), folder)
                for jar in absent:
                    _keep(jar, Path(workplace, jar.file_name), folder)
    return paths(folder, jars)


def _download(jars: Sequence[Jar], workplace: Path, folder: Path) -> None:
    """Let Ivy put the jars, without what they depend on, into the workplace."""
    wanted = "".join(
        '<dependency org="{}" name="{}" rev="{}" transitive="false" conf="default->master"/>'.format(*jar.coordinate.split(":"))
        for jar in jars
    )
    module = '<info organisation="spark_fs" module="jars"/>'
    (workplace / "ivy.xml").write_text(f'<ivy-module version="2.0">{module}<dependencies>{wanted}</dependencies></ivy-module>')
    command = [*_java(), "-jar", str(_ivy()), "-ivy", str(workplace / "ivy.xml"), "-cache", str(workplace / "cache")]
    command += ["-types", "jar", "-retrieve", str(workplace / "[artifact]-[revision].[ext]")]
    if settings := os.environ.get(SETTINGS_VARIABLE):
        command += ["-settings", settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    absent = [jar.file_name for jar in jars if not (workplace / jar.file_name).is_file()]
    if absent:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "xception" in line or "not found" in line]
        raise UnavailableError.of(
            "SFS-211",
            f"The Delta jars cannot be downloaded: {', '.join(absent)}.",
            why=without_secrets(f"Ivy says: {said[0] if said else 'nothing that helps'}."),
            fix=f"connect to the network, set HTTPS_PROXY, or name an Ivy settings file with a mirror in {SETTINGS_VARIABLE}; "
            f"then {_fetch_command(folder)}. Without any network: copy the jars from another project's .spark_fs/jars into "
            f"{folder}",
        )


def _java() -> list[str]:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home, "bin"))) if home else shutil.which("java")
    if java is None:
        raise InvalidError.of(
            "SFS-212", "There is no Java to fetch the Delta jars with.", fix="install Java 17, or set JAVA_HOME"
        )
    proxy = urllib.parse.urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or "")
    if proxy.hostname is None:
        return [java]
    return [java, f"-Dhttps.proxyHost={proxy.hostname}", f"-Dhttps.proxyPort={proxy.port or 443}"]


def _ivy() -> Path:
    spec = find_spec("pyspark")
    found = sorted(Path(spec.origin).parent.glob("jars/ivy-*.jar")) if spec and spec.origin else []
    if not found:
        raise InvalidError.of(
            "SFS-212", "There is no pyspark to fetch the Delta jars with.", fix="pip install 'spark-fs[spark]'"
        )
    return found[0]


def _keep(jar: Jar, file: Path, folder: Path) -> None:
    if not _is_intact(file, jar):
        raise SparkFSError.of(
            "SFS-213",
            f"What was downloaded as {jar.file_name} is not the pinned file: its SHA-256 differs.",
            why="A proxy may answer with a page of its own, or the repository's copy is damaged; it was not kept.",
            fix=f"name another repository by {SETTINGS_VARIABLE}, then {_fetch_command(folder)}",
        )
    file.replace(folder / jar.file_name)


def _is_intact(file: Path, jar: Jar) -> bool:
    # The size first: it spares reading a file that cannot be the right one.
    if not file.is_file() or file.stat().st_size != jar.size_bytes:
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == jar.sha256


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the operating system frees it even when the process is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "fetch.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InvalidError.of(
            "SFS-214",
            f"The Delta jars cannot be written into {folder}.",
            why=f"{error.strerror}.",
            fix="make the folder writable with 20 MB of free space, or name another one in state_dir of conf/base.yml",
        ) from error


def _fetch_command(folder: Path) -> str:
    return f"run python -m spark_fs.jars {folder}"


def _tell(jar: Jar) -> None:
    sys.stderr.write(f"Downloading {jar.file_name} ({jar.size_bytes / 1e6:.1f} MB)\n")


def main(arguments: Sequence[str]) -> int:
    """``python -m spark_fs.jars FOLDER``: fetch what is missing; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m spark_fs.jars FOLDER\n")
        return 2
    try:
        fetch(Path(arguments[0]), _tell)
    except SparkFSError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

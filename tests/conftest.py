"""Fixtures that several test folders share. Spark starts only when a test asks for it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from spark_fs.errors import UnavailableError
from spark_fs.jars import Jar, fetch, paths
from tests.object_store import s3_server

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).parents[1]

# Two files run at a time, on machines of all kinds: how long an example takes says nothing.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

_JVM = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC"
#: What only tests need: the driver to read PostgreSQL as a user's source.
_JDBC = [
    Jar(
        "org.postgresql:postgresql:42.7.8",
        1_116_727,
        "2a32a9dcbc42d67a50ad3a0de5efd102c8d2be46720045f2cbd6689f160ab7c7",
    )
]


def delta_jars() -> list[str]:
    """The jars of Delta Lake: of the folder named by SPARK_FS_JARS, else of the project's own folder."""
    folder = Path(os.environ.get("SPARK_FS_JARS", ROOT / ".spark_fs" / "jars"))
    return [str(jar) for jar in sorted(folder.glob("*.jar"))]


def jdbc_jars() -> list[str]:
    """The PostgreSQL driver, fetched once; none without the network, so that only the tests which need it fail."""
    folder = ROOT / ".spark_fs" / "test-jars"
    with contextlib.suppress(UnavailableError):
        fetch(folder, jars=_JDBC)
    return [str(jar) for jar in paths(folder, _JDBC)]


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """One real Spark with real Delta for the whole run, writing into a scratch folder."""
    from pyspark.sql import SparkSession

    jars = delta_jars()
    if not jars:
        pytest.fail("no Delta jars in .spark_fs/jars; fetch them first or set SPARK_FS_JARS to the folder that has them")
    scratch = tmp_path_factory.mktemp("spark")
    os.environ["PYSPARK_PYTHON"] = sys.executable  # else workers start whichever python is first on the path
    session = (
        SparkSession.Builder()
        .master("local[2]")
        .appName("spark_fs tests")
        .config("spark.jars", ",".join([*jars, *jdbc_jars()]))
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        # Tables, shuffle files and Derby stay in the scratch folder: nothing is left in the tree.
        .config("spark.sql.warehouse.dir", str(scratch / "warehouse"))
        .config("spark.local.dir", str(scratch / "local"))
        # Many short plans: optimising compilation would take more time than it saves (half the run on two cores), and without
        # it the JVM keeps too little room for compiled code, which it would throw away and make again.
        .config("spark.driver.extraJavaOptions", f"{_JVM} -Dderby.system.home={scratch}")
        # Not UTC on purpose: results must not depend on the session, and UTC would hide where they do.
        .config("spark.sql.session.timeZone", "America/New_York")
        .config("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")  # INT96 has no statistics to prune by
        .config("spark.sql.shuffle.partitions", "2")  # tiny data: the default of 200 is 200 empty tasks a shuffle
        .config("spark.databricks.delta.snapshotPartitions", "1")  # the same for Delta's log (default 50)
        .config("spark.sql.sources.parallelPartitionDiscovery.parallelism", "2")  # and for VACUUM (default 10,000: a minute)
        .config("spark.sql.maxMetadataStringLength", "2000")  # a plan's text names every filter pushed to a scan
        .config("spark.driver.memory", "2g")
        .config("spark.driver.host", "127.0.0.1")  # no look-up of the machine's name, which may not resolve
        .config("spark.ui.enabled", "false")  # no port taken, runs may go side by side
        .config("spark.ui.showConsoleProgress", "false")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")  # warnings about tiny windows without keys bury a failure's text
    yield session
    session.stop()


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """The variables that lead to a server which speaks S3, with the bucket ``store``; one for the whole run."""
    with s3_server("store") as variables:
        yield variables


@pytest.fixture
def s3(s3_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI of the test's own in an object store, as Hadoop writes it."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    return f"s3a://store/{tmp_path.name}"


@pytest.fixture
def session_zone(spark: SparkSession, request: pytest.FixtureRequest) -> Iterator[str]:
    """The session time zone given as parameter; put back afterwards."""
    before = str(spark.conf.get("spark.sql.session.timeZone"))
    spark.conf.set("spark.sql.session.timeZone", request.param)
    yield request.param
    spark.conf.set("spark.sql.session.timeZone", before)

"""The only place that builds a SparkSession, and the settings it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from spark_fs import jars
from spark_fs.config import Environment
from spark_fs.errors import InvalidError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: What our Delta tables and jobs rely on, wherever Spark runs.
_REQUIRED = {
    # Delta's SQL and its catalog; without them `delta` is an unknown format.
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # No result depends on it, but what people see printed should be UTC.
    "spark.sql.session.timeZone": "UTC",
    # INT96, the default elsewhere, has no statistics: files could not be pruned by time.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Large Arrow batches: fewer crossings between the JVM and Python; 50,000 rows of 10 doubles are 4 MB.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "50000",
    # This number, and no other, keeps Spark from measuring the batch anew after each row, a sixth of a join's time in the JVM.
    "spark.sql.execution.arrow.maxBytesPerBatch": "2147483647",
    # pandas spines come in, and results go out, through Arrow.
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # We print our own progress.
    "spark.ui.showConsoleProgress": "false",
}

#: For Spark inside one process on this machine.
_LOCAL = {
    # Nothing of a laptop's Spark listens beyond this machine.
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    # No port to open, half a second faster to start.
    "spark.ui.enabled": "false",
}

#: Settings that are lists: ours and the configuration's both count. To their separator.
_JOINED = {"spark.jars": ",", "spark.driver.extraJavaOptions": " "}


def spark_conf(environment: Environment) -> dict[str, str]:
    """Every Spark setting of a job in this environment: ours, then the configuration's, which win."""
    spark = environment.config.spark
    conf = dict(_REQUIRED)
    if spark.master.startswith("local"):
        conf |= _LOCAL
        # Workers must be the interpreter that runs us, not the first `python3` on the PATH.
        conf["spark.pyspark.python"] = sys.executable
        conf["spark.sql.warehouse.dir"] = str(environment.state_dir / "warehouse")
    found = jars.paths(environment.state_dir / "jars")
    if found:
        conf["spark.jars"] = ",".join(str(jar) for jar in found)
    log4j = environment.root / "conf" / "log4j2.properties"
    if log4j.is_file() and spark.deploy_mode == "client":
        conf["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile={log4j.as_uri()}"
    configured = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in spark.conf.items()}
    for key, separator in _JOINED.items():
        if key in conf and key in configured:
            configured[key] = f"{conf[key]}{separator}{configured[key]}"
    return conf | configured


def get_session(environment: Environment) -> SparkSession:
    """The active SparkSession, untouched, or a new one for this environment.

    Raises InvalidError SFS-221 if the active one has no Delta Lake, or SFS-222 if the jars for a new one are missing.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        _check_delta(active.conf.get("spark.sql.extensions", "") or "")
        return active
    conf = spark_conf(environment)
    if "spark.jars" not in conf and "spark.jars.packages" not in conf and environment.config.spark.master.startswith("local"):
        raise InvalidError.of(
            "SFS-222",
            "The Delta Lake jars are missing.",
            why=f"Looked in {environment.state_dir / 'jars'}.",
            fix="run make setup, or spark-fs jars fetch",
        )
    return _build(environment, conf)


def active_session() -> SparkSession | None:
    """The session that this process has, or None; where nobody has loaded pyspark there is none, and it stays so."""
    loaded = sys.modules.get("pyspark.sql")
    found: SparkSession | None = loaded.SparkSession.getActiveSession() if loaded else None
    return found


def _build(environment: Environment, conf: Mapping[str, str]) -> SparkSession:
    from pyspark.sql import SparkSession

    if environment.config.spark.master.startswith("local"):
        # A session started from Python takes its workers' interpreter from here, not from spark.pyspark.python.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(f"spark_fs {environment.config.project}")
    builder = builder.master(environment.config.spark.master)
    for key, value in conf.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _check_delta(extensions: str) -> None:
    if "DeltaSparkSessionExtension" not in extensions:
        raise InvalidError.of(
            "SFS-221",
            "The active SparkSession has no Delta Lake.",
            why="spark.sql.extensions does not name io.delta.sql.DeltaSparkSessionExtension.",
            fix="start it with Delta Lake, or stop it and let spark_fs start one",
        )

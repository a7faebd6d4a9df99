"""What every benchmark shares: figures as JSON lines, and a Spark session that leaves nothing behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

JARS = Path(__file__).parents[1] / ".spark_fs" / "jars"


class Report:
    """Prints figures and remembers whether all targets were met."""

    def __init__(self) -> None:
        self.all_met = True

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        spread: tuple[float, float] | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
        judged: bool = True,
    ) -> bool | None:
        """One JSON line: name, median value, unit, spread (least, greatest), target and whether it is met, also returned.

        Not ``judged``, on data too small to tell, ``met`` is null, as without a target.
        """
        target = at_least if at_least is not None else at_most
        met = None
        if judged and target is not None:
            met = value >= target if at_least is not None else value <= target
        self.all_met = self.all_met and met is not False
        line = {"name": name, "value": round(value, 3), "unit": unit, "spread": spread and [round(edge, 3) for edge in spread]}
        print(json.dumps({**line, "target": target, "met": met}), flush=True)
        return met

    @property
    def exit_code(self) -> int:
        """0 when all targets were met, else 1."""
        return 0 if self.all_met else 1


def spark_session(folder: Path, name: str, *, memory: str = "4g", partitions: int = 8, cores: int = 2) -> SparkSession:
    """Spark on ``cores`` cores with Delta, working in ``folder``; its optimising compiler is on, for these jobs are long."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.Builder()
        .master(f"local[{cores}]")
        .appName(name)
        .config("spark.jars", ",".join(str(jar) for jar in sorted(JARS.glob("*.jar"))))
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.driver.memory", memory)
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", partitions)
        .config("spark.databricks.delta.snapshotPartitions", 1)
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 50_000)
        .config("spark.sql.execution.arrow.maxBytesPerBatch", 2**31 - 1)
        .config("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.local.dir", str(folder / "scratch"))  # shuffle files vanish with the folder
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    return session

"""All reading and writing of Delta tables and sources. Nothing else in the package touches storage offline."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, IntegerType, StructType

from spark_fs.config import resolve_variables
from spark_fs.errors import InvalidError, SparkFSError, translate, without_secrets
from spark_fs.intervals import BEGINNING, Interval, text
from spark_fs.offline.files import listing_digest
from spark_fs.spec import SourceSpec, ViewSpec

#: Properties of every table of ours: any Delta reader can open it (no deletion vectors, no column mapping).
_PROPERTIES = {
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
    "delta.checkpointPolicy": "classic",
}

#: Options with which a reader does not take clock times to be in the session's zone: text without a zone is UTC, and a
#: database's column without one stays so, for the source to declare its zone.
_NO_SESSION_ZONE = {
    "csv": {"timeZone": "UTC"},
    "json": {"timeZone": "UTC"},
    "xml": {"timeZone": "UTC"},
    "jdbc": {"preferTimestampNTZ": "true"},
}

#: Properties of dataset tables: their old versions are to be read for years, not for Delta's 7 and 30 days.
_KEEP_VERSIONS = {
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.deletedFileRetentionDuration": "interval 3650 days",
}
#: Operations of Delta that leave the rows of a table as they are.
_NO_NEW_ROWS = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "CREATE TABLE"})


def read_source(spark: SparkSession, source: SourceSpec, location: str | None = None) -> DataFrame:
    """The source's rows, unfiltered; for Delta pinned to its newest version. ``location``: its path, made absolute.

    ``${VARIABLE}`` in options is taken from this process's environment; SFS-204 if it is not set. A source that cannot be
    read is InvalidError SFS-401.
    """
    with _naming(source):
        return _read(spark, source, location)


@contextmanager
def _naming(source: SourceSpec) -> Iterator[None]:
    """Turn whatever goes wrong in the block into an error that names the source."""
    try:
        yield
    except SparkFSError:
        raise
    except Exception as error:
        ours = translate(error)
        if ours is None:
            ours = InvalidError.of("SFS-401", "A source cannot be read.", why=_why(error))
        problem = ours.problems[0]
        raise InvalidError.of(
            problem.code,
            f"Source '{source.name}' cannot be read.",
            why=problem.why,
            where=source.location,
            fix=problem.fix,
        ) from error


def _why(error: BaseException) -> str:
    """What the error says, and what the one at its root says: a driver's own words are often only there."""
    root = error
    # pyspark keeps the JVM's causes in an attribute of its own.
    while (cause := getattr(root, "_cause", None) or root.__cause__) is not None:
        root = cause
    lines = [next(iter(str(each).strip().splitlines()), type(each).__name__) for each in (error, root)]
    return without_secrets(" ".join(dict.fromkeys(lines)))


def _read(spark: SparkSession, source: SourceSpec, location: str | None) -> DataFrame:
    path = location or source.path
    options = _resolved(source)
    if source.kind == "delta":
        if source.table:
            version = _version(DeltaTable.forName(spark, source.table).history(1))
            return spark.read.option("versionAsOf", version).table(source.table)
        assert path is not None
        return spark.read.format("delta").option("versionAsOf", table_version(spark, path)).load(path)
    if source.kind == "file":
        schema = options.pop("schema", None)
        reader = spark.read.format(source.format or "parquet").options(**options)
        return (reader.schema(schema) if schema else reader).load(path)
    if source.table:
        return spark.read.options(**options).table(source.table)
    if source.query:
        return spark.sql(source.query)
    assert source.format is not None
    return spark.read.format(source.format).options(**options).load()


def _resolved(source: SourceSpec) -> dict[str, str]:
    try:
        given = {option: resolve_variables(value, os.environ) for option, value in source.options.items()}
    except KeyError as error:
        raise InvalidError.of(
            "SFS-204",
            f"Source '{source.name}' needs the variable {error.args[0]}, which is not set.",
            where=source.name,
            fix=f"export {error.args[0]}=… where the job runs",
        ) from None
    return {**_NO_SESSION_ZONE.get(source.format or "", {}), **given}


def source_state(spark: SparkSession, source: SourceSpec, location: str | None = None) -> str | None:
    """A text that differs whenever the source's rows may; None where that cannot be told cheaply (JDBC, queries …)."""
    with _naming(source):
        return _state(spark, source, location or source.path)


def _state(spark: SparkSession, source: SourceSpec, path: str | None) -> str | None:
    if source.kind == "delta" and path is not None:
        return f"Delta version {table_version(spark, path)}"
    if source.kind != "file" or path is None:
        return None
    return listing_digest(path)


def table_version(spark: SparkSession, path: str) -> int:
    """The newest version of the Delta table at ``path``."""
    return _version(DeltaTable.forPath(spark, path).history(1))


def _version(history: DataFrame) -> int:
    commit = history.select("version").first()
    assert commit is not None  # a Delta table has at least one version
    return int(commit["version"])


@dataclass(frozen=True, slots=True)
class Commit:
    """One version of a feature table: what made it, and the number of the build if it was one."""

    version: int
    operation: str
    build: int | None


def builds_since(log: Sequence[Commit], version: int) -> set[int] | None:
    """The builds committed after ``version``; None where the log cannot tell, so that anything may be new.

    The log (newest first) tells unless it was cleaned up that far, or somebody else changed the table's data.
    """
    commits = [commit for commit in log if commit.version > version]
    changes = [commit.build for commit in commits if commit.operation not in _NO_NEW_ROWS]
    if len(commits) != log[0].version - version or None in changes:
        return None
    return {build for build in changes if build is not None}


def can_be_read_in_place(log: Sequence[Commit]) -> bool:
    """Whether in each data file the rows of a key stand together, newest last, and no other file has that key.

    So a build writes them (``compute.settle``), one file a bucket. It holds while nothing but one build has written files.
    """
    writers = [commit for commit in log if commit.operation not in _NO_NEW_ROWS or commit.operation == "OPTIMIZE"]
    return len(log) == log[0].version + 1 and len(writers) == 1 and writers[0].build is not None


@dataclass(frozen=True)
class FeatureTable:
    """The Delta table of one view version: join keys, event_timestamp, created_timestamp, features, _build, _bucket."""

    spark: SparkSession
    path: str
    view: ViewSpec

    def exists(self) -> bool:
        """Whether the table has been created."""
        return DeltaTable.isDeltaTable(self.spark, self.path)

    def create(self, buckets: int) -> None:
        """Create the empty table; nothing happens if it exists. ``buckets`` is fixed from then on."""
        builder = DeltaTable.createIfNotExists(self.spark).location(self.path).partitionedBy("_bucket")
        builder = builder.addColumns(self._schema(buckets))
        # Statistics on keys and times only: they prune files, those of hundreds of features would only cost.
        indexed = ",".join([*self.view.key_names, "event_timestamp", "created_timestamp", "_build"])
        properties = {**_PROPERTIES, "delta.dataSkippingStatsColumns": indexed}
        for name, value in {**properties, "spark_fs.view": self.view.reference}.items():
            builder = builder.property(name, value)
        builder.execute()

    def _schema(self, buckets: int) -> StructType:
        columns = [(column.name, column.type.spark) for column in self.view.keys]
        columns += [("event_timestamp", "timestamp"), ("created_timestamp", "timestamp")]
        columns += [(column.name, column.type.spark) for column in self.view.features]
        schema = StructType()
        for name, spark_type in (*columns, ("_build", "int")):
            schema.add(name, DataType.fromDDL(spark_type))
        # The number stands with the column that it explains: reading a schema costs no job, a table's properties do.
        return schema.add("_bucket", IntegerType(), metadata={"buckets": buckets})

    def buckets(self) -> int:
        """The number of buckets it was created with. Starts no job."""
        return int(self.read().schema["_bucket"].metadata["buckets"])

    def version(self) -> int:
        """The newest version of the table."""
        return table_version(self.spark, self.path)

    def commits(self) -> list[Commit]:
        """The commits in the table's log, newest first."""
        history = DeltaTable.forPath(self.spark, self.path).history().select("version", "operation", "userMetadata")
        return [
            Commit(row["version"], row["operation"], json.loads(row["userMetadata"] or "{}").get("build"))
            for row in history.collect()
        ]

    def data_files(self, version: int) -> list[str]:
        """The URIs of the table's data files at a version. Starts no job."""
        return self.read(version).inputFiles()

    def read(self, version: int | None = None) -> DataFrame:
        """The table's rows at a version (default: the newest)."""
        reader = self.spark.read.format("delta")
        return (reader if version is None else reader.option("versionAsOf", version)).load(self.path)

    def replace(self, rows: DataFrame, interval: Interval, build: int, note: Mapping[str, Any]) -> None:
        """Put ``rows`` in the place of all rows of the interval, in one commit; the same build is never committed twice."""
        predicate = f"event_timestamp < TIMESTAMP '{text(interval.end)}'"
        if interval.start != BEGINNING:
            predicate = f"event_timestamp >= TIMESTAMP '{text(interval.start)}' AND {predicate}"
        (
            rows.write.format("delta")
            .mode("overwrite")
            .option("replaceWhere", predicate)
            # Unique for ever: with a registry made anew, build numbers begin again, and Delta skips what it knows.
            .option("txnAppId", f"spark_fs:{self.view.reference}:build-{build}:{uuid.uuid4().hex}")
            .option("txnVersion", 1)
            .option("userMetadata", json.dumps(dict(note)))
            .save(self.path)
        )


def observed(counts: Observation, frame: DataFrame, columns: Sequence[Column]) -> dict[str, Any]:
    """What ``counts`` saw of ``frame`` while an action ran: the aggregates ``columns``, by name.

    Spark leaves the counting out of plans that it finds, while running, to have no rows; then it is done here, in a job of
    its own over ``frame``.
    """
    try:
        return counts.get
    except Py4JJavaError:
        row = frame.agg(*columns).first()
        assert row is not None  # an aggregate without groups has one row
        return row.asDict()


def write_dataset(rows: DataFrame, path: str, note: Mapping[str, Any], transaction: str) -> int:
    """Write a training dataset as the next Delta version of the table at ``path`` and return that version.

    ``note`` must be unlike that of any other write.
    """
    metadata = json.dumps(dict(note))
    (
        rows.write.format("delta")
        .mode("overwrite")
        .option("overwriteSchema", "true")
        .option("txnAppId", transaction)
        .option("txnVersion", 1)
        .option("userMetadata", metadata)
        .options(**_PROPERTIES, **_KEEP_VERSIONS)
        .save(path)
    )
    # Not simply the newest: another save may have come in between.
    history = DeltaTable.forPath(rows.sparkSession, path).history()
    return _version(history.where(F.col("userMetadata") == metadata))


def read_dataset(spark: SparkSession, path: str, version: int) -> DataFrame:
    """The rows of a training dataset at a Delta version."""
    return spark.read.format("delta").option("versionAsOf", version).load(path)

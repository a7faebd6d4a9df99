"""All reading and writing of Delta tables and sources. Nothing else in the package touches storage offline."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, IntegerType, StructType

from spark_fs.config import resolve_variables
from spark_fs.errors import InvalidError, SparkFSError, translate, translated, without_secrets
from spark_fs.intervals import BEGINNING, Interval, text
from spark_fs.offline.compute import bucket_of, quoted
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
#: The size in bytes that Spark gives to what it knows nothing of.
_SIZE_UNKNOWN = 2**63 - 1
#: The folder of a bucket's files.
_BUCKET_FOLDER = re.compile(r"/_bucket=(\d+)/")
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


def source_bytes(frame: DataFrame) -> int | None:
    """About how many bytes the sources of ``frame`` hold, as Spark's planner has it; None where it cannot tell (JDBC …).

    Starts no job.
    """
    leaves = frame._jdf.queryExecution().optimizedPlan().collectLeaves()
    sizes = [int(leaves.apply(n).stats().sizeInBytes()) for n in range(leaves.size())]
    # What has no size of its own is given the greatest that there is, so that it is never broadcast.
    return None if any(size >= _SIZE_UNKNOWN for size in sizes) else sum(sizes)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A commit of ours that moves rows between files and changes none: the rows of ``read_version``, in ``buckets`` buckets.

    ``rewritten`` are the buckets that it writes as one sorted file each; in the others that was so already.
    """

    read_version: int
    buckets: int
    rewritten: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """One version of a feature table: what made it, and the number of the build if it was one.

    ``copied_rows``: rows of older files that a build took over into files of its own (None: not told); such a file need not
    be sorted. ``rewrite``: what the commit is where it is upkeep of the layout.
    """

    version: int
    operation: str
    build: int | None
    copied_rows: int | None = None
    rewrite: Rewrite | None = None

    @property
    def changes_rows(self) -> bool:
        """Whether other rows are in the table than before."""
        return self.operation not in _NO_NEW_ROWS and self.rewrite is None

    @property
    def writes_files(self) -> bool:
        """Whether it may have added data files."""
        return self.operation not in _NO_NEW_ROWS or self.operation == "OPTIMIZE"


def builds_since(log: Sequence[Commit], version: int) -> set[int] | None:
    """The builds committed after ``version``; None where the log cannot tell, so that anything may be new.

    The log (newest first) tells unless it was cleaned up that far, or somebody else changed the table's data.
    """
    commits = [commit for commit in log if commit.version > version]
    changes = [commit.build for commit in commits if commit.changes_rows]
    if len(commits) != log[0].version - version or None in changes:
        return None
    return {build for build in changes if build is not None}


def can_be_read_in_place(log: Sequence[Commit]) -> bool:
    """Whether in each data file the rows of a key stand together, newest last, and no other file has that key.

    So a build writes them (``compute.settle``), one file a bucket, and so an upkeep leaves the whole table. It holds while
    nothing but one build has written files, or nothing but the upkeep since the version that it read.
    """
    recent, whole = _since_rewrite(log)
    writers = [commit for commit in recent if commit.writes_files]
    return whole and len(writers) == 1 and (writers[0].rewrite is not None or writers[0].build is not None)


def files_are_sorted(log: Sequence[Commit]) -> bool:
    """Whether each data file is known to be sorted by (keys, event_timestamp, created_timestamp).

    Not so where others have written (``OPTIMIZE`` joins files as they come), where a build had to take over rows of older
    files, and where the log was cleaned up that far.
    """
    recent, whole = _since_rewrite(log)
    sorted_ones = (commit.rewrite is not None or (commit.build is not None and commit.copied_rows == 0) for commit in recent)
    return whole and all(told or not commit.writes_files for told, commit in zip(sorted_ones, recent, strict=True))


def _since_rewrite(log: Sequence[Commit]) -> tuple[list[Commit], bool]:
    """The commits since the version that the last rewrite read (else all that there were), and whether none is missing."""
    start = next((commit.rewrite.read_version for commit in log if commit.rewrite), -1)
    recent = [commit for commit in log if commit.version > start]
    return recent, len(recent) == log[0].version - start


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

    def buckets(self, version: int | None = None) -> int:
        """The number of buckets at a version (default: the newest). Starts no job."""
        return int(self.read(version).schema["_bucket"].metadata["buckets"])

    def version(self) -> int:
        """The newest version of the table."""
        return table_version(self.spark, self.path)

    def commits(self) -> list[Commit]:
        """The commits in the table's log, newest first."""
        history = DeltaTable.forPath(self.spark, self.path).history()
        measured = F.col("operationMetrics")
        # Delta leaves the number out where it wrote nothing at all.
        copied = F.when(measured["numFiles"] == "0", 0).otherwise(measured["numCopiedRows"].cast("bigint")).alias("copied")
        return [
            _commit(row["version"], row["operation"], row["copied"], row["userMetadata"])
            for row in history.select("version", "operation", "userMetadata", copied).collect()
        ]

    def data_files(self, version: int) -> list[str]:
        """The URIs of the table's data files at a version. Starts no job."""
        return self.read(version).inputFiles()

    def files_by_bucket(self, version: int) -> Counter[int]:
        """How many data files each bucket has at a version. Starts no job."""
        return Counter(int(_BUCKET_FOLDER.findall(file)[-1]) for file in self.data_files(version))

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

    def rewrite(self, wanted: Rewrite) -> tuple[int, int]:
        """Write the buckets anew, each as one sorted file, in one commit without a change of rows: its version, and the rows.

        Runs Spark jobs; the sort spills. Nothing is committed unless as many rows were written as read (SFS-412). ConflictError
        SFS-410 where somebody else removed one of the files since ``read_version``, or, if the number of buckets changes,
        committed anything.
        """
        moved = wanted.buckets != self.buckets(wanted.read_version)
        before = self.read(wanted.read_version)
        before = before if moved else before.where(F.col("_bucket").isin(*wanted.rewritten))
        counts, all_rows = Observation(), [F.count(F.lit(1)).alias("rows")]
        after = self._laid_out(before, wanted, moved=moved).observe(counts, *all_rows)
        with translated():
            transaction = _Transaction(self.spark, self.path, wanted.read_version)
            if moved:
                transaction.set_buckets(wanted.buckets)
            transaction.write(after)
            read, written = before.count(), observed(counts, after, all_rows)["rows"]
            if read != written:
                raise SparkFSError.of(
                    "SFS-412",
                    f"Rewriting feature table '{self.view.reference}' gave {written} rows in the place of {read}.",
                    why="Nothing was committed.",
                    where=self.path,
                )
            transaction.remove(None if moved else wanted.rewritten)
            note = {"view": self.view.reference, "rewrite": asdict(wanted)}
            return transaction.commit(note), read

    def _laid_out(self, rows: DataFrame, wanted: Rewrite, *, moved: bool) -> DataFrame:
        """The rows in one partition for each bucket to write, sorted as a build sorts them."""
        if moved:
            rows = rows.withColumn("_bucket", bucket_of(self.view.keys, wanted.buckets))
        position = F.array_position(F.array(*(F.lit(bucket) for bucket in wanted.rewritten)), F.col("_bucket")) - 1
        order = [quoted(name) for name in (*self.view.key_names, "event_timestamp", "created_timestamp")]
        # Delta writes one file for each partition and bucket, and keeps an order that begins with the bucket.
        return rows.repartitionById(len(wanted.rewritten), position.cast("int")).sortWithinPartitions("_bucket", *order)


def _commit(version: int, operation: str, copied_rows: int | None, metadata: str | None) -> Commit:
    try:
        note = json.loads(metadata or "{}")
    except ValueError:
        note = None
    if not isinstance(note, dict):  # somebody else's: any text may stand there
        return Commit(version, operation, None)
    found = note.get("rewrite")
    rewrite = Rewrite(found["read_version"], found["buckets"], tuple(found["rewritten"])) if found else None
    return Commit(version, operation, note.get("build"), copied_rows, rewrite)


class _Transaction:
    """A transaction of Delta's that began at a version which was read before.

    A DataFrame's writer begins its own when it writes: what others committed between the reading and that moment would be
    overwritten unseen. So this goes through the classes in the JVM that the writer itself is made of; actions are exchanged
    as the JSON that Delta's protocol defines.
    """

    def __init__(self, spark: SparkSession, path: str, version: int) -> None:
        self._spark = spark
        self._jvm = cast("Any", spark._jvm)
        self._delta = self._jvm.org.apache.spark.sql.delta
        self._none = self._jvm.scala.Option.empty()
        log = self._delta.DeltaLog.forTable(spark._jsparkSession, path)
        self._snapshot = log.getSnapshotAt(version, self._none, self._none, False)
        self._transaction = log.startTransaction(self._none, self._some(self._snapshot))
        self._actions = self._jvm.java.util.ArrayList()

    def _some(self, value: Any) -> Any:
        return self._jvm.scala.Option.apply(value)

    def set_buckets(self, buckets: int) -> None:
        """Note another number of buckets with the column; then no other commit may come in between, whatever it writes."""
        metadata = json.loads(self._snapshot.metadata().json())
        schema = json.loads(metadata["metaData"]["schemaString"])
        [column] = [field for field in schema["fields"] if field["name"] == "_bucket"]
        column["metadata"]["buckets"] = buckets
        metadata["metaData"]["schemaString"] = json.dumps(schema)
        self._transaction.updateMetadata(self._delta.actions.Action.fromJson(json.dumps(metadata)), False)
        self._transaction.readWholeTable()

    def write(self, rows: DataFrame) -> None:
        """Write data files, one for each partition of the frame and bucket. Runs the frame's job."""
        # Whatever the session has set: files cut or shuffled anew would not be one sorted file for each bucket.
        options = self._jvm.PythonUtils.toScalaMap({"maxRecordsPerFile": "0", "optimizeWrite": "false"})
        given = self._delta.DeltaOptions(options, self._spark._jsparkSession.sessionState().conf())
        added = self._transaction.writeFiles(rows._jdf, self._some(given)).iterator()
        while added.hasNext():
            action = json.loads(added.next().json())
            action["add"]["dataChange"] = False
            self._actions.add(self._delta.actions.Action.fromJson(json.dumps(action)))

    def remove(self, buckets: Iterable[int] | None) -> None:
        """Remove the files of these buckets (None: all) that the version has."""
        files = self._snapshot.allFiles()
        if buckets is not None:
            files = files.where(f"CAST(partitionValues['_bucket'] AS INT) IN ({', '.join(map(str, buckets))})")
        now = self._jvm.java.lang.System.currentTimeMillis()
        for file in files.collectAsList():
            self._actions.add(file.removeWithTimestamp(now, False))

    def commit(self, note: Mapping[str, Any]) -> int:
        """Commit what was written and removed, unless others were in the way; the new version."""
        overwrite, text_of_note = self._jvm.org.apache.spark.sql.SaveMode.Overwrite, self._some(json.dumps(dict(note)))
        write = getattr(self._delta, "DeltaOperations$Write")
        operation = write(overwrite, self._none, self._none, text_of_note, *([self._none] * 5))
        return int(self._transaction.commit(self._jvm.PythonUtils.toSeq(self._actions), operation))


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

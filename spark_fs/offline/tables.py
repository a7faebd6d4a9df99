"""Delta tables: feature tables, how they are created, built, rewritten and read, and those of training datasets."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, cast

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.sql import Column, DataFrame, Observation, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, IntegerType, StructType

from spark_fs.errors import ConflictError, SparkFSError, translated
from spark_fs.intervals import BEGINNING, Interval, text
from spark_fs.offline.bucket_files import SUMMARY, BucketWriter
from spark_fs.offline.compute import bucket_of, quoted, row_hash, settle, within
from spark_fs.offline.layout import DataFile, Layout, read_history, read_layout
from spark_fs.offline.sources import table_version
from spark_fs.offline.table_log import Commit, Rewrite, parse_commit
from spark_fs.offline.transaction import Transaction
from spark_fs.spec import ViewSpec

#: Properties of every table of ours: any Delta reader can open it (no deletion vectors, no column mapping).
PLAIN_PROPERTIES = {
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
    "delta.checkpointPolicy": "classic",
}
#: Spark's names of compression, and Parquet's in Arrow; any other becomes snappy.
_ARROW_CODECS = {name: name for name in ("snappy", "zstd", "gzip", "brotli")} | {
    "uncompressed": "none",
    "none": "none",
    "lz4": "lz4",
    "lz4_raw": "lz4",
}
#: The most that a batch of rows on its way to a Python worker may take, about.
_MOST_BATCH_BYTES = 128 << 20
#: How often a commit is tried that others come in the way of.
_ATTEMPTS = 3
#: What Spark and Delta say of a version whose log or files were cleaned up, or may have been.
_GONE = (
    *("DELTA_VERSION_NOT_FOUND", "DELTA_FILE_NOT_FOUND", "FILE_NOT_EXIST", "VersionNotFoundException", "DELTA_TIMESTAMP"),
    *("TIME_TRAVEL_BEYOND_DELETED_FILE_RETENTION", "DELTA_TRUNCATED_TRANSACTION_LOG"),
)
#: Whether Delta refuses versions for their age alone; true if not set.
_ENFORCED = "spark.databricks.delta.vacuum.enforceTimeTravelWithinDeletedFileRetentionDuration"
#: The setting is the session's, which threads share.
_OPENING = Lock()
#: The folder of a bucket's files.
_BUCKET_FOLDER = re.compile(r"/_bucket=(\d+)/")


@dataclass(frozen=True, slots=True)
class Replaced:
    """What ``FeatureTable.replace`` did: the version of its commit, and the rows that lost a tie.

    ``why_delta``: why Delta's writer has written the files; empty where Python workers have.
    """

    version: int
    ties_dropped: int
    why_delta: str = ""


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
        properties = {**PLAIN_PROPERTIES, "delta.dataSkippingStatsColumns": ",".join(self._indexed)}
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
        """The number of buckets at a version (default: the newest)."""
        _, layout, _ = read_layout(self.path, version)
        if layout is not None:
            return layout.buckets
        # A Spark job over Delta's log, where that version was not read before.
        return int(self.read(version).schema["_bucket"].metadata["buckets"])

    def version(self) -> int:
        """The newest version of the table."""
        return table_version(self.spark, self.path)

    def commits(self) -> list[Commit]:
        """The commits in the table's log, newest first. Starts a Spark job only where the log cannot be read without Spark."""
        entries = read_history(self.path)
        if entries is not None:
            return [
                parse_commit(
                    entry["version"],
                    entry["operation"],
                    _copied_rows(entry.get("operationMetrics") or {}),
                    entry.get("userMetadata"),
                )
                for entry in entries
            ]
        history = DeltaTable.forPath(self.spark, self.path).history()
        measured = F.col("operationMetrics")
        # Delta leaves the number out where it wrote nothing at all.
        copied = F.when(measured["numFiles"] == "0", 0).otherwise(measured["numCopiedRows"].cast("bigint")).alias("copied")
        return [
            parse_commit(row["version"], row["operation"], row["copied"], row["userMetadata"])
            for row in history.select("version", "operation", "userMetadata", copied).collect()
        ]

    def data_files(self, version: int) -> list[str]:
        """The URIs of the table's data files at a version. Starts no job."""
        return self.read(version).inputFiles()

    def files_by_bucket(self, version: int) -> Counter[int]:
        """How many data files each bucket has at a version. Starts no job."""
        return Counter(map(bucket_of_file, self.data_files(version)))

    def read(self, version: int | None = None) -> DataFrame:
        """The table's rows at a version (default: the newest), however old; see ``is_version_gone``."""
        if version is None:
            return self.spark.read.format("delta").load(self.path)
        return read_version(self.spark, self.path, version)

    def replace(self, rows: DataFrame, interval: Interval, build: int) -> Replaced:
        """Put ``rows`` in the place of all rows of the interval, in one commit.

        ``rows`` are feature rows of the interval (see ``compute.feature_frame``) without null keys and times; ties are settled.
        Runs one Spark job, and short ones over Delta's log. Python workers write the files, sorted, where they can open the
        table's place; else Delta's own writer does (see ``Replaced.why_delta``). Raises ConflictError SFS-410 where somebody
        else has changed the interval meanwhile, or the files that it touches; then nothing is committed.
        """
        note = {"view": self.view.reference, "build": build, "interval": [text(interval.start), text(interval.end)]}
        stamped = rows.withColumn("_build", F.lit(build))
        planned, written = None, None
        for attempts_left in reversed(range(_ATTEMPTS)):
            version, layout, why = read_layout(self.path)
            why = why or self._why_delta(layout)
            concerned = (layout.buckets, layout.touching(interval)) if layout and not why else None
            if concerned != planned:
                planned, written = concerned, None
            try:
                with translated():
                    if version is None or layout is None or why:
                        return self._replace_by_delta(stamped, interval, note, why)
                    transaction = Transaction(self.spark, self.path, version)
                    transaction.read_whole_table()
                    touched = layout.touching(interval)
                    # Files are written once: of a table that changed elsewhere only the commit is tried again.
                    if written is None:
                        written = self._write_files(self._with_kept(stamped, interval, touched, transaction), layout)
                    transaction.add(written)
                    transaction.remove_files([file.path for file in touched])
                    committed = transaction.commit({**note, "in_order": True}, _predicate(interval))
                return Replaced(committed, sum(file["dropped"] for file in written))
            except ConflictError:
                if not attempts_left or self._changed_since(version, interval, build, planned):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _why_delta(self, layout: Layout | None) -> str:
        """Why Delta's own writer has to write the files of a table with this layout, or an empty text."""
        if layout is not None and not layout.takes_files:
            return "the table uses Delta features that only Delta's own writer keeps to"
        rows = int(self.spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") or 0)
        most = _as_bytes(self.spark, self.spark.conf.get("spark.sql.execution.arrow.maxBytesPerBatch") or "0")
        width = sum(4 * (column.type.length or 4) for column in (*self.view.keys, *self.view.features))
        if most > _MOST_BATCH_BYTES and (rows <= 0 or rows * width > _MOST_BATCH_BYTES):
            return "rows are too wide for Spark's Arrow batches: lower spark.sql.execution.arrow.maxRecordsPerBatch"
        return ""

    def _changed_since(
        self, version: int | None, interval: Interval, build: int, planned: tuple[int, tuple[DataFile, ...]] | None
    ) -> bool:
        """Whether others have changed rows since the version, and not only far from the interval.

        What was read from the source may be older than what they wrote.
        """
        _, newest, _ = read_layout(self.path)
        if newest and planned == (newest.buckets, newest.touching(interval)):
            return False
        newer = [commit for commit in self.commits() if version is None or commit.version > version]
        return any(commit.changes_rows and commit.build != build for commit in newer)

    def _with_kept(
        self, rows: DataFrame, interval: Interval, touched: Sequence[DataFile], transaction: Transaction
    ) -> DataFrame:
        """The rows, with those outside the interval of files that hold both."""
        split = [file.path for file in touched if not file.lies_within(interval)]
        if not split:
            return rows
        return rows.unionByName(transaction.read(split).where(~within(interval)).select(*map(quoted, rows.columns)))

    def _write_files(self, rows: DataFrame, layout: Layout) -> list[Row]:
        """Write the rows as one sorted file a bucket, without ties: a row of ``bucket_files.SUMMARY`` for each file.

        Commits nothing.
        """
        view, buckets = self.view, layout.buckets
        columns = (*view.key_names, "event_timestamp", "created_timestamp", *view.feature_names, "_build")
        placed = rows.withColumn("_hash", row_hash(view.feature_names)).withColumn("_bucket", bucket_of(view.keys, buckets))
        codec = str(self.spark.conf.get("spark.sql.parquet.compression.codec", "snappy")).lower()
        writer = BucketWriter(
            root=self.path,
            keys=view.key_names,
            columns=columns,
            indexed=self._indexed,
            tie_break="_hash",
            compression=_ARROW_CODECS.get(codec, "snappy"),
            # By this readers know that old dates are of the calendar of today.
            metadata={"org.apache.spark.version": self.spark.version},
        )
        spread = placed.select(*map(quoted, columns), "_hash", "_bucket").repartitionById(buckets, F.col("_bucket"))
        return spread.mapInArrow(writer, SUMMARY).collect()

    @property
    def _indexed(self) -> tuple[str, ...]:
        """The columns with statistics in Delta's log."""
        return (*self.view.key_names, "event_timestamp", "created_timestamp", "_build")

    def _replace_by_delta(self, stamped: DataFrame, interval: Interval, note: Mapping[str, Any], why: str) -> Replaced:
        """As ``replace``, through Spark's sort and Delta's writer."""
        buckets, counts, all_rows = self.buckets(), Observation(), [F.count(F.lit(1)).alias("rows")]
        given = Observation()
        settled = settle(self.view, stamped.observe(given, *all_rows), buckets)
        columns = (*self.view.key_names, "event_timestamp", "created_timestamp", *self.view.feature_names, "_build", "_bucket")
        placed = settled.select(*map(quoted, columns))
        (
            placed.observe(counts, *all_rows)
            .write.format("delta")
            .mode("overwrite")
            .option("replaceWhere", _predicate(interval))
            .option("userMetadata", json.dumps(dict(note)))
            .save(self.path)
        )
        if self.buckets() != buckets:
            # Redistributed between our look at the number and Delta's at the table: the rows lie in wrong buckets.
            raise ConflictError.of(
                "SFS-410",
                f"The buckets of feature table '{self.view.reference}' have changed meanwhile.",
                why=f"Rows of build {note['build']} lie in wrong ones; the interval is not noted as built.",
                where=self.path,
                fix="run the same command again",
            )
        dropped = observed(given, stamped, all_rows)["rows"] - observed(counts, placed, all_rows)["rows"]
        return Replaced(self.version(), dropped, why)

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
            transaction = Transaction(self.spark, self.path, wanted.read_version)
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
            if moved:
                transaction.remove_all(data_change=False)
            else:
                transaction.remove_buckets(wanted.rewritten)
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


def bucket_of_file(file: str) -> int:
    """The bucket that a data file of a feature table belongs to."""
    return int(_BUCKET_FOLDER.findall(file)[-1])


@contextmanager
def _any_version(spark: SparkSession) -> Iterator[None]:
    """Versions of any age may be opened in the block.

    Delta refuses what is older than the time for which VACUUM keeps files (7 days), also where nobody has run it: a table that
    is built once a week could not be compared with what was published of it. Whether files are there shows when they are read.
    """
    with _OPENING:
        before = spark.conf.get(_ENFORCED, None)
        spark.conf.set(_ENFORCED, "false")
        try:
            yield
        finally:
            if before is None:
                spark.conf.unset(_ENFORCED)
            else:
                spark.conf.set(_ENFORCED, before)


def is_version_gone(error: BaseException) -> bool:
    """Whether an older version of a table could not be read, for its log or its files were cleaned up."""
    return any(mark in str(error) for mark in _GONE)


def _copied_rows(metrics: Mapping[str, str]) -> int | None:
    """What Delta's own writer took over from older files; None where it is not known."""
    # Delta leaves the number out where it wrote nothing at all.
    if str(metrics.get("numFiles")) == "0":
        return 0
    return int(metrics["numCopiedRows"]) if "numCopiedRows" in metrics else None


def _as_bytes(spark: SparkSession, setting: str) -> int:
    """A size as Spark's settings have it, such as 64MB."""
    return int(cast("Any", spark._jvm).org.apache.spark.network.util.JavaUtils.byteStringAsBytes(setting))


def _predicate(interval: Interval) -> str:
    """The rows of an interval, in SQL."""
    before_end = f"event_timestamp < TIMESTAMP '{text(interval.end)}'"
    if interval.start == BEGINNING:
        return before_end
    return f"event_timestamp >= TIMESTAMP '{text(interval.start)}' AND {before_end}"


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


def read_version(spark: SparkSession, path: str, version: int) -> DataFrame:
    """The rows of the Delta table at ``path`` at a version, however old; see ``is_version_gone``."""
    with _any_version(spark):
        return spark.read.format("delta").option("versionAsOf", version).load(path)

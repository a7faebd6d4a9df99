"""Delta's own transactions, by the classes in the JVM that its writer is made of. Tied to the pinned jars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql.types import ArrayType, DataType, MapType, StructField, StructType


class Transaction:
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
        self._log = log
        self._path = path
        self._snapshot = log.getSnapshotAt(version, self._none, self._none, False)
        self._transaction = log.startTransaction(self._none, self._some(self._snapshot))
        self._actions, self._written = self._jvm.java.util.ArrayList(), self._jvm.java.util.ArrayList()

    def _some(self, value: Any) -> Any:
        return self._jvm.scala.Option.apply(value)

    def set_buckets(self, buckets: int) -> None:
        """Note another number of buckets with the column; then no other commit may come in between, whatever it writes."""
        metadata = json.loads(self._snapshot.metadata().json())
        schema = json.loads(metadata["metaData"]["schemaString"])
        [column] = [field for field in schema["fields"] if field["name"] == "_bucket"]
        column["metadata"]["buckets"] = buckets
        self._update_schema(metadata, json.dumps(schema))
        self._transaction.readWholeTable()

    def set_schema(self, schema: StructType) -> None:
        """Give the table these columns in the place of those that it has."""
        metadata = json.loads(self._snapshot.metadata().json())
        if metadata["metaData"]["schemaString"] != schema.json():
            self._update_schema(metadata, schema.json())

    def _update_schema(self, metadata: dict[str, Any], schema: str) -> None:
        metadata["metaData"]["schemaString"] = schema
        self._transaction.updateMetadata(self._delta.actions.Action.fromJson(json.dumps(metadata)), False)

    def write(self, rows: DataFrame, *, data_change: bool = False) -> None:
        """Write data files, one for each partition of the frame and bucket. Runs the frame's job.

        Without ``data_change`` they hold rows that the table has already.
        """
        # Whatever the session has set: files cut or shuffled anew would not be one sorted file for each bucket.
        options = self._jvm.PythonUtils.toScalaMap({"maxRecordsPerFile": "0", "optimizeWrite": "false"})
        given = self._delta.DeltaOptions(options, self._spark._jsparkSession.sessionState().conf())
        added = self._transaction.writeFiles(rows._jdf, self._some(given)).iterator()
        while added.hasNext():
            action = json.loads(added.next().json())
            action["add"]["dataChange"] = data_change
            self._written.add(self._delta.actions.Action.fromJson(json.dumps(action)))
        self._actions.addAll(self._written)

    def adopt(self, other: Transaction) -> None:
        """Take over the files that another transaction of the table has written, and not committed."""
        self._written = other._written
        self._actions.addAll(self._written)

    @property
    def written(self) -> list[str]:
        """The URIs of the files that were written."""
        return [self._jvm.org.apache.hadoop.fs.Path(self._path, str(action.path())).toString() for action in self._written]

    def discard(self) -> None:
        """Delete the files that were written; they must not be committed any more."""
        for name in self.written:
            path = self._jvm.org.apache.hadoop.fs.Path(name)
            path.getFileSystem(self._log.newDeltaHadoopConf()).delete(path, False)

    def read_whole_table(self) -> None:
        """From now on any other commit is in the way."""
        self._transaction.readWholeTable()

    def read(self, files: Sequence[str]) -> DataFrame:
        """The rows of these data files of the version."""
        found = self._jvm.PythonUtils.toSeq(self._found(files))
        return DataFrame(self._log.createDataFrame(self._snapshot, found, False, self._none), self._spark)

    def _found(self, files: Sequence[str]) -> Any:
        """What the version's log has of these data files."""
        names = self._jvm.java.util.ArrayList()
        for file in files:
            names.add(file.removeprefix(f"{self._path}/"))
        column = self._jvm.org.apache.spark.sql.functions.col("path")
        found = self._snapshot.allFiles().where(column.isInCollection(names)).collectAsList()
        assert found.size() == len(names)  # both are of one version
        return found

    def add(self, files: Iterable[Row]) -> None:
        """Add data files with new rows, as ``bucket_files.SUMMARY`` tells of them."""
        now = int(self._jvm.java.lang.System.currentTimeMillis())
        for file in files:
            described = {
                "path": file["path"],
                "partitionValues": {"_bucket": str(file["bucket"])},
                "size": file["size_bytes"],
                "modificationTime": now,
                "dataChange": True,
                "stats": file["stats"],
            }
            self._actions.add(self._delta.actions.Action.fromJson(json.dumps({"add": described})))

    def remove_files(self, files: Sequence[str]) -> None:
        """Remove these data files with their rows."""
        if files:
            self._remove(self._found(files), data_change=True)

    def remove_all(self, *, data_change: bool) -> None:
        """Remove all files that the version has, with their rows; without ``data_change`` these are elsewhere."""
        self._remove(self._snapshot.allFiles().collectAsList(), data_change=data_change)

    def remove_buckets(self, buckets: Iterable[int]) -> None:
        """Remove the files of these buckets that the version has; their rows are elsewhere."""
        theirs = f"CAST(partitionValues['_bucket'] AS INT) IN ({', '.join(map(str, buckets))})"
        self._remove(self._snapshot.allFiles().where(theirs).collectAsList(), data_change=False)

    def _remove(self, files: Any, *, data_change: bool) -> None:
        now = self._jvm.java.lang.System.currentTimeMillis()
        for file in files:
            self._actions.add(file.removeWithTimestamp(now, data_change))

    def commit(self, note: Mapping[str, Any], predicate: str | None = None) -> int:
        """Commit what was written and removed, unless others were in the way; the new version."""
        overwrite, text_of_note = self._jvm.org.apache.spark.sql.SaveMode.Overwrite, self._some(json.dumps(dict(note)))
        write, where = getattr(self._delta, "DeltaOperations$Write"), self._some(predicate) if predicate else self._none
        operation = write(overwrite, self._none, where, text_of_note, *([self._none] * 5))
        return int(self._transaction.commit(self._jvm.PythonUtils.toSeq(self._actions), operation))


def all_nullable(schema: StructType) -> StructType:
    """The schema with nulls allowed everywhere, and without what users have noted with columns."""
    return StructType([StructField(field.name, _nullable(field.dataType), True) for field in schema.fields])


def _nullable(kind: DataType) -> DataType:
    if isinstance(kind, StructType):
        return all_nullable(kind)
    if isinstance(kind, ArrayType):
        return ArrayType(_nullable(kind.elementType), True)
    return MapType(kind.keyType, _nullable(kind.valueType), True) if isinstance(kind, MapType) else kind

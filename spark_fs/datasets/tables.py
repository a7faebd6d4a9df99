"""The Delta table of a dataset: each commit of ours is one version of the dataset, and carries its manifest.

The log is the truth, the registry an index of it: a save that was interrupted before its commit has left nothing that anybody
sees, one after it is complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql.types import StructType

from spark_fs.datasets.manifest import Manifest, read_manifest
from spark_fs.errors import ConflictError, translated
from spark_fs.files import delete_file
from spark_fs.offline.layout import read_history
from spark_fs.offline.sources import table_version
from spark_fs.offline.tables import PLAIN_PROPERTIES, observed, read_version
from spark_fs.offline.transaction import Transaction, all_nullable

#: Old versions are to be read for years, not for Delta's 7 and 30 days.
_KEEP_VERSIONS = {
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.deletedFileRetentionDuration": "interval 3650 days",
}
#: How often a commit is tried that others come in the way of.
_ATTEMPTS = 5
#: How long another process may take to create the table.
_CREATION_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Written:
    """Rows in files that nothing has committed yet, and what was counted of them."""

    transaction: Transaction
    schema: StructType
    counts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DatasetTable:
    """The Delta table with all versions of one dataset; it need not exist."""

    spark: SparkSession
    path: str

    def manifests(self) -> dict[int, Manifest]:
        """The manifests of all versions that were not deleted, by version, newest first."""
        return _manifests(self._notes())

    def _notes(self) -> list[tuple[int, dict[str, Any]]]:
        """What our commits have noted, each with its version of the table, newest first."""
        entries: Any = read_history(self.path)
        if entries is None:
            if not DeltaTable.isDeltaTable(self.spark, self.path):
                return []
            history = DeltaTable.forPath(self.spark, self.path).history().select("version", "userMetadata")
            entries = [row.asDict() for row in history.collect()]
        return [(entry["version"], json.loads(entry.get("userMetadata") or "{}")) for entry in entries]

    def read(self, delta_version: int) -> DataFrame:
        """The rows at a version of the Delta table, however old; lazily."""
        return read_version(self.spark, self.path, delta_version)

    def write(self, measured: DataFrame, measures: Sequence[Column], columns: Sequence[Column]) -> Written:
        """Write data files with ``columns`` of the frame, and count the aggregates ``measures`` in the same pass.

        Commits nothing, but for an empty table where there is none.
        """
        counts = Observation()
        rows = measured.observe(counts, *measures).select(*columns)
        schema = all_nullable(rows.schema)
        with translated():
            self._create(schema)
            transaction = self._begin(schema)
            transaction.write(rows, data_change=True)
            return Written(transaction, schema, observed(counts, measured, measures))

    def commit(self, written: Written, manifest: Manifest) -> tuple[Manifest, bool]:
        """Make the rows the next version: its manifest, and whether it is new.

        Rows of which the newest version is made already, with an equal manifest, are not kept twice: that version is given.
        Raises ConflictError SFS-410 where other saves come first again and again.
        """
        transaction = written.transaction
        for attempts_left in reversed(range(_ATTEMPTS)):
            notes = self._notes()
            known = _manifests(notes)
            newest = known[max(known)] if known else None
            if newest is not None and newest.identity == manifest.identity:
                transaction.discard()
                return newest, False
            taken = [note["manifest"]["version"] for _, note in notes if "manifest" in note]
            numbered = manifest.model_copy(update={"version": max(taken, default=0) + 1})
            try:
                with translated():
                    transaction.read_whole_table()
                    transaction.remove_all(data_change=True)
                    at = transaction.commit({"manifest": numbered.to_json()})
                return numbered.model_copy(update={"delta_version": at}), True
            except ConflictError:
                if not attempts_left:
                    transaction.discard()
                    raise
                transaction = self._begin(written.schema)
                transaction.adopt(written.transaction)
        raise AssertionError  # the last attempt returns or raises

    def delete(self, manifest: Manifest) -> None:
        """Note that a version is deleted, then delete its files, but for those of other versions. Safe to repeat."""
        at = manifest.committed
        with translated():
            newest = table_version(self.spark, self.path)
            transaction = Transaction(self.spark, self.path, newest)
            others = [other for other in self.manifests().values() if other.version != manifest.version]
            if all(other.committed < at for other in others):
                transaction.read_whole_table()
                transaction.remove_all(data_change=True)  # its rows are what the table has now, or those of a version before it
            transaction.commit({"deleted": manifest.version})
        kept = {file for other in others for file in self.read(other.committed).inputFiles()}
        for file in self.read(at).inputFiles():
            if file not in kept:
                delete_file(file)
        delete_file(f"{self.path}/_manifests/{manifest.version}.json")

    def _create(self, schema: StructType) -> None:
        """Create the empty table where there is none."""
        until = time.monotonic() + _CREATION_SECONDS
        while not DeltaTable.isDeltaTable(self.spark, self.path):
            builder = DeltaTable.createIfNotExists(self.spark).location(self.path).addColumns(schema)
            for name, value in {**PLAIN_PROPERTIES, **_KEEP_VERSIONS}.items():
                builder = builder.property(name, value)
            try:
                builder.execute()
            except Exception:
                # Where two create it at once, one of them fails, in several ways, also before the other has ended.
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _begin(self, schema: StructType) -> Transaction:
        transaction = Transaction(self.spark, self.path, table_version(self.spark, self.path))
        transaction.set_schema(schema)
        return transaction


def _manifests(notes: Sequence[tuple[int, dict[str, Any]]]) -> dict[int, Manifest]:
    """The manifests among what commits have noted, without those of versions that were deleted."""
    deleted = {note["deleted"] for _, note in notes if "deleted" in note}
    found = [read_manifest({**note["manifest"], "delta_version": at}) for at, note in notes if "manifest" in note]
    return {manifest.version: manifest for manifest in found if manifest.version not in deleted}

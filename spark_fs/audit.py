"""What is online beside what was published: an audit of every value, by the executors, with a record in Delta."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.dispatch import extra_keys, newest_rows, within_any
from spark_fs.errors import SparkFSError
from spark_fs.intervals import UTC
from spark_fs.offline.table_log import changed_since
from spark_fs.offline.tables import FeatureTable, is_version_gone
from spark_fs.online import compare
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec

#: What a feature's values may be, in the order shown.
STATUSES = (
    *(compare.EQUAL, compare.MISSING, compare.STALE, compare.WRONG, compare.EXTRA),
    *(compare.EXPIRED, compare.RESTATED, compare.AHEAD),
)


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What one audit found of one view.

    ``keys`` rows were compared with what is online; ``features`` counts their values by feature and status (see ``STATUSES``),
    ``extra`` the rows online that stand for none. ``findings`` is the Delta table in which each fault is a row of this
    ``audit_id``.
    """

    view: str
    table_version: int
    keys: int
    extra: int
    features: dict[str, dict[str, int]] = field(repr=False)
    findings: str
    audit_id: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every value is as it should be."""
        return not self.extra and not any(counts.get(fault) for counts in self.features.values() for fault in compare.FAULTS)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each feature: view, feature, then how many values have each status."""
        return [{"view": self.view, "feature": name, **counts} for name, counts in self.features.items()]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        names = ("view", "table_version", "keys", "extra", "features", "findings", "audit_id", "seconds")
        return {**{name: getattr(self, name) for name in names}, "ok": self.ok}


def audit_view(
    registry: Registry, table: FeatureTable, target: OnlineTarget, path: str, *, sample: int | None = None
) -> AuditResult | None:
    """Compare what is online with the newest rows of what was published; None where nothing was.

    The executors ask the online store; no row passes through the driver. ``sample``: only so many keys, at random, and no look
    for rows that should not be there. Appends what it finds to the Delta table at ``path``: audit_id, at, view, and for each
    fault key (bytes), feature (null: the row as a whole), status, expected and found as text. A run that publishes meanwhile
    shows as ``ahead``.

    Raises SparkFSError SFS-622 where the version that was published last is gone, and builds have changed rows since.
    """
    began, view, audit_id = time.monotonic(), table.view, uuid.uuid4().hex[:12]
    known = registry.published(view)
    if known is None:
        return None
    target = replace(target.of_epoch(known.epoch), erased=registry.erased(view))
    log = table.commits()
    # A version with the same rows, whose files are there for sure: upkeep and VACUUM may have taken those of the other.
    version = known.table_version if changed_since(log, known.table_version) != [] else log[0].version
    try:
        expected = newest_rows(view, table.read(version).where(within_any(known.intervals)))
        _compare(expected, target, registry.restated(view), view, audit_id, path, sample)
    except Exception as error:
        if not is_version_gone(error):
            raise
        raise _gone(view, version) from error
    counts = _counts(table.spark.read.format("delta").load(path).where(F.col("audit_id") == audit_id))
    features = {
        feature: {status: counts.get((feature, status), 0) for status in STATUSES if status != compare.EXTRA}
        for feature in view.feature_names
    }
    return AuditResult(
        view=view.reference,
        table_version=version,
        keys=sum(next(iter(features.values())).values()),
        extra=counts.get((None, compare.EXTRA), 0),
        features=features,
        findings=path,
        audit_id=audit_id,
        seconds=round(time.monotonic() - began, 3),
    )


def _compare(
    expected: DataFrame,
    target: OnlineTarget,
    restated: frozenset[int],
    view: ViewSpec,
    audit_id: str,
    path: str,
    sample: int | None,
) -> None:
    """Let the executors compare, and note what they find."""
    compared = expected if sample is None else expected.orderBy(F.rand()).limit(sample)
    found = compared.mapInArrow(partial(compare.compare_rows, target=target, restated=restated), compare.FINDINGS)
    if sample is None:
        status = {"status": F.lit(compare.EXTRA), "rows": F.lit(1).cast("bigint")}
        found = found.unionByName(extra_keys(expected, target).withColumnRenamed("_key", "key").withColumns(status), True)
    marked = found.withColumns({"audit_id": F.lit(audit_id), "at": F.lit(datetime.now(UTC)), "view": F.lit(view.reference)})
    marked.write.format("delta").mode("append").save(path)


def _gone(view: ViewSpec, version: int) -> SparkFSError:
    return SparkFSError.of(
        "SFS-622",
        f"Version {version} of the feature table of '{view.reference}', which was published last, is gone.",
        why="Its log or its files were cleaned up, and builds have changed rows since: what should be online cannot be told.",
        fix=f"run spark-fs repair {view.reference}, which publishes the newest version and removes all else",
    )


def _counts(findings: DataFrame) -> dict[tuple[str | None, str], int]:
    """How many rows by feature and status; extra rows by no feature."""
    told = findings.where(F.col("key").isNull() | (F.col("status") == compare.EXTRA))
    rows = told.groupBy("feature", "status").agg(F.sum("rows").alias("rows")).collect()
    return {(row["feature"], row["status"]): int(row["rows"]) for row in rows}


def summary_text(results: list[AuditResult]) -> str:
    """One line that says what an audit came to."""
    if not results:
        return "Nothing was compared."
    faults = [result for result in results if not result.ok]
    if not faults:
        return f"All values of {sum(result.keys for result in results):,} rows online are as they should be."
    extra = sum(result.extra for result in faults)
    views = " ".join(result.view for result in faults)
    more = f" {extra:,} rows should not be there." if extra else ""
    noted = ", ".join(f"{result.findings} (audit_id {result.audit_id})" for result in faults)
    return f"Not all is as it should be: {views}.{more} Each fault is a row in {noted}. Fix: spark-fs repair {views}"

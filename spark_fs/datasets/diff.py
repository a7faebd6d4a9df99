"""What is different between two versions of a dataset: the request, where rows come from, and the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import NumericType

from spark_fs.datasets.content import row_digest
from spark_fs.datasets.manifest import Manifest
from spark_fs.offline.compute import quoted


@dataclass(frozen=True, slots=True)
class DatasetDiff:
    """What ``new`` has otherwise than ``old``.

    ``manifest``: what differs there, as what → (old, new). ``rows`` counts by ``equal``, ``changed``, ``added`` and ``gone``:
    rows are the same one where the columns of the spine that both have are equal, as often as they are there. ``columns`` has
    for each column that both have, and that is not of the spine, how many of the rows of both have another value, and for
    numbers the mean of the absolute difference (null for others).
    """

    old: str
    new: str
    manifest: dict[str, tuple[Any, Any]]
    rows: dict[str, int]
    columns: dict[str, dict[str, Any]]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.manifest and not any(self.rows[name] for name in ("changed", "added", "gone"))

    def to_json(self) -> dict[str, Any]:
        """The differences as JSON values."""
        changes = {what: {"old": old, "new": new} for what, (old, new) in self.manifest.items()}
        return {"old": self.old, "new": self.new, "manifest": changes, "rows": self.rows, "columns": self.columns}


def diff_datasets(old: tuple[Manifest, DataFrame], new: tuple[Manifest, DataFrame]) -> DatasetDiff:
    """Compare two versions, each given as manifest and rows. One Spark job with one shuffle of both."""
    manifests, frames = (old[0], new[0]), (old[1], new[1])
    spine = [name for name in manifests[0].spine.columns if name in manifests[1].spine.columns]
    common = [name for name in frames[0].columns if name in frames[1].columns and name not in spine]
    common = [name for name in common if frames[0].schema[name].dataType == frames[1].schema[name].dataType]
    keyed = [_keyed(frame, spine, common, side) for frame, side in zip(frames, ("old", "new"), strict=True)]
    paired = keyed[0].join(keyed[1], ["id", "number"], "full_outer")
    in_both = F.col("old").isNotNull() & F.col("new").isNotNull()
    differs = [~F.col("old").getField(str(n)).eqNullSafe(F.col("new").getField(str(n))) for n in range(len(common))]
    changed = F.lit(False)
    for other in differs:
        changed = changed | other
    counts: list[Column] = [
        F.count_if(in_both & ~changed).alias("equal"),
        F.count_if(in_both & changed).alias("changed"),
        F.count_if(F.col("old").isNull()).alias("added"),
        F.count_if(F.col("new").isNull()).alias("gone"),
    ]
    for n, name in enumerate(common):
        counts.append(F.count_if(in_both & differs[n]).alias(f"differs_{n}"))
        if isinstance(frames[0].schema[name].dataType, NumericType):
            values = [F.col(side).getField(str(n)).cast("double") for side in ("old", "new")]
            counts.append(F.avg(F.abs(values[1] - values[0])).alias(f"by_{n}"))
    row = paired.agg(*counts).first()
    assert row is not None  # an aggregate without groups has one row
    found = row.asDict()
    return DatasetDiff(
        old=manifests[0].reference,
        new=manifests[1].reference,
        manifest=_changes(*manifests),
        rows={name: found[name] for name in ("equal", "changed", "added", "gone")},
        columns={name: _of_column(found, n) for n, name in enumerate(common)},
    )


def _keyed(frame: DataFrame, spine: Sequence[str], common: Sequence[str], side: str) -> DataFrame:
    """Each row by the digest of its spine columns; those that have one in common are numbered, in an order of their values."""
    values = [quoted(name).alias(str(n)) for n, name in enumerate(common)]
    row = F.struct(*values, F.lit(True).alias("there")).alias(side)
    order = Window.partitionBy("id").orderBy("content")
    digests = row_digest(frame.schema, spine).alias("id"), row_digest(frame.schema, common).alias("content")
    return frame.select(*digests, row).withColumn("number", F.row_number().over(order)).drop("content")


def _of_column(found: dict[str, Any], n: int) -> dict[str, Any]:
    return {"differing": found[f"differs_{n}"], "mean_difference": found.get(f"by_{n}")}


def _changes(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    """What differs in the manifests, but for what they say of when and where they were made."""
    changes: dict[str, tuple[Any, Any]] = {}

    def compare(what: str, before: Any, after: Any) -> None:
        if before != after:
            changes[what] = (before, after)

    columns = [{column.name: column.type for column in manifest.columns} for manifest in (old, new)]
    for name in dict.fromkeys([*columns[0], *columns[1]]):
        compare(f"column {name}", columns[0].get(name), columns[1].get(name))
    origins = [{origin.alias: origin for origin in manifest.origins} for manifest in (old, new)]
    for alias in dict.fromkeys([*origins[0], *origins[1]]):
        before, after = origins[0].get(alias), origins[1].get(alias)
        for what in ("view", "definition_hash", "table_version", "source_state"):
            compare(f"{alias}: {what}", getattr(before, what, None), getattr(after, what, None))
    for what in ("source", "rows", "checksum"):
        compare(f"spine {what}", getattr(old.spine, what), getattr(new.spine, what))
    compare("known_at", old.time_rule.known_at, new.time_rule.known_at)
    compare("split", old.split and dict(old.split.rule), new.split and dict(new.split.rule))
    return changes

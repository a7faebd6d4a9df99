"""Whether a saved dataset is still what its manifest signs, and whether it can be made again: from the versions it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.datasets.content import checksum, checksum_measures, row_digest
from spark_fs.datasets.manifest import SPLIT, Manifest, OriginInfo
from spark_fs.datasets.origins import OfflineStore
from spark_fs.datasets.retrieval import RetrievalJob
from spark_fs.datasets.splits import split_column, split_from_json
from spark_fs.errors import SparkFSError, translate
from spark_fs.names import parse_reference
from spark_fs.offline.compute import quoted
from spark_fs.offline.sources import version_in_state
from spark_fs.offline.tables import is_version_gone
from spark_fs.spec import Selection, ViewSpec

_TIME = "event_timestamp"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of a dataset.

    ``intact``: the stored rows are those that the manifest signs. ``recomputed``: joined again from the pinned versions, they
    are the same; None where that could not be tried, for the reasons in ``obstacles``. ``differing_rows`` counts rows that only
    one of both has. ``notes``: what is not as it was at the save, and has done no harm.
    """

    dataset: str
    rows: int
    expected_rows: int
    checksum: str
    expected_checksum: str
    intact: bool
    recomputed: bool | None
    recomputed_checksum: str | None
    differing_rows: int | None
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the dataset."""
        return self.intact and self.recomputed is not False

    @property
    def identical(self) -> bool:
        """Whether it is intact and was made again."""
        return self.intact and self.recomputed is True

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {**asdict(self), "identical": self.identical}


def verify_dataset(store: OfflineStore, manifest: Manifest, *, recompute: bool = True) -> Verdict:
    """Compare the stored rows with the manifest, and with those of the same join from the versions that it pins.

    The spine is taken from the dataset itself. Two Spark jobs and those of the join; a third counts rows where both differ.
    Nothing is written.
    """
    stored = store.dataset(manifest.name).read(manifest.committed)
    counts = _counted(stored)
    found = checksum(counts, "content")
    intact = (counts["rows"], found) == (manifest.rows, manifest.checksum)
    obstacles = obstacles_to(store, manifest) if recompute else ["asked not to"]
    again, other = None, None
    if not obstacles:
        try:
            again = joined_again(store, manifest, stored)
            other = _counted(again)
        except Exception as error:
            if not _is_gone(error):
                raise
            again, obstacles = None, [_gone_text(error)]
    equal = None if other is None else (other["rows"], checksum(other, "content")) == (counts["rows"], found)
    return Verdict(
        dataset=manifest.reference,
        rows=counts["rows"],
        expected_rows=manifest.rows,
        checksum=found,
        expected_checksum=manifest.checksum,
        intact=intact,
        recomputed=equal,
        recomputed_checksum=None if other is None else checksum(other, "content"),
        differing_rows=None if again is None else 0 if equal else _differing(stored, again),
        obstacles=tuple(obstacles),
        notes=tuple(_notes(manifest.packages)),
    )


def obstacles_to(store: OfflineStore, manifest: Manifest) -> list[str]:
    """Why the dataset cannot be made again, as far as can be told without joining anything; empty where nothing is known."""
    state, told = store.registry.state(), []
    for origin in manifest.origins:
        name, number = parse_reference(origin.view)
        view = state.versions.get((name, number or 0))
        if view is None:
            told.append(f"{origin.view} is not in the registry any more")
        elif view.definition_hash != origin.definition_hash:
            told.append(f"the registry has another definition of {origin.view}")
        elif not _has_source(store, view, origin):
            told.append(f"{origin.view} was computed from {origin.source}, which keeps no versions and may be another one now")
    return told


def _has_source(store: OfflineStore, view: ViewSpec, origin: OriginInfo) -> bool:
    """Whether the rows that the view was computed from, if it was, are there still, as far as can be told."""
    if origin.table_version is not None or version_in_state(origin.source_state) is not None:
        return True
    return origin.source_state is not None and origin.source_state == store.source_state(view)


def joined_again(store: OfflineStore, manifest: Manifest, stored: DataFrame) -> DataFrame:
    """The dataset's rows from the versions that it pins, for the spine rows of ``stored``; columns as in the manifest."""
    spine = stored.select(*map(quoted, manifest.spine.columns))
    pinned = {origin.alias: origin for origin in manifest.origins}
    job = RetrievalJob(
        store,
        spine,
        manifest.reference,
        selections_of(store, manifest.origins),
        full_feature_names=manifest.full_feature_names,
        known_at=manifest.time_rule.known_at,
        pinned=pinned,
    )
    rows = job.to_spark_df()
    if manifest.split is not None:
        rows = rows.withColumn(SPLIT, split_column(split_from_json(manifest.split.rule), rows, _TIME))
    return rows.select(*(quoted(column.name) for column in manifest.columns))


def selections_of(store: OfflineStore, origins: Sequence[OriginInfo]) -> list[Selection]:
    """What was selected of each view. SFS-303 for a view version that the registry does not have."""
    state, found = store.registry.state(), []
    for origin in origins:
        view = state.require_view(*parse_reference(origin.view))
        found.append(Selection(view, tuple(each.feature for each in origin.features), origin.alias, dict(origin.join_keys)))
    return found


def _counted(rows: DataFrame) -> dict[str, Any]:
    digest = row_digest(rows.schema, rows.columns)
    row = rows.agg(F.count(F.lit(1)).alias("rows"), *checksum_measures(digest, "content")).first()
    assert row is not None  # an aggregate without groups has one row
    return row.asDict()


def _differing(left: DataFrame, right: DataFrame) -> int:
    """How many rows only one of the two has, counting equal rows as often as they are there."""
    digests = [rows.select(row_digest(rows.schema, rows.columns).alias("row")) for rows in (left, right)]
    signed = digests[0].withColumn("sign", F.lit(1)).unionByName(digests[1].withColumn("sign", F.lit(-1)))
    row = signed.groupBy("row").agg(F.sum("sign").alias("more")).agg(F.sum(F.abs("more")).alias("rows")).first()
    assert row is not None
    return int(row["rows"] or 0)


def _is_gone(error: BaseException) -> bool:
    known = translate(error)
    return is_version_gone(error) or (known is not None and known.code == "SFS-514")


def _gone_text(error: BaseException) -> str:
    known: SparkFSError | None = translate(error)
    where = known.problems[0].where if known else ""
    return f"a version that it pins is gone: its log or its files were cleaned up{f' ({where})' if where else ''}"


def _notes(packages: Mapping[str, str]) -> list[str]:
    installed = {name: package_version(name) for name in packages if name != "python"}
    return [f"saved with {name} {packages[name]}, now {now}" for name, now in installed.items() if now != packages[name]]

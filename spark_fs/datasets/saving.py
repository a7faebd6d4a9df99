"""A joined training set → the next version of a dataset: split, written, counted, judged, committed, noted."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from importlib.metadata import version as package_version
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.datasets.content import checksum, content_measures, row_digest
from spark_fs.datasets.manifest import (
    SPLIT,
    ColumnInfo,
    FeatureInfo,
    Manifest,
    OriginInfo,
    Role,
    SpineInfo,
    SplitInfo,
    TimeRule,
)
from spark_fs.datasets.naive import differing
from spark_fs.datasets.origins import OfflineStore, Origin
from spark_fs.datasets.report import Trace, make_report, report_measures, violations, warnings
from spark_fs.datasets.splits import SplitRule, parse_split, settle_split, split_column, split_counts, split_from_json
from spark_fs.datasets.tables import DatasetTable, Written
from spark_fs.errors import ConflictError, InvalidError, Problem, did_you_mean, translated
from spark_fs.files import write_text
from spark_fs.offline.asof import SpineStats
from spark_fs.offline.compute import quoted
from spark_fs.registry import Registry
from spark_fs.spec import Selection

#: About so many rows of each saved dataset are joined again by a naive path.
_SAMPLE_ROWS = 25


@dataclass(frozen=True, slots=True)
class JoinedView:
    """One view of a join: what was selected of it under which names, and where its rows come from; ``rows`` gives them all."""

    selection: Selection
    names: Mapping[str, str]
    origin: Origin
    rows: Callable[[], DataFrame]

    @property
    def keys(self) -> dict[str, str]:
        """The view's join keys and the columns of the spine that hold them."""
        return dict(zip(self.selection.view.key_names, self.selection.spine_keys, strict=True))


@dataclass(frozen=True, slots=True)
class Joined:
    """A training set that was not run yet.

    ``rows`` are the spine's columns, the features, and the times that ``traces`` name, by which each row's features can be told
    to be of the past.
    """

    spine: DataFrame
    spine_source: str
    stats: SpineStats
    time: str
    known_at: bool
    full_feature_names: bool
    views: Sequence[JoinedView]
    rows: DataFrame
    traces: Sequence[Trace]

    @property
    def join_keys(self) -> list[str]:
        """The columns of the spine that are join keys, each once."""
        return list(dict.fromkeys(column for view in self.views for column in view.keys.values()))

    @property
    def columns(self) -> list[str]:
        """The columns of the result."""
        return [*self.spine.columns, *(name for view in self.views for name in view.names.values())]


@dataclass(frozen=True, slots=True)
class Wish:
    """How a dataset is to be saved."""

    name: str
    split: SplitRule | None = None
    labels: tuple[str, ...] = ()
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def check(self, columns: Sequence[str], spine: Sequence[str]) -> None:
        """Refuse what cannot be, before anything runs: SFS-503, SFS-509, SFS-515, all problems at once."""
        problems = []
        if not self.name.isidentifier() or self.name.startswith("_"):
            problems.append(
                Problem(
                    "SFS-509",
                    f"'{self.name}' cannot name a dataset.",
                    "It becomes a folder and a table name.",
                    fix="use letters, digits and underscores, starting with a letter",
                )
            )
        problems += [
            Problem("SFS-515", f"There is no column '{label}' to be a label.", did_you_mean(label, spine))
            for label in self.labels
            if label not in spine
        ]
        if self.split is not None and SPLIT in map(str.lower, columns):
            fix = "rename the column, for a split adds one of this name"
            problems.append(Problem("SFS-503", f"The column name '{SPLIT}' is taken.", fix=fix))
        if problems:
            raise InvalidError(*problems)


def parse_wish(options: Any) -> Wish:
    """How a dataset is to be saved, from the options of a command line; InvalidError SFS-515 for what cannot be read.

    ``options`` has name, split, split_by, seed, gap_days, stratify, label, tag and description, as ``dataset create`` has them.
    """
    gap_days, seed, pairs = options.gap_days or 0, options.seed or 0, [tag.partition("=") for tag in options.tag or ()]
    problems = [Problem("SFS-515", f"'{key}' is no tag.", fix="write key=value") for key, equals, _ in pairs if not equals]
    if options.split is None and (options.split_by or options.stratify or float(gap_days) or int(seed)):
        problems.append(Problem("SFS-515", "How to split is told, but not by what.", fix="add --split"))
    if problems:
        raise InvalidError(*problems)
    split = options.split and parse_split(
        options.split,
        by=options.split_by or (),
        seed=int(seed),
        gap=timedelta(days=float(gap_days)),
        stratify=options.stratify,
    )
    tags = {key: value for key, _, value in pairs}
    return Wish(options.name, split, tuple(options.label or ()), options.description or "", tags)


def save_joined(store: OfflineStore, joined: Joined, wish: Wish) -> Manifest:
    """Write the training set as the next version of a dataset; see ``RetrievalJob.save``."""
    table = store.dataset(wish.name)
    known = noted_versions(store.registry, table)
    newest = known[max(known)] if known else None
    earlier = split_from_json(newest.split.rule) if newest and newest.split else None
    rule = wish.split and settle_split(wish.split, joined.spine, joined.join_keys, earlier)
    rows, columns, parts = joined.rows, joined.columns, ()  # type: DataFrame, list[str], tuple[str, ...]
    if rule is not None:
        rows, columns, parts = rows.withColumn(SPLIT, split_column(rule, rows, joined.time)), [*columns, SPLIT], rule.names
    measures = [
        *content_measures(rows.schema, columns, joined.spine.columns),
        *split_counts(parts),
        *report_measures(rows.schema, joined.time, joined.traces, wish.labels, parts),
    ]
    written = table.write(rows, measures, [quoted(column) for column in columns])
    try:
        report = _report(store, joined, wish, written, parts)
        manifest = _manifest(store, joined, wish, written, rule, report)
    except BaseException:
        written.transaction.discard()
        raise
    saved, is_new = table.commit(written, manifest)
    if is_new:
        _note(store.registry, table, saved)
    return saved


def noted_versions(registry: Registry, table: DatasetTable) -> dict[int, Manifest]:
    """The versions that are saved; those that the registry does not know, for their save was interrupted, are noted there."""
    found = table.manifests()
    known = {(saved["name"], saved["version"]) for saved in registry.datasets.all()}
    for manifest in found.values():
        if (manifest.name, manifest.version) not in known:
            _note(registry, table, manifest)
    return found


def _note(registry: Registry, table: DatasetTable, manifest: Manifest) -> None:
    """Note a version in the registry, and its manifest beside the table."""
    body = manifest.to_json()
    write_text(f"{table.path}/_manifests/{manifest.version}.json", json.dumps(body, indent=2, ensure_ascii=False))
    with suppress(ConflictError):  # noted meanwhile
        registry.datasets.add(manifest.name, manifest.version, body)


def _report(store: OfflineStore, joined: Joined, wish: Wish, written: Written, parts: Sequence[str]) -> dict[str, Any]:
    """The report of what was written; InvalidError SFS-517 where it cannot be right."""
    stats = joined.stats
    with translated():
        compared, wrong = _joined_again(store, joined, written)
        identity = row_digest(joined.spine.schema, [*joined.join_keys, joined.time])
        distinct = joined.spine.select(identity.alias("row")).distinct().count()
    report = make_report(
        written.counts,
        written.schema,
        joined.traces,
        spine_rows=stats.rows,
        null_times=stats.null_times,
        duplicates=max(stats.rows - distinct, 0),
        labels=wish.labels,
        parts=parts,
        compared=compared,
        differing=wrong,
    )
    if impossible := list(violations(report, known_at=joined.known_at)):
        raise InvalidError(*impossible)
    return {**report, "warnings": list(warnings(report, known_at=joined.known_at))}


def _joined_again(store: OfflineStore, joined: Joined, written: Written) -> tuple[int, list[str]]:
    """How many of the rows that were written were compared with what the naive path gives, and where it gives another."""
    files, rows, time = written.transaction.written, written.counts["rows"], joined.time
    if not rows:
        return 0, []
    stored = store.spark.read.schema(written.schema).parquet(*files)
    chosen = F.pmod(row_digest(stored.schema, joined.spine.columns), F.lit(max(rows // _SAMPLE_ROWS, 1))) == 0
    others = [quoted(column) for column in stored.columns if column != time]
    found = stored.where(chosen).limit(_SAMPLE_ROWS).select(*others, F.unix_micros(quoted(time)).alias(time))
    sample, wrong = [row.asDict() for row in found.collect()], []  # type: list[dict[str, Any]], list[str]
    for view in joined.views:
        spec, rows_of_view = view.selection.view, view.rows()
        wrong += differing(sample, rows_of_view, spec, view.keys, view.names, time=time, known_at=joined.known_at)
    return len(sample), wrong


def _manifest(
    store: OfflineStore, joined: Joined, wish: Wish, written: Written, rule: SplitRule | None, report: Mapping[str, Any]
) -> Manifest:
    """The manifest of what was written, without the number that it gets with its commit."""
    counts, spine = written.counts, joined.spine.columns
    roles: dict[str, Role] = {**dict.fromkeys(spine, "spine"), **dict.fromkeys(wish.labels, "label"), SPLIT: "split"}
    in_parts = {name: counts[f"split_{n}"] for n, name in enumerate(rule.names)} if rule else {}
    packages = {package: package_version(package) for package in ("spark-fs", "pyspark", "delta-spark")}
    columns = [
        ColumnInfo(
            name=column.name,
            type=column.dataType.simpleString(),
            role=roles.get(column.name, "feature"),
            nulls=counts[f"nulls_{n}"],
        )
        for n, column in enumerate(written.schema.fields)
    ]
    return Manifest(
        project=store.registry.project,
        name=wish.name,
        version=0,
        path=store.dataset(wish.name).path,
        delta_version=None,
        save_id=uuid.uuid4().hex,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        description=wish.description,
        tags=wish.tags,
        rows=counts["rows"],
        checksum=checksum(counts, "content"),
        columns=tuple(columns),
        spine=SpineInfo(
            source=joined.spine_source, columns=tuple(spine), rows=joined.stats.rows, checksum=checksum(counts, "spine")
        ),
        origins=tuple(_origin_info(store, view) for view in joined.views),
        full_feature_names=joined.full_feature_names,
        time_rule=TimeRule(known_at=joined.known_at),
        split=rule and SplitInfo(rule=rule.to_json(), rows=in_parts, none=counts["rows"] - sum(in_parts.values())),
        report=report,
        packages={"python": platform.python_version(), **packages},
    )


def _origin_info(store: OfflineStore, joined: JoinedView) -> OriginInfo:
    origin, view = joined.origin, joined.selection.view
    is_built = origin.table_version is not None
    return OriginInfo(
        alias=joined.selection.alias,
        view=view.reference,
        definition_hash=view.definition_hash,
        join_keys=joined.keys,
        features=tuple(FeatureInfo(feature=name, column=column) for name, column in joined.names.items()),
        table=store.table(view).path if is_built else None,
        table_version=origin.table_version,
        source=view.source.location,
        source_state=None if is_built else origin.source_state,
    )

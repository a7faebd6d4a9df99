"""Training sets: a request is planned, joined lazily, and saved as a versioned Delta table with a manifest."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import cached_property
from html import escape
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from spark_fs.errors import ConflictError, InvalidError, translated
from spark_fs.files import feature_table_path, write_text
from spark_fs.intervals import BEGINNING, Interval, covers
from spark_fs.offline.asof import (
    AsofPlan,
    AsofView,
    SpineStats,
    execute,
    native_asof_note,
    parallelism,
    plan_asof,
    spine_stats,
    why_not_arrow,
)
from spark_fs.offline.compute import Transform, acceptable, feature_frame, quoted
from spark_fs.offline.layout import Layout, read_layout
from spark_fs.offline.sources import read_source, source_state
from spark_fs.offline.spine_stats import SmallSpine, small_spine
from spark_fs.offline.tables import FeatureTable, observed, read_dataset, write_dataset
from spark_fs.registry import Registry
from spark_fs.spec import Selection, ViewSpec, output_names

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

_TIME = "event_timestamp"
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class OfflineStore:
    """What joins need of the surroundings: Spark, where tables lie, what is built, and the views' functions."""

    spark: SparkSession
    registry: Registry
    root: str
    transforms: Callable[[ViewSpec], Transform | None]
    resolve: Callable[[str], str]

    def table(self, view: ViewSpec) -> FeatureTable:
        """The view's feature table, which need not exist."""
        return FeatureTable(self.spark, feature_table_path(self.root, view), view)

    def computed(self, view: ViewSpec) -> DataFrame:
        """The view's rows straight from its source; the same rows as a feature table built from it would hold."""
        source = read_source(self.spark, view.source, self._location(view))
        return feature_frame(view, source, self.transforms(view))

    def source_state(self, view: ViewSpec) -> str | None:
        """A text that differs whenever the rows of the view's source may; None where that cannot be told cheaply."""
        return source_state(self.spark, view.source, self._location(view))

    def _location(self, view: ViewSpec) -> str | None:
        return self.resolve(view.source.path) if view.source.path else None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a join takes a view's rows: its feature table at ``table_version``, or (None) its source.

    ``layout``: the table's files, or None and in ``obstacle`` why they cannot be read one by one.
    """

    view: ViewSpec
    table_version: int | None
    reason: str
    layout: Layout | None = None
    obstacle: str = ""

    def to_json(self) -> dict[str, Any]:
        """The origin for a manifest."""
        return {
            "view": self.view.reference,
            "definition_hash": self.view.definition_hash,
            "table_version": self.table_version,
            "source": self.view.source.location if self.table_version is None else None,
        }


def needed_interval(view: ViewSpec, stats: SpineStats) -> Interval | None:
    """The event times that can matter to the spine; None for a spine without times."""
    if stats.first is None or stats.last is None:
        return None
    bounded = view.ttl is not None and view.ttl < stats.first - BEGINNING
    start = stats.first - view.ttl if bounded and view.ttl else BEGINNING
    return Interval(start, stats.last + _MICROSECOND)


class RetrievalJob:
    """A point-in-time join, not run yet. The first look at its result or plan counts the spine in one Spark job."""

    def __init__(
        self,
        store: OfflineStore,
        spine: DataFrame,
        spine_source: str,
        selections: Sequence[Selection],
        *,
        full_feature_names: bool,
        known_at: bool,
        strategy: str = "auto",
    ) -> None:
        self._store, self._spine, self._spine_source = store, spine, spine_source
        self._selections, self._known_at, self._strategy = list(selections), known_at, strategy
        self._names = output_names(self._selections, full_feature_names=full_feature_names, taken=spine.columns)
        # Names and types are checked now, before any job; whether views can be joined as asked is known with their tables.
        checked = "auto" if strategy == "colocated" else strategy
        plan_asof(self._views({}), spine.dtypes, known_at=known_at, strategy=checked)

    def to_spark_df(self) -> DataFrame:
        """The spine's columns in order, then the features: one row per spine row, in no particular order. Lazy.

        Always the same frame: tables, and sources in Delta, stay at the versions that were the newest at the first call.
        """
        return self._joined

    def to_df(self) -> pandas.DataFrame:
        """The result as a pandas DataFrame, in this process's memory; timestamps with time zone UTC."""
        return self.to_arrow().to_pandas()

    def to_arrow(self) -> pyarrow.Table:
        """The result as an Arrow table, in this process's memory; timestamps with time zone UTC."""
        with translated():
            found = self.to_spark_df().toArrow()
        return found.cast(_in_utc(found.schema))

    def to_polars(self) -> polars.DataFrame:
        """The result as a polars DataFrame, in this process's memory."""
        import polars

        frame = polars.from_arrow(self.to_arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def explain(self) -> str:
        """How the join will run, and why: per view where its rows come from, what is pruned, what is shuffled."""
        return str(self.plan)

    @cached_property
    def _joined(self) -> DataFrame:
        moved = {view.name for group in self.plan.groups if group.strategy == "window" for view in group.views}
        frames = {selection.alias: self._frame(selection) for selection in self._selections if selection.alias in moved}
        return execute(self.plan, self._spine, frames, self._small)

    @cached_property
    def plan(self) -> AsofPlan:
        """The join as decided. Counts the spine in one Spark job the first time, two where only some views have tables."""
        plan = self._planned(self._stats)
        uncounted = [
            tuple(name for name, _ in group.keys)
            for group in plan.groups
            if group.strategy == "window" and tuple(name for name, _ in group.keys) not in self._stats.distinct_keys
        ]
        if not any(uncounted):
            return plan
        counted = spine_stats(self._spine, _TIME, uncounted).distinct_keys
        return self._planned(replace(self._stats, distinct_keys={**self._stats.distinct_keys, **counted}))

    def _planned(self, stats: SpineStats) -> AsofPlan:
        return plan_asof(
            self._views(self.origins),
            self._spine.dtypes,
            stats=stats,
            known_at=self._known_at,
            strategy=self._strategy,
            spine_obstacle=why_not_arrow(self._spine),
            parallelism=parallelism(self._store.spark),
            small_spine=self._small is not None,
            notes=native_asof_note(self._store.spark),
        )

    @cached_property
    def origins(self) -> Mapping[str, Origin]:
        """Where the rows of each view (by alias) come from."""
        return {selection.alias: self._origin(selection) for selection in self._selections}

    @cached_property
    def _built(self) -> Mapping[str, Sequence[Interval]]:
        """What is built of each view (by alias), looked up once."""
        return {selection.alias: self._store.registry.built(selection.view) for selection in self._selections}

    @cached_property
    def _small(self) -> SmallSpine | None:
        """The spine itself, where it is small and every view has a table that it may be joined with in place."""
        if self._strategy == "window" or not all(self._built.values()) or why_not_arrow(self._spine):
            return None
        with translated():
            return small_spine(self._spine, _TIME, [selection.spine_keys for selection in self._selections])

    @cached_property
    def _stats(self) -> SpineStats:
        if self._small is not None:
            return self._small.stats
        built = [selection for selection in self._selections if self._built[selection.alias]]
        if self._strategy == "window":
            built = []
        others = [selection.spine_keys for selection in self._selections if selection not in built]
        return spine_stats(self._spine, _TIME, others, residues=[selection.spine_keys for selection in built])

    def _origin(self, selection: Selection) -> Origin:
        view, built = selection.view, self._built[selection.alias]
        needed = needed_interval(view, self._stats)
        table = self._store.table(view)
        if needed is not None and built and covers(built, needed):
            version, layout, obstacle = read_layout(table.path)
            if version is None and table.exists():
                version = table.version()
            if version is not None:
                return Origin(view, version, f"feature table {view.reference}, Delta version {version}", layout, obstacle)
        why = "covers the range" if built else "was built"
        return Origin(view, None, f"computed from source '{view.source.name}': no feature table {why}")

    def _views(self, origins: Mapping[str, Origin]) -> list[AsofView]:
        return [self._view(index, selection, origins.get(selection.alias)) for index, selection in enumerate(self._selections)]

    def _view(self, index: int, selection: Selection, origin: Origin | None) -> AsofView:
        view = selection.view
        columns = [(column.name, column.type.spark) for column in (*view.keys, *view.features)]
        has_created = view.source.created_timestamp_field is not None
        return AsofView(
            name=selection.alias,
            keys=tuple(zip(selection.spine_keys, view.key_names, strict=True)),
            features=tuple((name, self._names[(index, name)]) for name in selection.features),
            columns=(*columns, (_TIME, "timestamp"), ("created_timestamp", "timestamp")),
            created_time="created_timestamp" if has_created else None,
            ttl=view.ttl,
            unique=origin is not None and origin.table_version is not None,
            hash_columns=view.feature_names,
            source=origin.reason if origin else "",
            layout=origin.layout if origin else None,
            obstacle=origin.obstacle if origin else "",
        )

    def _frame(self, selection: Selection) -> DataFrame:
        origin = self.origins[selection.alias]
        if origin.table_version is not None:
            return self._store.table(origin.view).read(origin.table_version)
        return self._store.computed(origin.view).where(acceptable(origin.view))

    def save(self, name: str, *, description: str = "", tags: Mapping[str, str] | None = None) -> Dataset:
        """Write the result as the next version of dataset ``name`` and return it.

        Runs the join once; content checksum, row count and nulls per column are counted in the same pass. What is there
        stays: each save is one more Delta version. Raises InvalidError SFS-509 for a name that cannot be one, and
        ConflictError SFS-410 if another save of the dataset came first.
        """
        if not name.isidentifier() or name.startswith("_"):
            raise InvalidError.of(
                "SFS-509",
                f"'{name}' cannot name a dataset.",
                why="It becomes a folder and a table name.",
                fix="use letters, digits and underscores, starting with a letter",
            )
        registry = self._store.registry
        path = f"{self._store.root}/{registry.project}/_datasets/{name}"
        frame, counts, save_id = self.to_spark_df(), Observation(), uuid.uuid4().hex
        measures = _content(frame, self._spine.columns)
        note = {"dataset": name, "save_id": save_id}
        with translated():
            delta_version = write_dataset(frame.observe(counts, *measures), path, note, f"spark_fs:{save_id}")
        content = self._manifest(name, frame, observed(counts, frame, measures), path, delta_version)
        content |= {"save_id": save_id, "description": description, "tags": dict(tags or {})}
        manifest = _register(registry, content)
        write_text(f"{path}/_manifests/{manifest['version']}.json", json.dumps(manifest, indent=2, ensure_ascii=False))
        return Dataset(manifest, self._store.spark)

    def _manifest(
        self, name: str, frame: DataFrame, counts: Mapping[str, Any], path: str, delta_version: int
    ) -> dict[str, Any]:
        stats = self._stats
        return {
            "format": 1,
            "name": name,
            "project": self._store.registry.project,
            "path": path,
            "delta_version": delta_version,
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "rows": counts["rows"],
            "checksum": _hex(counts["checksum"]),
            "columns": [
                {"name": field.name, "type": field.dataType.simpleString(), "nulls": counts[f"nulls_{n}"]}
                for n, field in enumerate(frame.schema.fields)
            ],
            "spine": {
                "source": self._spine_source,
                "columns": self._spine.columns,
                "rows": stats.rows,
                "checksum": _hex(counts["spine_checksum"]),
            },
            "features": [f"{s.view.reference}:{f}" for s in self._selections for f in s.features],
            "views": {alias: origin.to_json() for alias, origin in self.origins.items()},
            "time_rule": {
                "upper_bound": "inclusive",
                "lower_bound": "inclusive",
                "known_at": self._known_at,
                "ties": "event_timestamp, created_timestamp, row hash",
            },
            "packages": {
                "python": platform.python_version(),
                **{package: package_version(package) for package in ("spark-fs", "pyspark", "delta-spark")},
            },
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(self._names[(n, f.name)])}</td><td>{escape(f.type.name)}</td>"
            f"<td>{escape(s.view.reference)}</td></tr>"
            for n, s in enumerate(self._selections)
            for f in s.columns
        )
        spine = escape(", ".join(self._spine.columns))
        return (
            f"<b>Training set</b>, not run yet; spine: {escape(self._spine_source)} ({spine})"
            f"<table><tr><th>feature</th><th>type</th><th>view</th></tr>{rows}</table>"
        )


def _in_utc(schema: pyarrow.Schema) -> pyarrow.Schema:
    """The schema with instants shown in UTC, where Spark shows them in its session's zone."""
    import pyarrow as pa

    def in_utc(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind) and kind.tz is not None:
            return pa.timestamp(kind.unit, tz="UTC")
        return pa.list_(in_utc(kind.value_type)) if pa.types.is_list(kind) else kind

    return pa.schema([column.with_type(in_utc(column.type)) for column in schema], metadata=schema.metadata)


def _register(registry: Registry, content: Mapping[str, Any]) -> dict[str, Any]:
    """Give the saved content the next free version number; two saves at once get two."""
    while True:
        taken = [known["version"] for known in registry.datasets() if known["name"] == content["name"]]
        manifest = {**content, "version": max(taken, default=0) + 1}
        try:
            registry.add_dataset(content["name"], manifest["version"], manifest)
        except ConflictError:
            continue
        return manifest


def _content(frame: DataFrame, spine_columns: Sequence[str]) -> list[SparkColumn]:
    nulls = [F.count_if(quoted(name).isNull()).alias(f"nulls_{n}") for n, name in enumerate(frame.columns)]
    return [
        F.count(F.lit(1)).alias("rows"),
        _checksum(frame, frame.columns).alias("checksum"),
        _checksum(frame, spine_columns).alias("spine_checksum"),
        *nulls,
    ]


def _checksum(frame: DataFrame, columns: Sequence[str]) -> SparkColumn:
    """The sum of a 64-bit hash of each row: the same for the same rows in any order and partitioning."""
    types = dict(frame.dtypes)
    hashable = [quoted(name) for name in columns if "map<" not in types[name] and "variant" not in types[name]]
    return F.coalesce(F.sum(F.xxhash64(*hashable).cast("decimal(20,0)")), F.lit(0).cast("decimal(30,0)"))


def _hex(total: Any) -> str:
    return f"{int(total) % 2**64:016x}"


@dataclass(frozen=True)
class Dataset:
    """One saved version of a training dataset."""

    manifest: Mapping[str, Any]
    spark: SparkSession | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.manifest["name"])

    @property
    def version(self) -> int:
        """The version of this dataset, from 1."""
        return int(self.manifest["version"])

    @property
    def path(self) -> str:
        """The Delta table; this version of the dataset is its version ``manifest['delta_version']``."""
        return str(self.manifest["path"])

    def to_spark_df(self) -> DataFrame:
        """The rows, lazily. Needs the Spark session with which the dataset was got."""
        if self.spark is None:
            raise InvalidError.of("SFS-510", "There is no Spark session here.", fix="use to_arrow(), to_df() or to_polars()")
        return read_dataset(self.spark, self.path, self.manifest["delta_version"])

    def to_arrow(self) -> pyarrow.Table:
        """The rows as an Arrow table, read without Spark (needs the package deltalake)."""
        import pyarrow
        from deltalake import DeltaTable

        return pyarrow.table(DeltaTable(self.path, version=self.manifest["delta_version"]).to_pyarrow_table())

    def to_df(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, read without Spark."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """The rows as a polars DataFrame, read without Spark."""
        import polars

        return polars.read_delta(self.path, version=self.manifest["delta_version"])

    def verify(self) -> dict[str, Any]:
        """Compare the stored rows with the manifest: rows and checksum as they should be and as they are. One Spark job."""
        rows = self.to_spark_df()
        columns = [F.count(F.lit(1)).alias("rows"), _checksum(rows, rows.columns).alias("checksum")]
        found = rows.agg(*columns).first()
        assert found is not None  # an aggregate without groups has one row
        verdict = {"rows": found["rows"], "checksum": _hex(found["checksum"])}
        wanted = {name: self.manifest[name] for name in verdict}
        expected = {f"expected_{name}": value for name, value in wanted.items()}
        return {"dataset": f"{self.name}@{self.version}", **verdict, **expected, "identical": verdict == wanted}

    def _repr_html_(self) -> str:
        manifest = self.manifest
        rows = "".join(
            f"<tr><td>{escape(c['name'])}</td><td>{escape(c['type'])}</td><td>{c['nulls']:,}</td></tr>"
            for c in manifest["columns"]
        )
        load = f'FeatureStore(".").get_dataset("{self.name}", version={self.version}).to_df()'
        return (
            f"<b>{escape(self.name)}@{self.version}</b>, {manifest['rows']:,} rows, checksum {manifest['checksum']}"
            f"<table><tr><th>column</th><th>type</th><th>nulls</th></tr>{rows}</table><code>{escape(load)}</code>"
        )

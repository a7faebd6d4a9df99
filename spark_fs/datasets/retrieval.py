"""A request for a training set: planned, joined lazily, and saved as the next version of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from html import escape
from typing import TYPE_CHECKING

from pyspark.sql import DataFrame

from spark_fs.datasets.dataset import Dataset
from spark_fs.datasets.manifest import OriginInfo
from spark_fs.datasets.origins import OfflineStore, Origin, needed_interval
from spark_fs.datasets.report import Trace
from spark_fs.datasets.saving import Joined, JoinedView, Wish, save_joined
from spark_fs.datasets.splits import SplitRule
from spark_fs.errors import translated
from spark_fs.intervals import Interval, covers
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
from spark_fs.offline.compute import acceptable
from spark_fs.offline.layout import read_layout
from spark_fs.offline.spine_stats import SmallSpine, small_spine
from spark_fs.spec import Selection, output_names

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

_TIME = "event_timestamp"


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
        pinned: Mapping[str, OriginInfo] | None = None,
    ) -> None:
        self._store, self._spine, self._spine_source = store, spine, spine_source
        self._selections, self._known_at, self._strategy = list(selections), known_at, strategy
        self._full_feature_names, self._pinned = full_feature_names, pinned or {}
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
        return execute(self.plan, self._spine, self._frames, self._small)

    @cached_property
    def _frames(self) -> dict[str, DataFrame]:
        """The rows of those views that a window joins, by alias."""
        moved = {view.name for group in self.plan.groups if group.strategy == "window" for view in group.views}
        return {selection.alias: self._frame(selection) for selection in self._selections if selection.alias in moved}

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

    def _may_have_table(self, selection: Selection) -> bool:
        pinned = self._pinned.get(selection.alias)
        return pinned.table_version is not None if pinned else bool(self._built[selection.alias])

    @cached_property
    def _small(self) -> SmallSpine | None:
        """The spine itself, where it is small and every view has a table that it may be joined with in place."""
        if self._strategy == "window" or not all(map(self._may_have_table, self._selections)) or why_not_arrow(self._spine):
            return None
        with translated():
            return small_spine(self._spine, _TIME, [selection.spine_keys for selection in self._selections])

    @cached_property
    def _stats(self) -> SpineStats:
        if self._small is not None:
            return self._small.stats
        built = [] if self._strategy == "window" else list(filter(self._may_have_table, self._selections))
        others = [selection.spine_keys for selection in self._selections if selection not in built]
        return spine_stats(self._spine, _TIME, others, residues=[selection.spine_keys for selection in built])

    def _origin(self, selection: Selection) -> Origin:
        view, table = selection.view, self._store.table(selection.view)
        if pinned := self._pinned.get(selection.alias):
            if pinned.table_version is None:
                return Origin(view, None, f"computed from source '{view.source.name}'", source_state=pinned.source_state)
            _, layout, obstacle = read_layout(table.path, pinned.table_version)
            reason = f"feature table {view.reference}, Delta version {pinned.table_version}"
            return Origin(view, pinned.table_version, reason, layout, obstacle)
        built, needed = self._built[selection.alias], needed_interval(view, self._stats)
        if needed is not None and built and covers(built, needed):
            version, layout, obstacle = read_layout(table.path)
            if version is None and table.exists():
                version = table.version()
            if version is not None:
                return Origin(view, version, f"feature table {view.reference}, Delta version {version}", layout, obstacle)
        why = "covers the range" if built else "was built"
        reason = f"computed from source '{view.source.name}': no feature table {why}"
        return Origin(view, None, reason, source_state=self._store.source_state(view))

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
        return self._store.computed(origin.view, origin.source_state).where(acceptable(origin.view))

    def save(
        self,
        name: str,
        *,
        split: SplitRule | None = None,
        labels: Sequence[str] = (),
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Write the result as the next version of dataset ``name``, with a manifest and a report, and return it.

        Runs the join once; checksum, nulls and the report are counted in the same pass. What is there stays: each save is one
        more Delta version. A save of what the newest version is already gives that one. ``split`` adds the column ``split``.
        ``labels`` are columns of the spine that the model is to predict: features that tell too much of them are reported.

        Raises InvalidError SFS-509 for a name that cannot be one, SFS-515 for a split or labels that do not fit, SFS-517 where
        the result cannot be right (nothing is saved then), and ConflictError SFS-410 if other saves of the dataset came first
        again and again.
        """
        return self.save_as(Wish(name, split, tuple(labels), description, dict(tags or {})))

    def save_as(self, wish: Wish) -> Dataset:
        """As ``save``, with all arguments as one value."""
        wish.check([*self._spine.columns, *self._names.values()], self._spine.columns)
        return Dataset(save_joined(self._store, self._as_joined(), wish), self._store.spark)

    def _as_joined(self) -> Joined:
        rows, traces = self._traced()
        return Joined(
            spine=self._spine,
            spine_source=self._spine_source,
            stats=self._stats,
            time=_TIME,
            known_at=self._known_at,
            full_feature_names=self._full_feature_names,
            views=[self._joined_view(index, selection) for index, selection in enumerate(self._selections)],
            rows=rows,
            traces=traces,
        )

    def _joined_view(self, index: int, selection: Selection) -> JoinedView:
        names = {feature: self._names[(index, feature)] for feature in selection.features}
        return JoinedView(selection, names, self.origins[selection.alias], partial(self._frame, selection))

    def _traced(self) -> tuple[DataFrame, list[Trace]]:
        """The result with, for each view, the times of the row that its values were taken from."""
        traces: dict[str, Trace] = {}
        groups = []
        for group in self.plan.groups:
            views = []
            for view in group.views:
                event, created = f"_sfs_event_{len(traces)}", f"_sfs_created_{len(traces)}"
                times = [(view.event_time, event), *([(view.created_time, created)] if view.created_time else [])]
                features = tuple(output for _, output in view.features)
                traces[view.name] = Trace(view.name, features, event, created if view.created_time else None)
                views.append(replace(view, features=(*view.features, *times)))
            groups.append(replace(group, views=tuple(views)))
        hidden = [name for trace in traces.values() for name in (trace.event, trace.created) if name]
        plan = replace(self.plan, groups=tuple(groups), outputs=(*self.plan.outputs, *hidden))
        ordered = [traces[selection.alias] for selection in self._selections]
        return execute(plan, self._spine, self._frames, self._small), ordered

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

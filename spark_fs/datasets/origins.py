"""Where the rows of a join come from: a version of a view's feature table, or its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from pyspark.sql import DataFrame, SparkSession

from spark_fs.datasets.tables import DatasetTable
from spark_fs.files import feature_table_path
from spark_fs.intervals import BEGINNING, Interval
from spark_fs.offline.asof import SpineStats
from spark_fs.offline.compute import Transform, feature_frame
from spark_fs.offline.layout import Layout
from spark_fs.offline.sources import read_source, source_state, version_in_state
from spark_fs.offline.tables import FeatureTable
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec

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

    def dataset(self, name: str) -> DatasetTable:
        """The table of a dataset, which need not exist."""
        return DatasetTable(self.spark, f"{self.root}/{self.registry.project}/_datasets/{name}")

    def computed(self, view: ViewSpec, source_state: str | None = None) -> DataFrame:
        """The view's rows straight from its source; the same rows as a feature table built from it would hold.

        ``source_state`` names the version of a Delta source; default: its newest.
        """
        source = read_source(self.spark, view.source, self._location(view), version_in_state(source_state))
        return feature_frame(view, source, self.transforms(view))

    def source_state(self, view: ViewSpec) -> str | None:
        """A text that differs whenever the rows of the view's source may; None where that cannot be told cheaply."""
        return source_state(self.spark, view.source, self._location(view))

    def _location(self, view: ViewSpec) -> str | None:
        return self.resolve(view.source.path) if view.source.path else None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a join takes a view's rows: its feature table at ``table_version``, or (None) its source.

    ``layout``: the table's files, or None and in ``obstacle`` why they cannot be read one by one. ``source_state``: which
    state of the source, where that is read; None where it cannot be told.
    """

    view: ViewSpec
    table_version: int | None
    reason: str
    layout: Layout | None = None
    obstacle: str = ""
    source_state: str | None = None


def needed_interval(view: ViewSpec, stats: SpineStats) -> Interval | None:
    """The event times that can matter to the spine; None for a spine without times."""
    if stats.first is None or stats.last is None:
        return None
    bounded = view.ttl is not None and view.ttl < stats.first - BEGINNING
    start = stats.first - view.ttl if bounded and view.ttl else BEGINNING
    return Interval(start, stats.last + _MICROSECOND)

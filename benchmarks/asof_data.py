"""What bench_asof joins: the shapes of its data, how they are generated, and the feature tables built from them.

Everything is made once, from seeds, into a cache folder, and reused while a shape stays as it is. The digest of a shape is
in the name of its folder; that of the code is not, so feature tables are made anew (``--fresh``) when their layout changes.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spark_fs import FeatureStore
from spark_fs.config import BuildConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

KEY = "user_id"
TIME = "event_timestamp"
SPINE_COLUMNS = (KEY, TIME, "label")
START = datetime(2023, 11, 14, tzinfo=timezone.utc)
SPINE_DAYS = 30
FILE_ROWS = 1_000_000
#: Row groups as DuckDB writes them: small enough that every engine reads the spine with all its cores.
SPINE_ROW_GROUP = 122_880
_MICROSECONDS_A_DAY = 86_400_000_000
_START_MICROS = int(START.timestamp()) * 1_000_000
_INSTANT = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Source:
    """Raw rows in order of arrival: keys at random, times rising, created a minute later, ``doubles`` random values."""

    name: str
    rows: int
    doubles: int = 5

    def columns(self, count: int) -> tuple[str, ...]:
        """The names of ``count`` value columns, spread evenly over all."""
        return tuple(f"{self.name}_f{n * self.doubles // count}" for n in range(count))


@dataclass(frozen=True)
class View:
    """A feature view of a source's rows; ``builds`` equal time slices are built one by one, then perhaps compacted."""

    name: str
    source: Source
    doubles: int
    ttl_days: int = 0
    builds: int = 1
    optimized: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The names of its features."""
        return self.source.columns(self.doubles)

    @property
    def ttl(self) -> timedelta | None:
        """How long a value counts; None: for ever."""
        return timedelta(days=self.ttl_days) or None


@dataclass(frozen=True)
class Tables:
    """Feature tables of one project. ``hot_share`` of all feature rows belong to key 0."""

    name: str
    keys: int
    views: tuple[View, ...]
    days: int = 60
    hot_share: float = 0.0


@dataclass(frozen=True)
class Training:
    """A training set to be made: a spine with random times in the last 30 days, and ``asked`` features of each view."""

    name: str
    tables: Tables
    spine_rows: int
    views: tuple[View, ...]
    asked: int
    hot_share: float = 0.0

    def features(self, view: View) -> tuple[str, ...]:
        """The features that are asked for."""
        return view.source.columns(self.asked)

    @property
    def references(self) -> list[str]:
        """The features as a request names them."""
        return [f"{view.name}:{feature}" for view in self.views for feature in self.features(view)]


def training_sets(scale: float) -> dict[str, Training]:
    """All training sets by name, with rows and keys times ``scale``."""

    def rows(count: int) -> int:
        return max(round(count * scale), 100)

    def two_views(name: str, keys: int, hot_share: float = 0.0, times: int = 1) -> Tables:
        view1, view2 = Source("view1", rows(times * 10_000_000)), Source("view2", rows(times * 5_000_000))
        return Tables(name, rows(keys), (View("view1", view1, 5), View("view2", view2, 5, ttl_days=7)), hot_share=hot_share)

    def training(name: str, tables: Tables, *views: View, spine: int = 1_000_000, **more: Any) -> Training:
        views = views or tables.views
        asked = min(view.doubles for view in views)
        return Training(name, tables, rows(spine), views, asked, **more)

    medium, growth = two_views("medium", 200_000), two_views("growth", 2_000_000, times=10)
    ten = tuple(View(f"ten{n}", Source(f"ten{n}", rows(1_000_000), 3), 3) for n in range(10))
    ten_views = Tables("ten", rows(200_000), ten)
    source = Source("wide", rows(1_000_000), 200)
    wide, five = View("wide", source, 200), View("five", source, 5)
    wide_views = Tables("wide", rows(200_000), (wide, five))
    source = Source("daily", rows(10_000_000))
    once, daily = View("once", source, 5), View("daily", source, 5, builds=100)
    compacted = View("compacted", source, 5, builds=100, optimized=True)
    decayed_views = Tables("decayed", rows(200_000), (once, daily, compacted), days=100)
    every = [
        training("medium", medium),
        training("small", medium, spine=10_000),
        training("deep", two_views("deep", 20_000)),
        training("skew", two_views("skew", 200_000, hot_share=0.3), hot_share=0.1),
        training("ten", ten_views),
        training("one_of_ten", ten_views, ten[0]),
        Training("five_of_wide", wide_views, rows(1_000_000), (wide,), asked=5),
        training("five", wide_views, five),
        *(training(view.name, decayed_views, view) for view in decayed_views.views),
        training("growth", growth, spine=10_000_000),
    ]
    return {each.name: each for each in every}


@dataclass(frozen=True)
class Cache:
    """Where generated data, feature tables and projects lie."""

    root: Path

    def folder(self, tables: Tables) -> Path:
        """The project of these tables; its name tells their shape."""
        return self.root / f"{tables.name}-{hashlib.sha256(repr(tables).encode()).hexdigest()[:8]}"

    def source(self, tables: Tables, source: Source) -> Path:
        """The folder of a source's Parquet files."""
        return self.folder(tables) / "sources" / source.name

    def table(self, tables: Tables, view: View) -> Path:
        """The feature table of a view."""
        return self.folder(tables) / "offline" / "bench" / view.name / "v1"

    def spine(self, training: Training) -> Path:
        """The Parquet file of a spine."""
        hot = f"-hot-{training.hot_share}" if training.hot_share else ""
        return self.folder(training.tables) / "spines" / f"{training.spine_rows}{hot}.parquet"

    def is_ready(self, training: Training) -> bool:
        """Whether the tables and the spine are there, whole."""
        return self._mark(training.tables).exists() and self.spine(training).exists()

    def prepare(self, spark: SparkSession, training: Training) -> None:
        """Generate what is missing and build the feature tables; what a killed run left half done is done again."""
        folder = self.folder(training.tables)
        if not self._mark(training.tables).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _build(self, spark, training.tables)
            self._mark(training.tables).touch()
        if not self.spine(training).exists():
            _write_spine(training, self.spine(training))

    def open(self, spark: SparkSession, tables: Tables) -> FeatureStore:
        """The feature store of these tables."""
        return FeatureStore(self.folder(tables), "bench", spark=spark)

    def _mark(self, tables: Tables) -> Path:
        return self.folder(tables) / "complete"


def write_project(folder: Path, views: tuple[View, ...], sources: Path) -> None:
    """Write settings and definitions of a project in ``folder``; its sources are the folders below ``sources``."""
    # Small builds are to stay small here: how much they cost is what is measured.
    never = "build:\n  max_files_per_bucket: 0\n" if "max_files_per_bucket" in BuildConfig.model_fields else ""
    texts = {
        "conf/base.yml": f"project: bench\nstate_dir: state\noffline:\n  root: offline\n{never}",
        "conf/bench.yml": "",
        "feature_repo/definitions.py": _DEFINITIONS + "".join(_definition(view, sources) for view in views),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


_DEFINITIONS = f"""\
from datetime import timedelta

from spark_fs import Entity, FeatureView, Field, FileSource, Float64, Int64

user = Entity("user", join_keys=[Field("{KEY}", Int64)])
times = dict(timestamp_field="{TIME}", created_timestamp_field="created_timestamp")
"""


def _definition(view: View, sources: Path) -> str:
    path = str(sources / view.source.name)
    return f"""
{view.name} = FeatureView(
    "{view.name}",
    entities=[user],
    schema=[Field(name, Float64) for name in {view.features!r}],
    source=FileSource("raw_{view.name}", path={path!r}, **times),
    ttl=timedelta(days={view.ttl_days}),
)
"""


def _build(cache: Cache, spark: SparkSession, tables: Tables) -> None:
    for source in {view.source for view in tables.views}:
        _write_source(tables, source, cache.source(tables, source))
    write_project(cache.folder(tables), tables.views, cache.folder(tables) / "sources")
    store = cache.open(spark, tables)
    store.apply()
    for view in tables.views:
        for number in range(1, view.builds + 1):
            # Without a start a build takes up where the one before it ended.
            store.build([view.name], end=START + timedelta(days=tables.days) * number / view.builds)
        if view.optimized:
            store.optimize([view.name])


def _write_source(tables: Tables, source: Source, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, source.rows, FILE_ROWS)):
        until = min(first + FILE_ROWS, source.rows)
        random = np.random.default_rng([zlib.crc32(source.name.encode()), number])
        begin, end = (tables.days * _MICROSECONDS_A_DAY * row // source.rows for row in (first, until))
        times = _START_MICROS + np.sort(random.integers(begin, end, until - first))
        columns = {KEY: _keys(random, until - first, tables.keys, tables.hot_share), TIME: pa.array(times, _INSTANT)}
        columns["created_timestamp"] = pa.array(times + 60_000_000, _INSTANT)
        columns |= {name: random.random(until - first) for name in source.columns(source.doubles)}
        pq.write_table(pa.table(columns), folder / f"part-{number:04}.parquet")


def _write_spine(training: Training, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(KEY, pa.int64()), (TIME, _INSTANT), ("label", pa.int64())])
    partial = file.with_suffix(".part")
    with pq.ParquetWriter(partial, schema) as writer:
        for part in _spine_parts(training):
            writer.write_table(part.cast(schema), row_group_size=SPINE_ROW_GROUP)
    partial.rename(file)


def _spine_parts(training: Training) -> Iterator[pa.Table]:
    tables = training.tables
    begin = _START_MICROS + (tables.days - SPINE_DAYS) * _MICROSECONDS_A_DAY
    for first in range(0, training.spine_rows, FILE_ROWS):
        count = min(FILE_ROWS, training.spine_rows - first)
        random = np.random.default_rng([training.spine_rows, first])
        times = begin + random.integers(0, SPINE_DAYS * _MICROSECONDS_A_DAY, count)
        keys = _keys(random, count, tables.keys, training.hot_share)
        yield pa.table({KEY: keys, TIME: pa.array(times, _INSTANT), "label": np.arange(first, first + count)})


def _keys(random: np.random.Generator, count: int, keys: int, hot_share: float) -> np.ndarray[Any, Any]:
    found = random.integers(0, keys, count)
    return np.where(random.random(count) < hot_share, 0, found) if hot_share else found

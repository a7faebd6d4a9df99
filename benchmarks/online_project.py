"""A project with two published views, to be read as a service reads it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from benchmarks.online_tables import DOUBLES, END, START
from spark_fs import FeatureStore

USERS = 100_000
VIEWS = ("profile", "spend")
FEATURES = [f"{view}:{view}_{n}" for view in VIEWS for n in range(DOUBLES)]

_DEFINITIONS = f"""\
from spark_fs import Entity, FeatureView, Field, FileSource, Float64, Int64

user = Entity("user", [Field("user_id", Int64)])


def view_of(name):
    schema = [Field(f"{{name}}_{{n}}", Float64) for n in range({DOUBLES})]
    return FeatureView(name, user, schema, FileSource(f"raw_{{name}}", path=f"data/{{name}}", timestamp_field="at"))


profile, spend = map(view_of, {VIEWS})
"""


def published_project(folder: Path, spark: SparkSession, url: str) -> FeatureStore:
    """The project in an empty folder, built and materialized to this server."""
    texts = {
        "conf/base.yml": "project: bench\n",
        "conf/local.yml": f"online:\n  url: {url}\n",
        "feature_repo/definitions.py": _DEFINITIONS,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for number, view in enumerate(VIEWS):
        _write_source(folder / "data" / view, view, number)
    store = FeatureStore(folder, "local", spark=spark)
    store.apply()
    store.build(end=END)
    store.materialize(START - timedelta(days=1), END)
    return store


def _write_source(folder: Path, view: str, seed: int) -> None:
    folder.mkdir(parents=True)
    randomly = np.random.default_rng(seed)
    times = np.datetime64(START.replace(tzinfo=None), "us") + np.arange(USERS)
    columns = {"user_id": np.arange(USERS), "at": pa.array(times, pa.timestamp("us", tz="UTC"))}
    columns |= {f"{view}_{n}": randomly.random(USERS) for n in range(DOUBLES)}
    pq.write_table(pa.table(columns), folder / "part.parquet")

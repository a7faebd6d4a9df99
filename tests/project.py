"""A throw-away project: settings and definitions as text, and the feature store opened on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake import write_deltalake

from spark_fs import FeatureStore

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: Stands before all definitions, so that a test shows only what it is about.
_IMPORTS = """\
from datetime import timedelta

from spark_fs import DeltaSource, Entity, FeatureService, FeatureView, Field, FileSource, SparkSource
from spark_fs import Array, Bool, Bytes, Date, Decimal, Embedding, Float32, Float64, Int32, Int64, String, Timestamp

"""

_BASE = """\
project: shop
offline:
  buckets: 2
"""


def open_project(folder: Path, definitions: str, spark: SparkSession | None = None, *, settings: str = "") -> FeatureStore:
    """Write a project into ``folder`` and open it in the environment ``test``; nothing is applied yet.

    ``definitions`` is the text of ``feature_repo/definitions.py``, without imports: the classes of definitions, the
    value types and ``timedelta`` are there. ``settings`` is the text of ``conf/test.yml``, laid over a base with the project
    ``shop`` and 2 buckets; the registry is a SQLite file, and all that is written stays in ``folder``. Called again for the
    same folder, it replaces the texts and opens the project anew, with its registry and tables as they are.
    """
    write(folder / "conf" / "base.yml", _BASE)
    write(folder / "conf" / "test.yml", settings)
    # Python takes compiled code for up to date when size and second of change are equal: two versions in one test may be.
    shutil.rmtree(folder / "feature_repo" / "__pycache__", ignore_errors=True)
    write(folder / "feature_repo" / "definitions.py", _IMPORTS + dedent(definitions))
    return FeatureStore(folder, "test", spark=spark)


def write(file: Path, text: str) -> None:
    """Write a text file, with the folders that it needs; the text may be indented as the code around it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dedent(text), encoding="utf-8")


def write_delta(path: Path, columns: Mapping[str, pa.DataType], rows: Iterable[Sequence[Any]]) -> str:
    """Write the rows as the next version of a Delta table, columns replaced too, and return its path. Needs no Spark."""
    names = list(columns)
    records = [dict(zip(names, row, strict=True)) for row in rows]
    table = pa.Table.from_pylist(records, schema=pa.schema(list(columns.items())))
    write_deltalake(str(path), table, mode="overwrite", schema_mode="overwrite")
    return str(path)

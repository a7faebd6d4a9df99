"""Entity DataFrames from whatever a user has: a Spark or pandas DataFrame, SQL text, a path, a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyspark.sql import DataFrame, SparkSession

from spark_fs.errors import InvalidError, translate

if TYPE_CHECKING:
    import pandas


def read_spine(spark: SparkSession, entity_df: Any, resolve: Callable[[str], str]) -> tuple[DataFrame, str]:
    """The entity DataFrame, and what a person would call its origin.

    Text that begins with SELECT or WITH is SQL; text with a slash, or that names a folder or file, is a path (Delta where
    it has a _delta_log, else Parquet or CSV by its ending); other text is a table name. Raises InvalidError SFS-512 for
    something else or what cannot be read, SFS-506 for naive pandas timestamps.
    """
    if isinstance(entity_df, DataFrame):
        return entity_df, "Spark DataFrame"
    if isinstance(entity_df, str):
        try:
            return _read_text(spark, entity_df, resolve)
        except Exception as error:
            known = translate(error)
            why = known.problems[0].why if known else str(error).strip().splitlines()[0]
            raise InvalidError.of("SFS-512", "The entity DataFrame cannot be read.", why=why, where=entity_df) from error
    if hasattr(entity_df, "dtypes") and hasattr(entity_df, "itertuples"):
        _check_pandas(entity_df)
        # By way of Arrow, whatever the session's settings: without it instants go through the session's local time.
        return spark.createDataFrame(pyarrow.Table.from_pandas(entity_df, preserve_index=False)), "pandas DataFrame"
    raise InvalidError.of(
        "SFS-512",
        f"A {type(entity_df).__name__} cannot be an entity DataFrame.",
        fix="give a Spark or pandas DataFrame, SQL text, a path or a table name",
    )


def _read_text(spark: SparkSession, text: str, resolve: Callable[[str], str]) -> tuple[DataFrame, str]:
    if re.match(r"\s*(select|with)\b", text, re.IGNORECASE):
        return spark.sql(text), " ".join(text.split())
    path = resolve(text)
    if "/" not in text and not Path(path).exists():
        return spark.read.table(text), f"table {text}"
    if Path(path, "_delta_log").is_dir() or ("://" in path and not path.endswith((".parquet", ".csv"))):
        return spark.read.format("delta").load(path), text
    if path.endswith(".csv"):
        options = {"header": "true", "inferSchema": "true", "timeZone": "UTC"}
        return spark.read.options(**options).csv(path), text
    return spark.read.parquet(path), text


def _check_pandas(frame: pandas.DataFrame) -> None:
    naive = [str(name) for name, dtype in frame.dtypes.items() if str(dtype).startswith("datetime64") and "," not in str(dtype)]
    if naive:
        raise InvalidError.of(
            "SFS-506",
            f"The entity DataFrame has timestamps without a time zone: {', '.join(naive)}.",
            why="They name no instant.",
            fix=f"frame['{naive[0]}'] = frame['{naive[0]}'].dt.tz_localize('UTC'), or the zone they are in",
        )

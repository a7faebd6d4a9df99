"""What differs between two versions of a feature table: what is new to publish, and what is not true any more."""

from __future__ import annotations

from functools import reduce
from operator import and_

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.offline.compute import quoted
from spark_fs.spec import ViewSpec


def changes(view: ViewSpec, before: DataFrame, after: DataFrame) -> DataFrame:
    """The rows of ``after`` that ``before`` lacks or has with other values, and those of ``before`` that ``after`` lacks.

    Both have the columns of a feature table, in which (keys, event_timestamp, created_timestamp) is unique. So has the result,
    with ``_lost``: true for rows that are gone, of which only the keys and times are given. Rows that stayed as they were are
    left out whatever their ``_build``; values are compared as SQL does (0.0 is -0.0, NaN is NaN, null is null). One shuffle of
    both; starts no job.
    """
    identity = (*view.key_names, "event_timestamp", "created_timestamp")
    # Names of our own for the old side, so that no user's name needs quoting or can clash.
    old = before.select(
        *(quoted(name).alias(f"_before_key{n}") for n, name in enumerate(identity)),
        *(quoted(name).alias(f"_before_value{n}") for n, name in enumerate(view.feature_names)),
        F.lit(True).alias("_before"),
    )
    new = after.withColumn("_after", F.lit(True))
    met = reduce(and_, (quoted(name).eqNullSafe(F.col(f"_before_key{n}")) for n, name in enumerate(identity)))
    joined = new.join(old, met, "full_outer")
    equal = [quoted(name).eqNullSafe(F.col(f"_before_value{n}")) for n, name in enumerate(view.feature_names)]
    kept = reduce(and_, equal, F.col("_before").isNotNull() & F.col("_after").isNotNull())
    lost = F.col("_after").isNull()
    columns = [F.when(lost, F.col(f"_before_key{n}")).otherwise(quoted(name)).alias(name) for n, name in enumerate(identity)]
    rest = [quoted(name) for name in after.columns if name not in identity]
    return joined.where(~kept).select(*columns, *rest, lost.alias("_lost"))

"""What a leak does: the same features and model, once dated by arrival and once by planned departure.

A delay is known when the plane has landed. Whoever dates it by the planned departure, the column that is at hand, trains
on the future: the model looks better on paper and is worse in use. The later the question is asked, the more it hurts:
asked at the planned departure, the leaky features hold the very flight's own delay.

Run it as ``python feature_repo/demo/leak.py`` in the project folder, after ``prepare.py``. The wrong variant lives here
only; no view of feature_repo has it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from prepare import RAW
from spark_fs import FeatureStore, asof_join

if TYPE_CHECKING:
    import pandas

sys.path.insert(0, str(Path(__file__).parents[1]))

from arrivals import CARRIER_HOURS, ROUTE_HOURS, arrived_flights, recent_delays  # after the path to it

#: When the question is asked: seconds before the planned departure.
LEADS = {"an hour before departure": 3600, "at the planned departure": 0}
#: Half a year and one flight in so many: enough for stable figures, and quick.
FROM_MONTH, ONE_IN = 7, 6
#: Trained on the flights planned before, judged on those after.
SPLIT = "2013-10-01"


def measure_leak(spark: SparkSession, raw: Path = RAW) -> list[dict[str, object]]:
    """Areas under the ROC curve (0.5: guessing, 1: perfect), one row per moment of asking.

    ``honest``: dated by arrival. ``leaky_apparent``: dated by planned departure, judged on test rows with the same leak,
    as its author would. ``leaky_in_use``: the same model on what is really known by then. Starts Spark jobs.
    """
    flights = spark.read.format("delta").load(str(raw / "flights")).where(F.col("month") >= FROM_MONTH)
    spine = _questions(flights)
    used = ["tailnum", "carrier", "origin", "dest", "arr_delay", "arrived_at", "planned"]
    arrived = arrived_flights(flights).withColumn("planned", _planned()).select(*used).persist()  # read six times
    honest = _features(spine, arrived.drop("planned"))
    leaky = _features(spine, arrived.drop("arrived_at").withColumnRenamed("planned", "arrived_at"))
    arrived.unpersist()
    return [{"asked": asked, **_judge(honest, leaky, lead)} for asked, lead in LEADS.items()]


def _planned() -> Column:
    return F.timestamp_seconds(F.unix_seconds("time_hour") + 60 * F.col("minute"))


def _questions(flights: DataFrame) -> DataFrame:
    """A sample of the flights that left, once for each lead."""
    identity = F.xxhash64("carrier", "flight", "origin", "time_hour")
    lead = F.explode(F.array(*(F.lit(seconds) for seconds in LEADS.values())))
    return (
        flights.where(F.col("dep_delay").isNotNull() & (F.pmod(identity, F.lit(ONE_IN)) == 0))
        .withColumn("planned", _planned())
        .withColumn("lead", lead)
        .select(
            *("carrier", "tailnum", "origin", "dest", "planned", "lead", "hour", "distance"),
            F.timestamp_seconds(F.unix_seconds("planned") - F.col("lead")).alias("event_timestamp"),
            (F.col("dep_delay") > 15).alias("late"),
            identity.alias("id"),
        )
    )


def _features(spine: DataFrame, arrived: DataFrame) -> pandas.DataFrame:
    """The spine with the plane's last delay and the recent delays of carrier and route, as of ``arrived_at``.

    Sorted here, not in Spark, which would compute all of it once more to find the ranges.
    """
    planes = arrived.where(F.col("tailnum").isNotNull()).select("tailnum", "arrived_at", "arr_delay")
    joined = asof_join(spine, planes, "tailnum", event_time="arrived_at")
    for name, keys, hours in (("carrier", ["carrier"], CARRIER_HOURS), ("route", ["origin", "dest"], ROUTE_HOURS)):
        delays = recent_delays(arrived, keys, hours)
        joined = asof_join(joined, delays, keys, event_time="arrived_at", prefix=f"{name}_")
    found: pandas.DataFrame = joined.toPandas()
    return found.sort_values(["lead", "planned", "id"])


def _judge(honest: pandas.DataFrame, leaky: pandas.DataFrame, lead: int) -> dict[str, float]:
    honest, leaky = honest[honest["lead"] == lead], leaky[leaky["lead"] == lead]
    leaky_model = _train(leaky)
    return {
        "honest": _auc(_train(honest), honest),
        "leaky_apparent": _auc(leaky_model, leaky),
        "leaky_in_use": _auc(leaky_model, honest),
    }


def _train(rows: pandas.DataFrame) -> HistGradientBoostingClassifier:
    """A model of the flights before ``SPLIT``."""
    train = rows[rows["planned"] < SPLIT]
    return HistGradientBoostingClassifier(max_iter=60, random_state=0).fit(_inputs(train), train["late"])


def _auc(model: HistGradientBoostingClassifier, rows: pandas.DataFrame) -> float:
    """How well the model ranks the flights from ``SPLIT`` on."""
    test = rows[rows["planned"] >= SPLIT]
    return round(float(roc_auc_score(test["late"], model.predict_proba(_inputs(test))[:, 1])), 3)


def _inputs(rows: pandas.DataFrame) -> pandas.DataFrame:
    others = {"carrier", "tailnum", "origin", "dest", "planned", "lead", "event_timestamp", "late", "id"}
    return rows[[name for name in rows.columns if name not in others]].astype(float)


def report(rows: list[dict[str, object]]) -> str:
    """The figures as a table."""
    lines = [f"{'asked':28}{'honest':>10}{'leaky, apparent':>18}{'leaky, in use':>16}"]
    lines += [f"{row['asked']:28}{row['honest']:>10}{row['leaky_apparent']:>18}{row['leaky_in_use']:>16}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    store = FeatureStore(".")
    print(report(measure_leak(store.spark)))
    store.spark.stop()

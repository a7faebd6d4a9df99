"""The worked example as a person runs it: twice, in a project of its own, and its outputs read without Spark."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.online import server

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "feature_repo" / "demo"))

from spine import spine  # noqa: E402  # a script of the example, not a package


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the example with the Delta jars, nothing applied or built."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("conf", "feature_repo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".spark_fs" / "jars", folder / ".spark_fs" / "jars")
    yield folder
    server.stop(folder / ".spark_fs")


def script(project: Path, name: str) -> str:
    done = subprocess.run(
        [sys.executable, f"feature_repo/demo/{name}.py"], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def first_run(project: Path) -> str:
    return script(project, "run")


def test_the_first_run_goes_from_definitions_to_values_online(first_run: str) -> None:
    """19 objects are applied, 7 views built, every departure of the year is in the training set, values are published."""
    assert "Applied: 19 to add" in first_run
    assert len(re.findall(r"@1 +beginning → 2014-01-02T00:00:00Z +1 +1 ", first_run)) == 7
    assert re.search(r"rows +328521", first_run)
    assert re.search(r"carrier_recent_delays@1 .* 310,818 +16 +0 +0 +0", first_run)


def test_online_values_are_those_of_the_feature_tables(first_run: str) -> None:
    """Every feature of the service is equal, for both flights."""
    assert "All 23 features are equal, for both flights." in first_run


def test_the_leak_makes_a_model_look_better_than_it_is(first_run: str) -> None:
    """Dated by departure, delays promise at least 0.2 more than honest ones, and give at least 0.2 less than promised."""
    (found,) = re.findall(r"at the planned departure +([\d.]+) +([\d.]+) +([\d.]+)", first_run)
    honest, apparent, in_use = map(float, found)
    assert apparent > honest + 0.2
    assert in_use < apparent - 0.2


def test_the_outputs_are_read_without_spark(project: Path, first_run: str) -> None:
    """The script of a data scientist: training set and feature tables with deltalake and polars."""
    told = script(project, "read_outputs")
    assert "delays@1: 328,521 rows" in told
    assert "rows to train on" in told


def test_both_strategies_give_the_same_training_set(spark: SparkSession, project: Path, first_run: str) -> None:
    """Over all 328,521 flights and seven views: the join where rows lie and the window agree in every value."""
    store = FeatureStore(project, "local", spark=spark)
    found = {}
    for strategy in ("colocated", "window"):
        entities = spine(project / ".spark_fs" / "raw")
        job = store.get_historical_features(entities, "departure_delay_v1", full_feature_names=True, strategy=strategy)
        assert {group.strategy for group in job.plan.groups} == {strategy}
        joined = job.to_arrow()
        found[strategy] = joined.sort_by([(name, "ascending") for name in joined.column_names])
    assert found["colocated"].num_rows == 328_521
    assert found["colocated"].equals(found["window"])


def test_a_second_run_does_only_what_is_left(project: Path, first_run: str) -> None:
    """Nothing is prepared, applied, built, saved or sent again."""
    again = script(project, "run")
    assert "there already, left as it is" in again
    assert "no changes" in again
    assert "Every view is built up to 2014-01-02 already" in again
    assert "It is saved already" in again
    assert re.search(r"carrier_recent_delays@1 .* +0 +0 +0 +0 +0 +0 ", again)

"""One cluster and one driver on it for the whole folder; each test has a project and a server of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from tests.faults.cluster import Cluster, running_cluster
from tests.faults.shop import Shop, built_template, open_shop


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A master and two workers."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def template(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """A shop with a feature table and nothing published; its driver serves all tests."""
    if SparkSession.getActiveSession() is not None:
        pytest.fail("this process has a local Spark already; run these tests by themselves: make test-faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)  # else workers start whichever python is first on the path
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.delenv("SPARK_HOME", raising=False)
        fs = built_template(tmp_path_factory.mktemp("template"), cluster)
        yield fs
        fs.spark.stop()


@pytest.fixture
def shop(cluster: Cluster, template: FeatureStore, tmp_path: Path) -> Iterator[Shop]:
    """A shop with nothing online."""
    with open_shop(tmp_path, template, cluster) as opened:
        yield opened

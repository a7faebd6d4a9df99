"""All saved datasets of a project: found, compared, verified, made again, deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession

from spark_fs.datasets.dataset import Dataset
from spark_fs.datasets.manifest import Manifest, read_manifest
from spark_fs.datasets.origins import OfflineStore
from spark_fs.datasets.verify import Verdict, verify_dataset
from spark_fs.registry import Registry


class Datasets:
    """The saved datasets of a project. ``offline`` is asked for only where Spark is needed."""

    def __init__(self, registry: Registry, offline: Callable[[], OfflineStore], spark: SparkSession | None) -> None:
        self._registry, self._offline, self._spark = registry, offline, spark

    def list(self) -> list[dict[str, Any]]:
        """The manifests of all versions of all datasets, as JSON values, by name and version."""
        return self._registry.datasets()

    def get(self, name: str, version: int | None = None) -> Dataset:
        """A version of a dataset (default: its newest). Reading it needs no Spark. Raises SFS-303 where there is none."""
        return Dataset(self._manifest(name, version), self._spark)

    def verify(self, name: str, version: int | None = None, *, recompute: bool = True) -> Verdict:
        """Whether a dataset is what its manifest signs, and comes out the same when it is joined again; see ``Verdict``.

        Without ``recompute`` only the stored rows are compared with the manifest. Changes nothing.
        """
        return verify_dataset(self._offline(), self._manifest(name, version), recompute=recompute)

    def _manifest(self, name: str, version: int | None = None) -> Manifest:
        return read_manifest(self._registry.require_dataset(name, version))

"""All saved datasets of a project: found, verified, compared, deleted. Finding and reading them needs no Spark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spark_fs.datasets.dataset import Dataset
from spark_fs.datasets.manifest import Manifest, read_manifest
from spark_fs.registry import Registry

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_fs.datasets.diff import DatasetDiff
    from spark_fs.datasets.origins import OfflineStore
    from spark_fs.datasets.verify import Verdict


class Datasets:
    """The saved datasets of a project. ``offline`` is asked for only where Spark is needed."""

    def __init__(self, registry: Registry, offline: Callable[[], OfflineStore], spark: SparkSession | None) -> None:
        self._registry, self._offline, self._spark = registry, offline, spark

    def list(self) -> list[dict[str, Any]]:
        """The manifests of all versions of all datasets, as JSON values, by name and version."""
        return self._registry.datasets.all()

    def get(self, name: str, version: int | None = None) -> Dataset:
        """A version of a dataset (default: its newest). Reading it needs no Spark. Raises SFS-303 where there is none."""
        return Dataset(self._manifest(name, version), self._spark)

    def verify(self, name: str, version: int | None = None, *, recompute: bool = True) -> Verdict:
        """Whether a dataset is what its manifest signs, and comes out the same when it is joined again; see ``Verdict``.

        Without ``recompute`` only the stored rows are compared with the manifest. Changes nothing.
        """
        from spark_fs.datasets.verify import verify_dataset

        return verify_dataset(self._offline(), self._manifest(name, version), recompute=recompute)

    def diff(self, name: str, old: int, new: int | None = None) -> DatasetDiff:
        """What version ``new`` (default: the newest) of a dataset has otherwise than ``old``; see ``DatasetDiff``."""
        from spark_fs.datasets.diff import diff_datasets

        store, manifests = self._offline(), [self._manifest(name, version) for version in (old, new)]
        before, after = ((each, store.dataset(name).read(each.committed)) for each in manifests)
        return diff_datasets(before, after)

    def delete(self, name: str, version: int) -> Manifest:
        """Forget a version of a dataset and delete its rows; its number is not given again. Returns its manifest.

        The newest version may be deleted too. Raises SFS-303 where there is none.
        """
        manifest = self._manifest(name, version)
        self._offline().dataset(name).delete(manifest)
        self._registry.datasets.forget(name, version)
        return manifest

    def _manifest(self, name: str, version: int | None = None) -> Manifest:
        return read_manifest(self._registry.datasets.require(name, version))

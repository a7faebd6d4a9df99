"""spark_fs: a feature store for Spark, Delta Lake and Redis.

The public names, loaded when first used: importing the package loads neither pyspark nor redis.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_fs.definitions import (
        DeltaSource,
        Entity,
        FeatureService,
        FeatureView,
        Field,
        FileSource,
        SparkSource,
    )
    from spark_fs.errors import SparkFSError
    from spark_fs.offline.asof import asof_join
    from spark_fs.store import FeatureStore
    from spark_fs.types import (
        Array,
        Bool,
        Bytes,
        Date,
        Decimal,
        Embedding,
        Float32,
        Float64,
        Int32,
        Int64,
        String,
        Timestamp,
    )

_HOME = {
    "spark_fs.definitions": "DeltaSource Entity FeatureService FeatureView Field FileSource SparkSource",
    "spark_fs.errors": "SparkFSError",
    "spark_fs.offline.asof": "asof_join",
    "spark_fs.store": "FeatureStore",
    "spark_fs.types": "Array Bool Bytes Date Decimal Embedding Float32 Float64 Int32 Int64 String Timestamp",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Array",
    "Bool",
    "Bytes",
    "Date",
    "Decimal",
    "DeltaSource",
    "Embedding",
    "Entity",
    "FeatureService",
    "FeatureStore",
    "FeatureView",
    "Field",
    "FileSource",
    "Float32",
    "Float64",
    "Int32",
    "Int64",
    "SparkFSError",
    "SparkSource",
    "String",
    "Timestamp",
    "asof_join",
]

try:
    __version__ = version("spark-fs")
except PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'spark_fs' has no attribute '{name}'")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

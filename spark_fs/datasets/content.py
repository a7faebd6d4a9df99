"""The checksum of rows: equal for equal rows, whatever their order, their partitions and the engine that wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, MapType, StructType, VariantType

from spark_fs.offline.compute import quoted

#: So many flags fit into one bigint.
_FLAGS = 63


def row_digest(schema: StructType, names: Sequence[str]) -> Column:
    """A 64-bit number of a row's values in these columns, as bigint; columns count in the order given, not by name.

    xxHash64 as Spark has it: integers, floats (all NaN alike, -0.0 as 0.0), decimals, dates and instants by value, texts and
    bytes by their bytes. Nulls count by their place. Arrays count element by element in order, maps as sets of entries,
    structs field by field, variants as JSON text. Equal rows have equal digests; columns of other types (int for bigint) or
    decimals of another scale may give others.
    """
    return _digest([(quoted(name), schema[name].dataType) for name in names])


def _digest(values: Sequence[tuple[Column, DataType]]) -> Column:
    """xxHash64 passes nulls over, so that where they were is put in at the end."""
    parts = [part for column, kind in values for part in _parts(column, kind)]
    nulls = [column.isNull() for column, _ in values]
    flags = [
        reduce(add, (F.when(flag, F.lit(1 << place)).otherwise(F.lit(0)) for place, flag in enumerate(nulls[start:][:_FLAGS])))
        for start in range(0, len(nulls), _FLAGS)
    ]
    return F.xxhash64(*parts, *(flag.cast("bigint") for flag in flags), F.lit(len(values)))


def _parts(column: Column, kind: DataType) -> list[Column]:
    """What of a value is hashed; one number for what has several, so that it cannot run into what comes after it."""
    if isinstance(kind, StructType):
        return [_digest([(column.getField(field.name), field.dataType) for field in kind.fields])]
    if isinstance(kind, ArrayType):
        if isinstance(kind.elementType, (StructType, ArrayType, MapType, VariantType)):
            return [F.xxhash64(F.transform(column, lambda item: _digest([(item, kind.elementType)])), F.size(column))]
        # All elements at once, by the JVM's own loop; one by one only where some are null.
        nulls = F.when(F.exists(column, lambda item: item.isNull()), F.transform(column, lambda item: item.isNull()))
        return [F.xxhash64(column, F.size(column), F.xxhash64(nulls, F.lit("nulls")))]
    if isinstance(kind, MapType):
        entry = [("key", kind.keyType), ("value", kind.valueType)]
        digests = F.transform(F.map_entries(column), lambda item: _digest([(item.getField(name), of) for name, of in entry]))
        return [F.xxhash64(F.array_sort(digests), F.size(column))]
    if isinstance(kind, VariantType):
        return [F.to_json(column)]
    return [column]


def checksum_measures(digest: Column, name: str) -> list[Column]:
    """Aggregates from which ``checksum`` makes the sum of a digest over all rows modulo 2^64; exact up to 2^31 rows."""
    low, high = digest.bitwiseAND(F.lit((1 << 32) - 1)), F.shiftrightunsigned(digest, 32)
    return [F.sum(low).alias(f"{name}_low"), F.sum(high).alias(f"{name}_high")]


def checksum(counts: Mapping[str, Any], name: str) -> str:
    """The checksum as 16 hexadecimal digits, of what ``checksum_measures`` counted."""
    low, high = (int(counts[f"{name}_{half}"] or 0) for half in ("low", "high"))
    return f"{(low + (high << 32)) % 2**64:016x}"


def content_measures(schema: StructType, columns: Sequence[str], spine_columns: Sequence[str]) -> list[Column]:
    """Aggregates over a dataset's rows: ``rows``, two checksums (``content``, ``spine``), and ``nulls_<n>`` of each column."""
    return [
        F.count(F.lit(1)).alias("rows"),
        *checksum_measures(row_digest(schema, columns), "content"),
        *checksum_measures(row_digest(schema, spine_columns), "spine"),
        *(F.count_if(quoted(name).isNull()).alias(f"nulls_{n}") for n, name in enumerate(columns)),
    ]

"""A spine in plain Parquet files, read by the driver without a Spark job: its rows, and the residues of its keys.

Spark takes a quarter of a second to bring a million rows of three columns to Python; Arrow reads them in a tenth of that. It
is done only where both give the same values, which is checked: anything else is left to Spark.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema

from spark_fs.files import open_file
from spark_fs.key_bytes import key_column
from spark_fs.offline.blocks import Integers
from spark_fs.offline.colocated import NO_RESIDUE

_PARQUET = "org.apache.spark.sql.execution.datasources.parquet.ParquetFileFormat"
#: Before it Spark may move dates and instants, by the calendar of the file's writer. In days and in microseconds.
_OLDEST_DAY = -25_567
_OLDEST_MICROS = _OLDEST_DAY * 86_400_000_000


def read_plain_files(spine: DataFrame) -> pa.Table | None:
    """The rows of a DataFrame that is nothing but whole Parquet files, with its columns; None where that is not certain.

    Not so with filters, computed or partition columns, read options, other formats, columns whose type in a file is not
    exactly the DataFrame's, or times before 1900.
    """
    try:
        files = _files(spine)
        if not files:
            return None
        wanted = to_arrow_schema(spine.schema, timezone="UTC")
        whole = pa.concat_tables([_read(file, wanted) for file in files])
    except Exception:  # noqa: BLE001  # whatever it is, Spark finds it too, and says it better
        return None
    return None if any(map(_may_be_moved, whole.columns)) else whole


def _files(spine: DataFrame) -> list[str]:
    """The files, if the DataFrame's plan is one scan of all their rows and columns."""
    try:
        plan = spine._jdf.queryExecution().optimizedPlan()
    except PySparkException:  # Spark Connect shows no plan
        return []
    if str(plan.nodeName()) != "LogicalRelation":
        return []
    relation = plan.relation()
    if (
        str(relation.getClass().getSimpleName()) != "HadoopFsRelation"
        or str(relation.fileFormat().getClass().getName()) != _PARQUET
    ):
        return []
    if not relation.partitionSchema().isEmpty() or set(_names(relation.options())) - {"path"}:
        return []
    return [str(file) for file in relation.location().inputFiles()]


def _names(options: object) -> list[str]:
    return [str(name) for name in options.keySet().mkString("\n").splitlines()]  # type: ignore[attr-defined]


def _read(file: str, wanted: pa.Schema) -> pa.Table:
    """The file's rows; ValueError where it has other columns than wanted, or other types, in any order."""
    with open_file(file) as stream:
        parquet = pq.ParquetFile(stream)
        found = parquet.schema_arrow
        if sorted(found.names) != sorted(wanted.names) or any(found.field(field.name).type != field.type for field in wanted):
            raise ValueError(f"{file} is not as Spark has it")
        return parquet.read().select(wanted.names).replace_schema_metadata(None)


def _may_be_moved(column: pa.ChunkedArray) -> bool:
    kind = column.type
    if pa.types.is_nested(kind):
        return True
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return False
    least = pc.min(column.cast(pa.int32() if pa.types.is_date(kind) else pa.int64())).as_py()
    return least is not None and least < (_OLDEST_DAY if pa.types.is_date(kind) else _OLDEST_MICROS)


def residues_of(columns: Sequence[pa.ChunkedArray], modulus: int) -> Integers:
    """What ``compute.key_residue`` gives for keys in these columns, one or more; NO_RESIDUE where a part is null."""
    arrays = [pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type) for column in columns]
    if len(arrays) > 1:
        return _checksums(key_column(arrays, len(arrays[0])), modulus)
    # A key mostly comes many times.
    encoded = arrays[0].dictionary_encode()
    of_distinct = np.append(_checksums(key_column([encoded.dictionary], len(encoded.dictionary)), modulus), NO_RESIDUE)
    found: Integers = of_distinct[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return found


def _checksums(texts: pa.LargeBinaryArray, modulus: int) -> Integers:
    numbers = np.fromiter((-1 if text is None else zlib.crc32(text) for text in texts.to_pylist()), np.int64, len(texts))
    found: Integers = np.where(numbers < 0, NO_RESIDUE, numbers % modulus)
    return found

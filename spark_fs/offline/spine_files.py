"""A spine in plain Parquet files, read by the driver without a Spark job: its rows, and the residues of its keys.

Spark takes a quarter of a second to bring a million rows of three columns to Python; Arrow reads them in a tenth of that. It
is done only where both give the same values, which is checked: anything else is left to Spark.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

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
#: More files than so are left to Spark: the driver opens them one after the other, tasks do so side by side.
MOST_FILES = 64
#: Rows decoded at a time, so that rows which take much more memory than in their file are noticed.
_BATCH_ROWS = 8 * 1024
#: Before it Spark may move dates and instants, by the calendar of the file's writer. In days and in microseconds.
_OLDEST_DAY = -25_567
_OLDEST_MICROS = _OLDEST_DAY * 86_400_000_000


class LargeSpineError(Exception):
    """The files hold more than is to be read."""


def read_plain_files(spine: DataFrame, most_bytes: int) -> pa.Table | None:
    """The rows of a DataFrame that is nothing but whole Parquet files, with its columns; None where that is not certain.

    Not so with filters, computed or partition columns, read options, other formats, columns whose type in a file is not
    exactly the DataFrame's, times before 1900, or more than ``MOST_FILES`` files.

    Raises LargeSpineError for more than ``most_bytes`` in Arrow: by the files' footers, before a row is decoded, where they
    tell; else as soon as so much is decoded, at most ``_BATCH_ROWS`` rows too late.
    """
    try:
        files = _files(spine)
        if not 0 < len(files) <= MOST_FILES:
            return None
        wanted = to_arrow_schema(spine.schema, timezone="UTC")
        with ExitStack() as opened:
            parquets = [_open(file, wanted, opened) for file in files]
            if sum(_least_bytes(parquet, wanted) for parquet in parquets) > most_bytes:
                raise LargeSpineError
            batches = list(_up_to(most_bytes, (batch for parquet in parquets for batch in parquet.iter_batches(_BATCH_ROWS))))
        # Each file says for itself whether values may be null.
        schema = pa.schema([(field.name, field.type) for field in wanted])
        alike = [pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema) for batch in batches]
        whole = pa.Table.from_batches(alike, schema)
    except LargeSpineError:
        raise
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


def _open(file: str, wanted: pa.Schema, opened: ExitStack) -> pq.ParquetFile:
    """The file, its footer read; ValueError where it has other columns than wanted, or other types, in any order."""
    parquet = pq.ParquetFile(opened.enter_context(open_file(file)))
    found = parquet.schema_arrow
    if sorted(found.names) != sorted(wanted.names) or any(found.field(field.name).type != field.type for field in wanted):
        raise ValueError(f"{file} is not as Spark has it")
    return parquet


def _least_bytes(parquet: pq.ParquetFile, wanted: pa.Schema) -> int:
    """What the file's rows take in Arrow at least, by its footer.

    Values of a fixed width take that, however well they were packed. Others take no less than an offset each.
    """
    widths = [field.type.bit_width if _has_width(field.type) else 32 for field in wanted]
    return int(parquet.metadata.num_rows) * sum(widths) // 8


def _has_width(kind: pa.DataType) -> bool:
    try:
        return bool(kind.bit_width)
    except ValueError:
        return False


def _up_to(most_bytes: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches; LargeSpineError once they take more."""
    for batch in batches:
        most_bytes -= batch.nbytes
        if most_bytes < 0:
            raise LargeSpineError
        yield batch


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

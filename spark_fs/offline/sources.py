"""Reading of sources: files, tables, queries, databases; and how a source tells whether it has changed, and how large it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession

from spark_fs.config import resolve_variables
from spark_fs.errors import InvalidError, SparkFSError, translate, without_secrets
from spark_fs.files import listing_digest
from spark_fs.spec import SourceSpec

#: Options with which a reader does not take clock times to be in the session's zone: text without a zone is UTC, and a
#: database's column without one stays so, for the source to declare its zone.
_NO_SESSION_ZONE = {
    "csv": {"timeZone": "UTC"},
    "json": {"timeZone": "UTC"},
    "xml": {"timeZone": "UTC"},
    "jdbc": {"preferTimestampNTZ": "true"},
}
#: How the state of a Delta source begins.
_DELTA_STATE = "Delta version "
#: The size in bytes that Spark gives to what it knows nothing of.
_SIZE_UNKNOWN = 2**63 - 1


def read_source(spark: SparkSession, source: SourceSpec, location: str | None = None, version: int | None = None) -> DataFrame:
    """The source's rows, unfiltered; for Delta pinned to a version (default: its newest). ``location``: its absolute path.

    ``${VARIABLE}`` in options is taken from this process's environment; SFS-204 if it is not set. A source that cannot be
    read is InvalidError SFS-401.
    """
    with _naming(source):
        return _read(spark, source, location, version)


@contextmanager
def _naming(source: SourceSpec) -> Iterator[None]:
    """Turn whatever goes wrong in the block into an error that names the source."""
    try:
        yield
    except SparkFSError:
        raise
    except Exception as error:
        ours = translate(error)
        if ours is None:
            ours = InvalidError.of("SFS-401", "A source cannot be read.", why=_why(error))
        problem = ours.problems[0]
        raise InvalidError.of(
            problem.code,
            f"Source '{source.name}' cannot be read.",
            why=problem.why,
            where=source.location,
            fix=problem.fix,
        ) from error


def _why(error: BaseException) -> str:
    """What the error says, and what the one at its root says: a driver's own words are often only there."""
    root = error
    # pyspark keeps the JVM's causes in an attribute of its own.
    while (cause := getattr(root, "_cause", None) or root.__cause__) is not None:
        root = cause
    lines = [next(iter(str(each).strip().splitlines()), type(each).__name__) for each in (error, root)]
    return without_secrets(" ".join(dict.fromkeys(lines)))


def _read(spark: SparkSession, source: SourceSpec, location: str | None, version: int | None) -> DataFrame:
    path = location or source.path
    options = _resolved(source)
    if source.kind == "delta":
        at = _newest_version(spark, source, path) if version is None else version
        pinned = spark.read.option("versionAsOf", at)
        return pinned.table(source.table) if source.table else pinned.format("delta").load(path)
    if source.kind == "file":
        schema = options.pop("schema", None)
        reader = spark.read.format(source.format or "parquet").options(**options)
        return (reader.schema(schema) if schema else reader).load(path)
    if source.table:
        return spark.read.options(**options).table(source.table)
    if source.query:
        return spark.sql(source.query)
    assert source.format is not None
    return spark.read.format(source.format).options(**options).load()


def _resolved(source: SourceSpec) -> dict[str, str]:
    try:
        given = {option: resolve_variables(value, os.environ) for option, value in source.options.items()}
    except KeyError as error:
        raise InvalidError.of(
            "SFS-204",
            f"Source '{source.name}' needs the variable {error.args[0]}, which is not set.",
            where=source.name,
            fix=f"export {error.args[0]}=… where the job runs",
        ) from None
    return {**_NO_SESSION_ZONE.get(source.format or "", {}), **given}


def source_state(spark: SparkSession, source: SourceSpec, location: str | None = None) -> str | None:
    """A text that differs whenever the source's rows may; None where that cannot be told cheaply (JDBC, queries …)."""
    with _naming(source):
        return _state(spark, source, location or source.path)


def _state(spark: SparkSession, source: SourceSpec, path: str | None) -> str | None:
    if source.kind == "delta":
        return f"{_DELTA_STATE}{_newest_version(spark, source, path)}"
    if source.kind != "file" or path is None:
        return None
    return listing_digest(path)


def _newest_version(spark: SparkSession, source: SourceSpec, path: str | None) -> int:
    if source.table:
        return version_of(DeltaTable.forName(spark, source.table).history(1))
    return table_version(spark, str(path))


def version_in_state(state: str | None) -> int | None:
    """The version of a Delta source that a text of ``source_state`` names; None where it names none."""
    return int(state.removeprefix(_DELTA_STATE)) if state and state.startswith(_DELTA_STATE) else None


def table_version(spark: SparkSession, path: str) -> int:
    """The newest version of the Delta table at ``path``."""
    return version_of(DeltaTable.forPath(spark, path).history(1))


def version_of(history: DataFrame) -> int:
    """The version of the newest entry of a Delta table's history."""
    commit = history.select("version").first()
    assert commit is not None  # a Delta table has at least one version
    return int(commit["version"])


def source_bytes(frame: DataFrame) -> int | None:
    """About how many bytes the sources of ``frame`` hold, as Spark's planner has it; None where it cannot tell (JDBC …).

    Starts no job.
    """
    leaves = frame._jdf.queryExecution().optimizedPlan().collectLeaves()
    sizes = [int(leaves.apply(n).stats().sizeInBytes()) for n in range(leaves.size())]
    # What has no size of its own is given the greatest that there is, so that it is never broadcast.
    return None if any(size >= _SIZE_UNKNOWN for size in sizes) else sum(sizes)

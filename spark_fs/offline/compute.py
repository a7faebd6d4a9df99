"""Source rows → feature rows: pure functions DataFrame → DataFrame. No reads, writes, actions or settings here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.intervals import BEGINNING, Interval, to_micros
from spark_fs.spec import Column, SourceSpec, ViewSpec

#: Function DataFrame → DataFrame of a feature view.
Transform = Callable[[DataFrame], DataFrame]

#: Time types that name no instant by themselves: their source must declare a zone.
_ZONELESS = ("timestamp_ntz", "string", "date")


def feature_frame(view: ViewSpec, source: DataFrame, transform: Transform | None = None) -> DataFrame:
    """The view's rows: (join keys …, event_timestamp, created_timestamp, features …), typed as declared.

    Applies ``field_mapping``, then the transformation (``transform`` is the function of a view that has one). One row per
    transformed source row, rows with null keys or times included (see ``acceptable``). created_timestamp is null where the
    source has none. Starts no job. Raises InvalidError with every column that is missing (SFS-402) or has a type whose
    values would not fit without loss (SFS-403).
    """
    renamed = _rename(view.source, source)
    frame = _transformed(view, renamed, transform)
    _check_columns(view, frame)
    times = [_instant(frame, view.source.timestamp_field, view.source).alias("event_timestamp")]
    created = view.source.created_timestamp_field
    times.append(
        (_instant(frame, created, view.source) if created else F.lit(None).cast("timestamp")).alias("created_timestamp")
    )
    keys = [quoted(key.name).cast(key.type.spark).alias(key.name) for key in view.keys]
    return frame.select(*keys, *times, *(_value(feature) for feature in view.features))


def acceptable(view: ViewSpec) -> SparkColumn:
    """True for rows that a feature view may hold: no join key and no event time is null."""
    condition = F.col("event_timestamp").isNotNull()
    for name in view.key_names:
        condition = condition & quoted(name).isNotNull()
    return condition


def within(interval: Interval, column: str = "event_timestamp") -> SparkColumn:
    """True for rows whose time lies in the half-open interval; exact whatever the session's time zone."""
    before_end = F.col(column) < instant_literal(interval.end)
    if interval.start == BEGINNING:
        return before_end
    return (F.col(column) >= instant_literal(interval.start)) & before_end


def settle(view: ViewSpec, frame: DataFrame, buckets: int) -> DataFrame:
    """The rows of a feature table: one per (keys, event_timestamp, created_timestamp), with their ``_bucket``.

    Of tied rows the one with the greatest row hash stays. The result is partitioned by bucket and sorted inside by
    (keys, event_timestamp, created_timestamp): one shuffle and one sort, which the write then needs no more.
    """
    identity = [quoted(name) for name in (*view.key_names, "event_timestamp", "created_timestamp")]
    hashed = frame.withColumn("_hash", row_hash(view.feature_names)).withColumn("_bucket", bucket_of(view.keys, buckets))
    spread = hashed.repartition(buckets, "_bucket")
    order = Window.partitionBy("_bucket", *identity[: len(view.keys)]).orderBy(*identity[len(view.keys) :], F.col("_hash"))
    last = F.lead(F.struct("event_timestamp", "created_timestamp")).over(order)
    # `<=>`: two null created times are a tie; no next row is null as a whole, hence the separate test.
    tied = last.isNotNull() & last.eqNullSafe(F.struct("event_timestamp", "created_timestamp"))
    return spread.withColumn("_tied", tied).where(~F.col("_tied")).drop("_tied", "_hash")


def bucket_of(keys: Sequence[Column], buckets: int) -> SparkColumn:
    """The bucket of a row: CRC-32 of its key bytes modulo ``buckets``."""
    return key_residue([(quoted(key.name), key.type.spark) for key in keys], buckets)


def key_residue(keys: Sequence[tuple[SparkColumn, str]], modulus: int) -> SparkColumn:
    """What ``bucket_of`` gives, for keys as columns with their Spark types; null where any key is null."""
    return F.pmod(F.crc32(joined_bytes([key_text(column, type_) for column, type_ in keys])), F.lit(modulus)).cast("int")


def row_hash(value_columns: Sequence[str]) -> SparkColumn:
    """The last tie-break between rows of equal keys and times: xxHash64 over all value columns in the order of their names."""
    if not value_columns:
        return F.lit(0).cast("bigint")
    return F.xxhash64(*(quoted(name) for name in sorted(value_columns)))


def key_bytes(keys: Sequence[Column]) -> SparkColumn:
    """The key as bytes: one key is its text; several are each ``<byte length>:<text>``; none is empty.

    Null where any key is null. ``online.codec.key_bytes`` gives the same bytes for the same Python values.
    """
    return joined_bytes([key_text(quoted(key.name), key.type.spark) for key in keys])


def joined_bytes(texts: Sequence[SparkColumn]) -> SparkColumn:
    """The bytes of several key columns as one, told apart by their lengths; null where one of them is."""
    if not texts:
        return F.lit(b"")
    if len(texts) == 1:
        return texts[0]
    lengths = [F.encode(F.octet_length(text).cast("string"), "UTF-8") for text in texts]
    return F.concat(*(F.concat(length, F.lit(b":"), text) for length, text in zip(lengths, texts, strict=True)))


def key_text(column: SparkColumn, spark_type: str) -> SparkColumn:
    """One key column as bytes: its text, times as microseconds and dates as days since 1970; null where it is."""
    if spark_type == "binary":
        return column
    if spark_type == "timestamp":
        column = F.unix_micros(column)
    elif spark_type == "date":
        column = F.unix_date(column)
    return column.cast("string").cast("binary")


def instant_literal(instant: datetime) -> SparkColumn:
    """The instant as a column; exact whatever the session's time zone."""
    return F.timestamp_micros(F.lit(to_micros(instant)))


def quoted(name: str) -> SparkColumn:
    """The column of exactly this name, whatever characters it holds."""
    return F.col("`" + name.replace("`", "``") + "`")


def _rename(source: SourceSpec, frame: DataFrame) -> DataFrame:
    missing = [name for name in source.field_mapping if name not in frame.columns]
    if missing:
        raise InvalidError(
            *(
                Problem(
                    "SFS-402",
                    f"Source '{source.name}' has no column '{name}', which field_mapping renames.",
                    did_you_mean(name, frame.columns),
                    source.location,
                )
                for name in missing
            )
        )
    return frame.withColumnsRenamed(dict(source.field_mapping))


def _transformed(view: ViewSpec, frame: DataFrame, transform: Transform | None) -> DataFrame:
    if view.transformation is None:
        return frame
    if view.transformation.kind == "sql":
        return frame.sparkSession.sql(view.transformation.text, source=frame)
    if transform is None:
        raise InvalidError.of(
            "SFS-405",
            f"The transformation of feature view '{view.reference}' is a function that is not at hand.",
            why=f"It was applied from {view.transformation.function}.",
            fix="run in the project folder with the repository as it was applied, or apply the repository",
        )
    return transform(frame)


def _check_columns(view: ViewSpec, frame: DataFrame) -> None:
    """Refuse before anything runs: every declared column must be there, with a type that fits without loss."""
    found = {field.name: field.dataType.simpleString() for field in frame.schema.fields}
    source = view.source
    what = f"source '{source.name}'" if view.transformation is None else f"the transformation of source '{source.name}'"
    times = [name for name in (source.timestamp_field, source.created_timestamp_field) if name]
    problems = [
        Problem(
            "SFS-402",
            f"Feature view '{view.name}' needs column '{name}', but {what} does not give it.",
            did_you_mean(name, found),
            source.location,
            "mend the source, or the definition and apply it",
        )
        for name in (*times, *view.key_names, *view.feature_names)
        if name not in found
    ]
    problems += [
        Problem(
            "SFS-403",
            f"Column '{column.name}' of feature view '{view.name}' is declared {column.type}, "
            f"but {what} gives {found[column.name]}.",
            "Its values would not all fit without loss.",
            source.location,
            "cast it in a transformation, or change the definition and apply it",
        )
        for column in (*view.keys, *view.features)
        if column.name in found and not column.type.accepts(found[column.name])
    ]
    problems += [
        _time_problem(view, name, found[name]) for name in times if name in found and not _tells_time(found[name], source)
    ]
    if problems:
        raise InvalidError(*problems)


def _tells_time(spark_type: str, source: SourceSpec) -> bool:
    return spark_type == "timestamp" or (spark_type in _ZONELESS and source.timezone is not None)


def _time_problem(view: ViewSpec, name: str, spark_type: str) -> Problem:
    zoneless = spark_type in _ZONELESS
    return Problem(
        "SFS-406",
        f"Time column '{name}' of feature view '{view.name}' is a {spark_type}.",
        "It names no instant without a time zone." if zoneless else "A timestamp is needed.",
        view.source.location,
        f"declare timezone=… on source '{view.source.name}'" if zoneless else "convert it in a transformation",
    )


def _instant(frame: DataFrame, name: str, source: SourceSpec) -> SparkColumn:
    """The column as an instant. Local times: the earlier offset where a clock time happens twice, moved on where it is skipped.

    Goes through text with the zone's name, which Spark reads the same under every session time zone.
    """
    spark_type = frame.schema[name].dataType.simpleString()
    column = quoted(name)
    if spark_type == "timestamp":
        return column
    clock = F.concat(column.cast("string"), F.lit(" 00:00:00")) if spark_type == "date" else column.cast("string")
    return F.concat(clock, F.lit(f" {source.timezone}")).cast("timestamp")


def _value(feature: Column) -> SparkColumn:
    column = quoted(feature.name)
    if feature.type.length is not None:
        message = F.concat(
            F.lit(f"[SFS-407] '{feature.name}' is declared {feature.type}, but a row has length "),
            F.size(column).cast("string"),
        )
        fits = column.isNull() | (F.size(column) == feature.type.length)
        column = F.when(fits, column).otherwise(F.raise_error(message).cast(feature.type.spark))
    return column.cast(feature.type.spark).alias(feature.name)

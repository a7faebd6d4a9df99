"""The value types: their text, what Spark columns fit into them, and what no type can be."""

from __future__ import annotations

from datetime import date, datetime, timezone

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fs import types as t

ARRAYS_OF = [t.Bool, t.Int32, t.Int64, t.Float32, t.Float64, t.String, t.Bytes, t.Timestamp, t.Date]

decimals = st.integers(1, 38).flatmap(lambda p: st.integers(0, p).map(lambda s: t.Decimal(p, s)))
scalars = st.one_of(st.sampled_from(ARRAYS_OF), decimals)
value_types = st.one_of(scalars, scalars.map(t.Array), st.integers(1, 65_536).map(t.Embedding))


@settings(deadline=None)  # a busy machine is no failure
@given(value_types)
def test_the_text_of_a_type_reads_back_as_the_same_type(value_type):
    """What the registry stores as text is the whole type."""
    assert t.parse_type(str(value_type)) == value_type
    assert t.as_value_type(value_type.name) == t.as_value_type(value_type) == value_type


@settings(deadline=None)  # a busy machine is no failure
@given(value_types)
def test_a_column_of_the_types_own_spark_type_fits(value_type):
    """A view whose source has exactly the declared types is never refused."""
    assert value_type.accepts(value_type.spark)


@settings(deadline=None)  # a busy machine is no failure
@given(value_types)
def test_the_arrow_type_has_the_width_that_the_codec_writes(value_type):
    """A fixed-width type is as wide in Arrow as online; a bool is a bit in Arrow, a variable type has no width."""
    arrow = value_type.arrow()
    if value_type.width is None:
        assert pa.types.is_list(arrow) or pa.types.is_string(arrow) or pa.types.is_binary(arrow)
    elif value_type != t.Bool:
        assert arrow.bit_width == 8 * value_type.width


def test_a_decimal_may_be_written_with_a_space_or_without_scale():
    """Both are how people write it in SQL."""
    assert t.parse_type(" decimal(10, 2) ") == t.Decimal(10, 2)
    assert t.parse_type("decimal(10)") == t.Decimal(10, 0)


@pytest.mark.parametrize(
    "text",
    ["", "int", "Int64", "decimal", "decimal()", "array<>", "array<int>", "embedding", "embedding(x)", "map<string,int64>"],
)
def test_an_unknown_type_is_refused_with_the_known_ones(text):
    """The error lists what may be written instead."""
    with pytest.raises(ValueError, match=r"known: bool, int32, int64, .*decimal\(p,s\), array<type>, embedding\(n\)"):
        t.parse_type(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.Decimal(0),
        lambda: t.Decimal(39),
        lambda: t.Decimal(10, 11),
        lambda: t.Decimal(10, -1),
        lambda: t.Embedding(0),
        lambda: t.Embedding(65_537),
        lambda: t.Array(t.Array(t.Int64)),
        lambda: t.Array(t.Embedding(3)),
    ],
)
def test_parameters_out_of_bounds_are_refused(make):
    """1 to 38 digits, a scale within them, 1 to 65,536 numbers in an embedding, no arrays of arrays."""
    with pytest.raises(ValueError, match=r"decimal|embedding|array"):
        make()


@pytest.mark.parametrize(
    "text", ["array<array<int64>>", "array<embedding(3)>", "decimal(39,0)", "decimal(3,4)", "embedding(0)"]
)
def test_text_of_such_parameters_is_refused_too(text):
    """A type from the registry or from text obeys the same bounds."""
    with pytest.raises(ValueError, match=r"decimal|embedding|array"):
        t.parse_type(text)


@pytest.mark.parametrize("value", [int, None, 3, pa.int64()])
def test_what_is_neither_a_type_nor_text_is_refused(value):
    """The error shows the value and how types are written."""
    with pytest.raises(ValueError, match="a type is expected"):
        t.as_value_type(value)


@pytest.mark.parametrize(
    ("value_type", "spark", "fits"),
    [
        (t.Int64, "int", True),
        (t.Int64, "smallint", True),
        (t.Int64, "decimal(10,0)", False),
        (t.Int32, "bigint", False),
        (t.Float64, "float", True),
        (t.Float64, "int", True),
        (t.Float64, "bigint", False),  # above 2^53 a double loses digits
        (t.Float32, "double", False),
        (t.Float32, "int", False),
        (t.Timestamp, "timestamp_ntz", False),  # without a zone it is no instant
        (t.Timestamp, "date", False),
        (t.String, "int", False),
        (t.Bytes, "string", False),
        (t.Decimal(10, 2), "decimal(10,2)", True),
        (t.Decimal(10, 2), "decimal(9,2)", True),
        (t.Decimal(10, 2), "decimal(9,1)", True),
        (t.Decimal(10, 2), "decimal(10,1)", False),  # nine digits before the point do not fit into eight
        (t.Decimal(10, 2), "decimal(10,3)", False),
        (t.Decimal(10, 2), "int", False),
        (t.Array(t.Int64), "array<int>", True),
        (t.Array(t.Int32), "array<bigint>", False),
        (t.Array(t.Decimal(5, 2)), "array<decimal(4,2)>", True),
        (t.Array(t.Int64), "bigint", False),
        (t.Embedding(3), "array<float>", True),
        (t.Embedding(3), "array<double>", False),
    ],
)
def test_a_source_column_fits_only_if_no_value_can_be_lost(value_type, spark, fits):
    """Widening is accepted; narrowing, rounding and reading text as numbers are not."""
    assert value_type.accepts(spark) is fits


@pytest.mark.parametrize(
    ("value_type", "text", "value"),
    [
        (t.Int64, "-7", -7),
        (t.Int32, "7", 7),
        (t.Bool, "true", True),
        (t.Bool, "false", False),
        (t.String, " 7 ", " 7 "),
        (t.Bytes, "é", "é".encode()),
        (t.Date, "2013-07-01", date(2013, 7, 1)),
        (t.Timestamp, "2013-07-01T02:00:00+02:00", datetime(2013, 7, 1, tzinfo=timezone.utc)),
    ],
)
def test_a_key_written_as_text_becomes_a_value_of_its_type(value_type, text, value):
    """As on a command line; strings are taken as they are."""
    assert value_type.from_text(text) == value


@pytest.mark.parametrize(
    ("value_type", "text"),
    [
        (t.Int64, "seven"),
        (t.Int64, "7.5"),
        (t.Int64, ""),
        (t.Bool, "True"),
        (t.Bool, "1"),
        (t.Date, "July"),
        (t.Timestamp, "noon"),
        (t.Float64, "1.5"),
    ],
)
def test_text_that_is_no_value_of_the_type_is_refused(value_type, text):
    """ValueError, which the command line turns into a message; floats are no keys at all."""
    with pytest.raises(ValueError, match=r".+"):
        value_type.from_text(text)


@pytest.mark.parametrize(
    ("value_type", "text"), [(t.Int32, "2147483648"), (t.Int32, "-2147483649"), (t.Int64, "9223372036854775808")]
)
def test_a_number_beyond_its_type_is_no_value_of_it(value_type, text):
    """No stored key can equal it, so it is a mistake and not merely an entity that is not found."""
    with pytest.raises(ValueError, match=r".+"):
        value_type.from_text(text)


def test_keys_have_types_with_an_exact_text_form():
    """Floats, decimals, arrays and embeddings identify nothing."""
    assert {"bool", "int32", "int64", "string", "bytes", "timestamp", "date"} == t.KEY_KINDS

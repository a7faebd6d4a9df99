"""The bytes of the online store: what is written today must stay readable for ever."""

from __future__ import annotations

import math
import struct
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal as Exact
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fs.errors import InvalidError
from spark_fs.online import codec, encode
from spark_fs.spec import Column
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
    ValueType,
)

UTC = timezone.utc
EVENT = datetime(2013, 7, 1, 12, 30, 0, 123456, tzinfo=UTC)

CASES: list[tuple[ValueType, list[Any]]] = [
    (Bool, [True, False, None]),
    (Int32, [0, -1, 2**31 - 1, -(2**31), None]),
    (Int64, [0, 2**63 - 1, -(2**63), None]),
    (Float32, [0.5, math.inf, -math.inf, -0.0, math.nan, None]),
    (Float64, [0.1, math.inf, -math.inf, -0.0, math.nan, 5e-324, None]),
    (String, ["", "null", "nan", "e\u0301", "\u00e9", "🛫", "a\x00b\r\n", None]),
    (Bytes, [b"", b"\x00\xff\r\n", None]),
    (
        Timestamp,
        [datetime(1900, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), EVENT, None],
    ),
    (Date, [date(1900, 1, 1), date(9999, 12, 31), date(1970, 1, 1), None]),
    (Decimal(38, 18), [Exact("99999999999999999999.999999999999999999"), Exact("-1e-18"), Exact(0), None]),
    (Decimal(38, 0), [Exact(10**38 - 1), Exact(1 - 10**38), None]),
    (Decimal(10, 2), [Exact("12345678.90"), Exact("-0.01"), None]),
    (Array(Bool), [[True, None, False], [], None]),
    (Array(Int64), [[1, 2, -(2**63)], [], [None], [1] * 9 + [None], None]),
    (Array(Float64), [[math.nan, -0.0], [], None]),
    (Array(String), [["a", "", None, "🛫"], [], [None], [""], None, ["x" * 1000, "y"]]),
    (Array(Bytes), [[b"\x00", None, b""], None, [b"z"]]),
    (Array(Timestamp), [[EVENT, None], []]),
    (Array(Date), [[date(1969, 12, 31)], None]),
    (Array(Decimal(38, 18)), [[Exact("1.5"), None, Exact("-1e-18")], [], None]),
    (Embedding(3), [[1.0, -2.5, 0.0], None]),
]


def batch_of(
    features: list[Column], columns: list[list[Any]], *, event: datetime = EVENT, created: Any = None, build: int = 1
) -> pa.RecordBatch:
    count = len(columns[0]) if columns else 1
    instant = pa.timestamp("us", tz="UTC")
    fields = {
        "_key": pa.array([b"%d" % i for i in range(count)], pa.binary()),
        "event_timestamp": pa.array([event] * count, instant),
        "created_timestamp": pa.array([created] * count, instant),
        "_build": pa.array([build] * count, pa.int64()),
    }
    for feature, values in zip(features, columns, strict=True):
        fields[feature.name] = pa.array(values, feature.type.arrow())
    return pa.RecordBatch.from_pydict(fields)


def encoded(features: list[Column], columns: list[list[Any]], **times: Any) -> list[bytes]:
    return encode.encode_values(batch_of(features, columns, **times), features, 1).to_pylist()


def same(left: Any, right: Any) -> bool:
    """Equality that tells -0.0 from 0.0, a bool from a number and NaN from all but NaN."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("<d", left) == struct.pack("<d", right) or (math.isnan(left) and math.isnan(right))
    return type(left) is type(right) and left == right


# ---- values


@pytest.mark.parametrize(("kind", "values"), CASES, ids=[str(kind) for kind, _ in CASES])
def test_every_type_comes_back_exactly(kind: ValueType, values: list[Any]) -> None:
    """Each value, null and empty ones included, is read as it was written, with its Python type."""
    features = [Column("f", kind)]
    decoder, stored = codec.Decoder(features), encoded(features, [values])
    found = [decoder.decode(value)[0] for value in stored]
    assert all(map(same, found, values)), (found, values)
    assert same(decoder.decode_all(stored), [values])


def test_all_types_share_a_row() -> None:
    """Columns of all types side by side do not disturb each other, in any selection and order."""
    features = [Column(f"f{i}", kind) for i, (kind, _) in enumerate(CASES)]
    rows = 6
    columns = [[values[row % len(values)] for row in range(rows)] for _, values in CASES]
    stored = encoded(features, columns)
    for names in ([f.name for f in features], [f.name for f in reversed(features)], ["f5"], ["f15", "f0"], []):
        decode = codec.Decoder(features, names).decode
        for row in range(rows):
            wanted = [columns[int(name[1:])][row] for name in names]
            assert same(decode(stored[row]), wanted)
        every = codec.Decoder(features, names).decode_all(stored)
        assert same(every, [columns[int(name[1:])] for name in names])


@pytest.mark.parametrize("names", [["f1", "f0", "f2"], ["f2"], []])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_many_values_are_decoded_like_one_by_one(names: list[str], rows: int) -> None:
    """Of values that all have one size, nulls among them, columns come out as from single ones, in any selection."""
    features = [Column("f0", Float64), Column("f1", Timestamp), Column("f2", Decimal(10, 2))]
    columns = [
        [0.5, None, -0.0, 1.0, None][:rows],
        [EVENT, EVENT, None, None, EVENT][:rows],
        [None, Exact("1.50"), Exact("-1.00"), None, Exact("0.00")][:rows],
    ]
    stored = encoded(features, columns) if rows else []
    decoder = codec.Decoder(features, names)
    assert same(decoder.decode_all(stored), [columns[int(name[1:])] for name in names])
    assert same(
        [list(row) for row in zip(*decoder.decode_all(stored), strict=True)], [*map(decoder.decode, stored)] if names else []
    )


@settings(deadline=None)  # the first example loads Arrow
@given(st.data())
def test_random_arrays_and_texts_come_back(data: st.DataObject) -> None:
    """Any mix of lengths, nulls and empty values is cut at the right places."""
    texts = st.none() | st.text(max_size=5).filter(lambda text: text.isprintable())
    count = data.draw(st.integers(1, 8))
    features = [Column("a", Array(String)), Column("b", String), Column("c", Array(Int32))]
    kinds = [st.none() | st.lists(texts, max_size=10), texts, st.none() | st.lists(st.none() | st.integers(-5, 5))]
    columns = [data.draw(st.lists(kind, min_size=count, max_size=count)) for kind in kinds]
    decode = codec.Decoder(features).decode
    found = [decode(value) for value in encoded(features, columns)]
    assert found == [list(row) for row in zip(*columns, strict=True)]


def test_a_slice_of_a_batch_is_encoded_like_the_rows_alone() -> None:
    """Arrow offsets of sliced columns are honoured for every type."""
    features = [Column(f"f{i}", kind) for i, (kind, _) in enumerate(CASES)]
    columns = [[values[row % len(values)] for row in range(40)] for _, values in CASES]
    whole = batch_of(features, columns)
    sliced = encode.encode_values(whole.slice(13, 11), features, 1).to_pylist()
    assert sliced == encode.encode_values(whole, features, 1).to_pylist()[13:24]


# Generation 1, event time, no created time, build 1; then schema id and body.
VERSION = "00000001" + "8004e07263160440" + "0000000000000000" + "00000001"
GOLDEN: list[tuple[list[Column], list[Any], str, str]] = [
    (
        [Column("temp", Float64), Column("ok", Bool), Column("n", Int32)],
        [1.5, True, None],
        "31cd4aeb",
        "04 000000000000f83f 01 00000000",
    ),
    (
        [Column("s", String), Column("i", Int64), Column("t", Array(String))],
        ["hé", -2, ["a", None, "bc"]],
        "6d0cc260",
        "00 feffffffffffffff 03000000 17000000 68c3a9 03000000 02 010000000100000003000000 616263",
    ),
    (
        [Column("d", Decimal(10, 2)), Column("e", Embedding(2)), Column("w", Timestamp), Column("y", Date)],
        [Exact("-0.01"), [1.0, -2.0], EVENT, date(1969, 12, 31)],
        "aff2c8be",
        "00 ffffffffffffffffffffffffffffffff 4004166372e00400 ffffffff 0d000000 02000000 00 0000803f 000000c0",
    ),
]


@pytest.mark.parametrize(("features", "row", "schema", "body"), GOLDEN)
def test_format_v1_is_fixed(features: list[Column], row: list[Any], schema: str, body: str) -> None:
    """The bytes of format v1 never change, and what was written with them stays readable."""
    golden = bytes.fromhex(VERSION + schema + body)
    assert encoded(features, [[value] for value in row]) == [golden]
    assert codec.Decoder(features).decode(golden) == row
    assert codec.read_header(golden) == codec.Header(1, 1372681800123456, None, 1, int(schema, 16))


# ---- header


INSTANTS = st.datetimes(datetime(1900, 1, 1), datetime(9999, 12, 31)).map(lambda t: t.replace(tzinfo=UTC))  # noqa: DTZ001
VERSIONS = st.tuples(st.integers(0, 3), INSTANTS, st.none() | INSTANTS, st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(VERSIONS, VERSIONS)
def test_headers_order_as_bytes_like_versions(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    """Comparing 24 header bytes is comparing (generation, event, created, build), with a null created time first."""
    features = [Column("f", Bool)]

    def header(version: tuple[Any, ...]) -> bytes:
        generation, event, created, build = version
        batch = batch_of(features, [[True]], event=event, created=created, build=build)
        return bytes(encode.encode_values(batch, features, generation).to_pylist()[0][:24])

    def rank(version: tuple[Any, ...]) -> tuple[Any, ...]:
        generation, event, created, build = version
        return (generation, event, (created is not None, created or EVENT), build)

    assert (header(left) < header(right)) == (rank(left) < rank(right))


def test_schema_id_depends_on_name_type_and_place() -> None:
    """Two schemas whose values could be confused have different ids."""
    a, b = Column("a", Int64), Column("b", Int64)
    ids = {codec.schema_id(features) for features in ([a, b], [b, a], [a], [Column("a", Int32), b], [])}
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.drop_columns(["f"]), "no column 'f'"),
        (lambda b: b.set_column(0, "_key", pa.array([None], pa.binary())), "null join key"),
        (lambda b: b.set_column(1, "event_timestamp", pa.array([None], pa.timestamp("us", "UTC"))), "no event time"),
        (lambda b: b.set_column(4, "f", pa.array([[1.0]], pa.list_(pa.float32()))), "vectors of length 1"),
        (lambda b: b.set_column(4, "f", pa.array(["x"])), "not embedding"),
    ],
)
def test_unfit_rows_are_refused_with_the_reason(change: Any, words: str) -> None:
    """A batch that lacks something, or would lose something, is refused before a byte is written."""
    features = [Column("f", Embedding(2))]
    batch = change(batch_of(features, [[[1.0, 2.0]]]))
    with pytest.raises(InvalidError, match="SFS-609") as caught:
        (encode.encode_values(batch, features, 1), encode.encode_keys(batch))
    assert words in str(caught.value)


# ---- keys


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Bool, True, b"true"),
        (Int32, -5, b"-5"),
        (Int64, 2**63 - 1, b"9223372036854775807"),
        (String, "JFK", b"JFK"),
        (String, "", b""),
        (String, "a\x00{b}\n", b"a\x00{b}\n"),
        (Bytes, b"\xff\x00", b"\xff\x00"),
        (Timestamp, datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), b"-1"),
        (Timestamp, datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), b"0"),
        (Date, date(1969, 12, 31), b"-1"),
    ],
)
def test_one_key_is_its_text(kind: ValueType, value: Any, text: bytes) -> None:
    """The key bytes of one join key can be read in redis-cli."""
    assert codec.key_bytes([value], [Column("k", kind)]) == text


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Int64, None),
        (Int64, "1"),
        (Int64, 1.0),
        (Int64, True),
        (Int64, 2**63),
        (Int32, 2**31),
        (String, 1),
        (String, b"x"),
        (String, "\ud800"),
        (Bytes, "x"),
        (Bool, 1),
        (Timestamp, datetime(2013, 7, 1)),  # noqa: DTZ001
        (Timestamp, 0),
        (Date, datetime(2013, 7, 1, tzinfo=UTC)),
    ],
)
def test_a_key_of_another_type_is_refused(kind: ValueType, value: Any) -> None:
    """Nothing is turned into text silently: a wrong key finds nothing, and nobody would know why."""
    with pytest.raises(InvalidError, match=r"SFS-606.*'k'"):
        codec.key_bytes([value], [Column("k", kind)])


@given(st.lists(st.text(max_size=4), min_size=2, max_size=2), st.lists(st.text(max_size=4), min_size=2, max_size=2))
def test_composite_keys_are_injective(left: list[str], right: list[str]) -> None:
    """Different pairs of keys never share their bytes, whatever separators they contain."""
    keys = [Column("a", String), Column("b", String)]
    assert (codec.key_bytes(left, keys) == codec.key_bytes(right, keys)) == (left == right)


def test_redis_key_has_the_tag_first() -> None:
    """The first pair of braces is the tag, so braces inside the entity's key cannot move it to another slot."""
    assert codec.redis_key(b"flights:weather@1:", b"JFK") == b"flights:weather@1:{415}:JFK"
    assert codec.redis_key(b"p:v@1:", b"{9}").startswith(b"p:v@1:{")
    assert codec.redis_key(b"p:v@1:", b"") == b"p:v@1:{0}:"
    assert codec.key_bytes([], []) == b""

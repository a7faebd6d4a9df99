"""The value types of a feature: one table from their names to Spark, Arrow and the online codec.

A type is written as text everywhere it is stored: ``int64``, ``decimal(10,2)``, ``array<string>``, ``embedding(128)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from spark_fs.intervals import parse_instant

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class ValueType:
    """One value type.

    ``width`` is the size in bytes of a value that always takes the same space online, None for a variable one;
    ``numpy`` is the little-endian layout of such a value. ``element`` is set for arrays, ``length`` for embeddings.
    """

    name: str
    spark: str
    width: int | None = None
    numpy: str | None = None
    element: ValueType | None = None
    length: int | None = None
    precision: int = 0
    scale: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        """The name without parameters, such as ``decimal`` or ``array``."""
        return re.split(r"[(<]", self.name, maxsplit=1)[0]

    def arrow(self) -> pyarrow.DataType:
        """The Arrow type in which Spark hands over and readers get the values."""
        import pyarrow as pa

        if self.element is not None:
            return pa.list_(self.element.arrow())
        if self.kind == "decimal":
            return pa.decimal128(self.precision, self.scale)
        return {
            "bool": pa.bool_(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "float32": pa.float32(),
            "float64": pa.float64(),
            "string": pa.string(),
            "bytes": pa.binary(),
            "timestamp": pa.timestamp("us", tz="UTC"),
            "date": pa.date32(),
        }[self.kind]

    def from_text(self, text: str) -> Any:
        """The Python value of a join key written as text, such as on a command line; ValueError if it is none."""
        if self.kind in ("int32", "int64"):
            number, bits = int(text), 31 if self.kind == "int32" else 63
            if not -(2**bits) <= number < 2**bits:
                raise ValueError(f"{text} is beyond {self}")
            return number
        if self.kind == "bool" and text in ("true", "false"):
            return text == "true"
        if self.kind == "timestamp":
            return parse_instant(text)
        if self.kind == "date":
            return date.fromisoformat(text)
        if self.kind == "bytes":
            return text.encode()
        if self.kind == "string":
            return text
        raise ValueError(f"'{text}' cannot be read as {self}")

    def accepts(self, spark_type: str) -> bool:
        """Whether every value of a Spark column of this type (as DDL text) fits without loss."""
        if self.element is not None:
            inner = re.fullmatch(r"array<(.+)>", spark_type)
            return inner is not None and self.element.accepts(inner.group(1))
        if self.kind == "decimal":
            found = re.fullmatch(r"decimal\((\d+),(\d+)\)", spark_type)
            if found is None:
                return False
            precision, scale = int(found.group(1)), int(found.group(2))
            return scale <= self.scale and precision - scale <= self.precision - self.scale
        return spark_type in _LOSSLESS[self.kind]


Bool = ValueType("bool", "boolean", 1, "u1")
Int32 = ValueType("int32", "int", 4, "<i4")
Int64 = ValueType("int64", "bigint", 8, "<i8")
Float32 = ValueType("float32", "float", 4, "<f4")
Float64 = ValueType("float64", "double", 8, "<f8")
String = ValueType("string", "string")
Bytes = ValueType("bytes", "binary")
Timestamp = ValueType("timestamp", "timestamp", 8, "<i8")
Date = ValueType("date", "date", 4, "<i4")

SCALARS: dict[str, ValueType] = {t.name: t for t in (Bool, Int32, Int64, Float32, Float64, String, Bytes, Timestamp, Date)}

#: Types a join key may have: those with an exact text form. Floats are left out, for equality on them means little.
KEY_KINDS = frozenset({"bool", "int32", "int64", "string", "bytes", "timestamp", "date"})

#: Spark types whose every value fits into ours.
_LOSSLESS: dict[str, frozenset[str]] = {
    "bool": frozenset({"boolean"}),
    "int32": frozenset({"tinyint", "smallint", "int"}),
    "int64": frozenset({"tinyint", "smallint", "int", "bigint"}),
    "float32": frozenset({"float"}),
    "float64": frozenset({"float", "double", "tinyint", "smallint", "int"}),
    "string": frozenset({"string"}),
    "bytes": frozenset({"binary"}),
    "timestamp": frozenset({"timestamp"}),
    "date": frozenset({"date"}),
}


def Decimal(precision: int, scale: int = 0) -> ValueType:
    """An exact decimal: ``1 ≤ precision ≤ 38`` digits, ``0 ≤ scale ≤ precision`` of them after the point."""
    if not (1 <= precision <= 38 and 0 <= scale <= precision):
        raise ValueError(f"decimal({precision},{scale}): precision must be 1 to 38, scale 0 to precision")
    text = f"decimal({precision},{scale})"
    return ValueType(text, text, 16, "V16", precision=precision, scale=scale)


def Array(element: ValueType) -> ValueType:
    """A list of values of one scalar type; the list and its elements may be null."""
    if element.element is not None:
        raise ValueError(f"array<{element}>: arrays of arrays are not supported")
    return ValueType(f"array<{element}>", f"array<{element.spark}>", element=element)


def Embedding(length: int) -> ValueType:
    """A vector of exactly ``length`` float32 numbers (1 to 65,536), stored as an array."""
    if not 1 <= length <= 65_536:
        raise ValueError(f"embedding({length}): the length must be 1 to 65536")
    return ValueType(f"embedding({length})", "array<float>", element=Float32, length=length)


def parse_type(text: str) -> ValueType:
    """The type written as text; ValueError naming the known types otherwise."""
    text = text.strip()
    if text in SCALARS:
        return SCALARS[text]
    if found := re.fullmatch(r"decimal\((\d+)\s*(?:,\s*(\d+))?\)", text):
        return Decimal(int(found.group(1)), int(found.group(2) or 0))
    if found := re.fullmatch(r"array<(.+)>", text):
        return Array(parse_type(found.group(1)))
    if found := re.fullmatch(r"embedding\((\d+)\)", text):
        return Embedding(int(found.group(1)))
    known = ", ".join([*SCALARS, "decimal(p,s)", "array<type>", "embedding(n)"])
    raise ValueError(f"unknown type '{text}'; known: {known}")


def as_value_type(value: Any) -> ValueType:
    """A ValueType from itself or its text; ValueError otherwise."""
    if isinstance(value, ValueType):
        return value
    if isinstance(value, str):
        return parse_type(value)
    raise ValueError(f"a type is expected (Int64, Array(String), 'int64', …), not {value!r}")

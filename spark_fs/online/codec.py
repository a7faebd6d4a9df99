"""Keys and values of the online store as bytes: the layout, the keys, and decoding. Standard library only.

Key    ``{project}:{view}@{version}:{<tag>}:<key bytes>``, such as ``flights:weather@1:{77}:JFK``. The tag stands in
       literal braces and is ``crc32(key bytes) % 1024``, so that a cluster keeps the rows of a tag in one slot. Key
       bytes: one join key is its text; several are each ``<byte length>:<text>`` in declared order; none is empty. The
       text of a bool is ``true`` or ``false``, of a timestamp its microseconds, of a date its days since 1970-01-01.

Value  format v1: header, body.

       header  28 bytes, big-endian, ordered as bytes like the numbers they stand for:
               generation u32 · event time i64 · created time i64 · build u32 · schema id u32
               times are microseconds since 1970-01-01 UTC with the sign bit flipped; a null created time is all zero.
               A value of nothing but a generation and 24 zero bytes is a tombstone: the key has no row
       body    null bitmap  one bit per feature in declared order, lowest bit first, 1 = null; ``ceil(features / 8)``
       bytes
               fixed part   the fixed-width features in declared order, little-endian; zero where null. A bool is one
                            byte, a timestamp i64 microseconds, a date i32 days, a decimal its unscaled integer in 16
                            bytes two's complement
               ends         one u32 per variable-width feature: where its bytes end, counted from the end of the ends
               bytes        the variable-width features in declared order: UTF-8 text, raw bytes or an array; none
                            where null
       array   count u32 · null bitmap of the elements · the elements: fixed-width ones as above; others as one u32 end
               each, then their bytes. An embedding is an array of float32

The schema id is the CRC-32 of the features' names and types: a value of another schema is never misread.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Context, Decimal
from operator import index, itemgetter
from typing import Any, NamedTuple

from spark_fs.errors import InvalidError
from spark_fs.intervals import from_micros, to_micros
from spark_fs.spec import Column, ViewSpec, canonical_json
from spark_fs.types import ValueType

#: Hash tags of the keys; a power of two, so that each tag lies in one bucket of a feature table with as many or fewer.
ONLINE_SLOTS = 1024
#: Added to a signed time so that its bytes order like its value.
SIGN_BIT = 1 << 63
HEADER = struct.Struct(">IQQII")
#: Of a header only the event time, as ``HEADER`` has it, and the schema id.
TIME_AND_SCHEMA = struct.Struct(">4xQ12xI")
#: How long a tombstone keeps out writers that began before it.
GRAVE = timedelta(days=7)
#: The generation of what no writer may replace.
ERASED = 2**32 - 1

_EPOCH_DAY = date(1970, 1, 1).toordinal()
_STRUCT_CODES = {
    "bool": "?",
    "int32": "i",
    "int64": "q",
    "float32": "f",
    "float64": "d",
    "timestamp": "q",
    "date": "i",
    "decimal": "16s",
}
#: The default context would round to 28 digits.
_EXACT = Context(prec=50)


class Header(NamedTuple):
    """The version of a stored value: what a greater one must exceed, field by field, and the schema of its body."""

    generation: int
    event_us: int
    created_us: int | None
    build: int
    schema_id: int


def read_header(value: bytes) -> Header:
    """The header of a stored value; times in microseconds since 1970-01-01 UTC."""
    generation, event, created, build, schema = HEADER.unpack_from(value)
    return Header(generation, event - SIGN_BIT, created - SIGN_BIT if created else None, build, schema)


def tombstone(generation: int) -> bytes:
    """The value of a key that has no row, as of a generation."""
    return HEADER.pack(generation, 0, 0, 0, 0)


def key_space(view: ViewSpec) -> bytes:
    """What the digests of a view's entities are made with: equal for its versions with join keys of equal names and types."""
    return canonical_json([view.project, view.name, [[key.name, key.type.name] for key in view.keys]]).encode()


def key_digest(space: bytes, key: bytes) -> bytes:
    """20 bytes that stand for an entity in a key space (``key_space``): what is kept of a key that was erased."""
    return hashlib.blake2b(space + key, digest_size=20).digest()


def first_key_digest(prefix: bytes, key: bytes) -> bytes:
    """16 bytes, as digests were at first: they stand for equal key bytes in all versions of a view, whatever its join keys."""
    return hashlib.blake2b(prefix.partition(b"@")[0] + b":" + key, digest_size=16).digest()


def erased_among(keys: Sequence[bytes | None], digests: frozenset[bytes], space: bytes, prefix: bytes) -> list[bool]:
    """Which of the keys of a view version have one of these digests, in its key space or as they were at first."""
    if not digests:
        return [False] * len(keys)
    first = any(len(digest) == 16 for digest in digests)
    return [
        key is not None and (key_digest(space, key) in digests or (first and first_key_digest(prefix, key) in digests))
        for key in keys
    ]


def schema_id(features: Sequence[Column]) -> int:
    """A 32-bit number that changes with any feature's name, type or place."""
    return zlib.crc32(canonical_json([[feature.name, feature.type.name] for feature in features]).encode())


def bitmap_bytes(bits: int) -> int:
    """The bytes a bitmap of so many bits takes."""
    return (bits + 7) // 8


# ---- keys


def key_prefix(view: ViewSpec) -> bytes:
    """What all keys of one view version start with, and no key of another: ``{project}:{view}@{version}:``."""
    return f"{view.project}:{view.reference}:".encode()


def epoch_prefix(prefix: bytes, epoch: int) -> bytes:
    """What the keys of a view version start with in an epoch, given its ``key_prefix``: a full refresh begins another one."""
    return b"%b.%d:" % (prefix[:-1], epoch) if epoch else prefix


def epoch_name(prefix: bytes) -> bytes:
    """The key that says which epoch of a view version, given by its ``key_prefix``, readers see: a number; without it 0."""
    return b"%bepoch:{0}" % prefix


def redis_key(prefix: bytes, key: bytes) -> bytes:
    """The Redis key of an entity: prefix, tag in braces, key bytes."""
    return b"%b{%d}:%b" % (prefix, zlib.crc32(key) % ONLINE_SLOTS, key)


def shown_key(key: bytes) -> str:
    """Key bytes as a message may show them: escaped and short."""
    text = repr(key)[1:]
    return text if len(text) <= 80 else f"{text[:80]}…"


def redis_keys(prefix: bytes, tags: Sequence[int | None], keys: Sequence[bytes | None]) -> list[bytes | None]:
    """The Redis keys of many entities, by ``key_tags``; None for None."""
    heads = {tag: b"%b{%d}:" % (prefix, tag) for tag in {*tags} if tag is not None}
    return [None if key is None or tag is None else heads[tag] + key for tag, key in zip(tags, keys, strict=True)]


def key_tags(keys: Sequence[bytes | None]) -> list[int | None]:
    """The hash tags of key bytes; None for None."""
    return [None if key is None else zlib.crc32(key) % ONLINE_SLOTS for key in keys]


def tag_of(name: bytes) -> bytes:
    """The tag of a Redis key that ``redis_key`` has made, without its braces."""
    return name[name.index(b"{") + 1 : name.index(b"}")]


def slot_of(tag: bytes) -> int:
    """The slot of a Redis cluster that keys with this tag lie in."""
    return crc_hqx(tag, 0) % 16384


def key_bytes(values: Sequence[Any], keys: Sequence[Column]) -> bytes:
    """The key bytes of an entity; the same as ``offline.compute.key_bytes`` gives for equal values in Spark.

    ``values`` are natural Python values in the order of ``keys``: int (or another integer type), str, bytes, bool,
    datetime with a time zone, date. Raises SFS-606 naming the join key for a null, for a value of another type (no
    silent ``str()``), outside the type's range, or not encodable.
    """
    texts = [_key_text(value, key) for value, key in zip(values, keys, strict=True)]
    if len(texts) == 1:
        return texts[0]
    return b"".join(b"%d:%b" % (len(text), text) for text in texts)


def key_bytes_of_columns(columns: Sequence[Sequence[Any]], rows: int, keys: Sequence[Column]) -> list[bytes | None]:
    """``key_bytes`` of so many entities, given by the columns of their join keys; None where a join key is null."""
    if len(keys) == 1:
        text = _KEY_TEXTS[keys[0].type.name]
        with suppress(TypeError, ValueError):  # one by one it is told which
            return [None if value is None else text(value) for value in columns[0]]
    entities = zip(*columns, strict=True) if keys else [()] * rows
    return [None if None in entity else key_bytes(entity, keys) for entity in entities]


def _key_text(value: Any, key: Column) -> bytes:
    try:
        return _KEY_TEXTS[key.type.name](value)
    except (TypeError, ValueError) as error:
        raise InvalidError.of(
            "SFS-606",
            f"The join key '{key.name}' is {key.type} and cannot be {_shown(value)}.",
            why=f"{str(error)[:200]}." if isinstance(value, str) else "",
            fix=f"give a value such as {_KEY_EXAMPLES[key.type.name]}",
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return "null" if value is None else f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"


def _require(value: Any, *kinds: type, but: type | None = None) -> Any:
    if not isinstance(value, kinds) or (but is not None and isinstance(value, but)):
        raise TypeError(f"not a {kinds[0].__name__}")
    return value


def _integer_text(bits: int) -> Callable[[Any], bytes]:
    least, past = -(1 << (bits - 1)), 1 << (bits - 1)

    def text(value: Any) -> bytes:
        number = index(value)
        if isinstance(value, bool) or not least <= number < past:
            raise ValueError(f"not an integer of {bits} bits")
        return b"%d" % number

    return text


def _instant_text(value: Any) -> bytes:
    if _require(value, datetime).utcoffset() is None:
        raise ValueError("it has no time zone")
    return b"%d" % to_micros(value)


_KEY_TEXTS: dict[str, Callable[[Any], bytes]] = {
    "bool": lambda value: b"true" if _require(value, bool) else b"false",
    "int32": _integer_text(32),
    "int64": _integer_text(64),
    "string": lambda value: bytes(_require(value, str).encode()),
    "bytes": lambda value: bytes(_require(value, bytes, bytearray)),
    "timestamp": _instant_text,
    "date": lambda value: b"%d" % (_require(value, date, but=datetime).toordinal() - _EPOCH_DAY),
}
_KEY_EXAMPLES = {
    "bool": "True",
    "int32": "42",
    "int64": "42",
    "string": "'JFK'",
    "bytes": "b'JFK'",
    "timestamp": "datetime(2013, 7, 1, tzinfo=timezone.utc)",
    "date": "date(2013, 7, 1)",
}


# ---- values


class Decoder:
    """Reads some features out of stored values of one schema; made once, then called per value.

    A value comes back as int, float, bool, str, bytes, Decimal, date, datetime (UTC), list of these, or None for null.
    """

    def __init__(self, features: Sequence[Column], wanted: Sequence[str] | None = None) -> None:
        names = [feature.name for feature in features] if wanted is None else list(wanted)
        places = {name: place for place, name in enumerate(names)}
        codes, picked, slot = [f"<{bitmap_bytes(len(features))}s"], [0] * len(names), 1
        self._bits = [(1 << bit, places[item.name]) for bit, item in enumerate(features) if item.name in places]
        self._converted: list[tuple[int, Callable[[Any], Any]]] = []
        self._variable: list[tuple[int, int, Callable[[bytes], Any]]] = []
        for feature in features:
            if feature.type.width is None:
                continue
            if feature.name not in places:
                codes.append(f"{feature.type.width}x")
                continue
            codes.append(_STRUCT_CODES[feature.type.kind])
            picked[places[feature.name]] = slot
            convert = _converter(feature.type)
            if convert is not None:
                self._converted.append((places[feature.name], convert))
            slot += 1
        variable = [feature for feature in features if feature.type.width is None]
        for number, feature in enumerate(variable):
            if feature.name in places:
                self._variable.append((places[feature.name], number, _reader(feature.type)))
        self._ends = slot
        self._layout = struct.Struct("".join([*codes, "I" * len(variable)]))
        self._bytes_start = HEADER.size + self._layout.size
        #: A whole value, where all of them have the same size; and where it has each wanted feature.
        self._whole = None if variable else struct.Struct(f"<{HEADER.size}x{self._layout.format[1:]}")
        self._picked, self._no_nulls = picked, bytes(bitmap_bytes(len(features)))
        # Slot 0, the null bitmap, twice: itemgetter gives a tuple for two items and more only.
        self._pick = itemgetter(0, 0, *picked)

    def decode(self, value: bytes) -> list[Any]:
        """The wanted features of one value, in the order they were asked for. The header is not looked at.

        Of many values ``decode_all`` gives the same, as columns, in less time.
        """
        slots = self._layout.unpack_from(value, HEADER.size)
        row: list[Any]
        bitmap, _, *row = self._pick(slots)
        for place, convert in self._converted:
            row[place] = convert(row[place])
        if self._variable:
            ends, start = (0, *slots[self._ends :]), self._bytes_start  # each one starts where the one before ends
            for place, number, read in self._variable:
                row[place] = read(value[start + ends[number] : start + ends[number + 1]])
        nulls = int.from_bytes(bitmap, "little")
        if nulls:
            for bit, place in self._bits:
                if nulls & bit:
                    row[place] = None
        return row

    def decode_all(self, values: Sequence[bytes]) -> list[list[Any]]:
        """For each wanted feature a list of its values, in the order of ``values``. The headers are not looked at."""
        whole = self._whole
        if whole is None or not values or {*map(len, values)} != {whole.size}:
            rows = [self.decode(value) for value in values]
            return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in self._picked]
        slots = list(zip(*whole.iter_unpack(b"".join(values)), strict=True))
        columns = [list(slots[slot]) for slot in self._picked]
        for place, convert in self._converted:
            columns[place] = [convert(raw) for raw in columns[place]]
        bitmaps = slots[0]
        if bitmaps.count(self._no_nulls) < len(bitmaps):
            for row, bitmap in enumerate(bitmaps):
                nulls = int.from_bytes(bitmap, "little")
                for bit, place in self._bits if nulls else ():
                    if nulls & bit:
                        columns[place][row] = None
        return columns


def _converter(kind: ValueType) -> Callable[[Any], Any] | None:
    """What turns an unpacked fixed-width value into the natural Python one; None where it already is."""
    if kind.kind == "timestamp":
        return from_micros
    if kind.kind == "date":
        return lambda days: date.fromordinal(days + _EPOCH_DAY)
    if kind.kind == "decimal":
        exponent = Decimal(-kind.scale)
        return lambda raw: _EXACT.scaleb(Decimal(int.from_bytes(raw, "little", signed=True)), exponent)
    return None


def _reader(kind: ValueType) -> Callable[[bytes], Any]:
    """What turns the bytes of a variable-width value into the natural Python one."""
    if kind.element is not None:
        return _array_reader(kind.element)
    return bytes.decode if kind.kind == "string" else bytes


def _array_reader(element: ValueType) -> Callable[[bytes], list[Any]]:
    if element.width is None:
        return _variable_array_reader(_reader(element))
    code, convert = _STRUCT_CODES[element.kind], _converter(element)

    def read(data: bytes) -> list[Any]:
        if not data:
            return []  # null, as the bitmap of the row says
        count = int.from_bytes(data[:4], "little")
        start = 4 + bitmap_bytes(count)
        # '16s' takes no count of its own: 216s would be one string.
        layout = f"<{code * count}" if code == "16s" else f"<{count}{code}"
        values: Sequence[Any] = struct.unpack_from(layout, data, start)
        return _with_nulls(values if convert is None else [convert(value) for value in values], data[4:start])

    return read


def _variable_array_reader(convert: Callable[[bytes], Any]) -> Callable[[bytes], list[Any]]:
    def read(data: bytes) -> list[Any]:
        if not data:
            return []  # null, as the bitmap of the row says
        count = int.from_bytes(data[:4], "little")
        start = 4 + bitmap_bytes(count)
        ends = (0, *struct.unpack_from(f"<{count}I", data, start))
        base = start + 4 * count
        values = [convert(data[base + ends[i] : base + ends[i + 1]]) for i in range(count)]
        return _with_nulls(values, data[4:start])

    return read


def _with_nulls(values: Sequence[Any], bitmap: bytes) -> list[Any]:
    nulls = int.from_bytes(bitmap, "little")
    if not nulls:
        return list(values)
    return [None if nulls >> position & 1 else value for position, value in enumerate(values)]

"""Key bytes of Arrow columns: one key is its text; several are each ``<byte length>:<text>``, in order; none is empty.

``offline.compute.key_bytes`` gives the same in Spark, ``online.codec.key_bytes`` for single Python values.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

_BINARY = pa.large_binary()


def key_column(columns: Sequence[pa.Array], rows: int) -> pa.LargeBinaryArray:
    """The key bytes of each row; null where a part is null."""
    texts = [_text(column) for column in columns]
    if not texts:
        return pa.array([b""] * rows, _BINARY)
    if len(texts) == 1:
        return texts[0]
    parts: list[pa.LargeBinaryArray | pa.Scalar] = []
    for text in texts:
        parts += [pc.binary_length(text).cast(pa.large_string()).cast(_BINARY), pa.scalar(b":", _BINARY), text]
    return pc.binary_join_element_wise(*parts, pa.scalar(b"", _BINARY))


def can_be_key(kind: pa.DataType) -> bool:
    """Whether ``key_column`` knows the type: an integer, text, bytes, a bool, a date, or an instant."""
    known = (pa.types.is_integer, pa.types.is_string, pa.types.is_binary, pa.types.is_boolean, pa.types.is_date32)
    return any(is_(kind) for is_ in known) or (pa.types.is_timestamp(kind) and kind.tz is not None)


def _text(column: pa.Array) -> pa.LargeBinaryArray:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return column.cast(_BINARY)
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    elif pa.types.is_date(kind):
        column = column.cast(pa.int32())
    return column.cast(pa.large_string()).cast(_BINARY)

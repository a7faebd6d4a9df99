"""Entities that must not be online: removed, and kept from coming back. Needs neither Spark nor pyarrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spark_fs.online.codec import key_digest, key_prefix, redis_key
from spark_fs.online.connect import erase_keys, reopen_keys
from spark_fs.online.read import entity_keys
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec


def erase_entities(
    registry: Registry,
    versions: Sequence[ViewSpec],
    entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    url: str,
    *,
    undo: bool = False,
    socket_timeout_seconds: float = 10.0,
) -> dict[str, Any]:
    """Erase entities from these versions of a view, or with ``undo`` allow them to be published again; safe to repeat.

    Gives the view's name and the numbers of entities and of online keys. See ``FeatureStore.erase``.
    """
    names: list[bytes] = []
    digests: set[bytes] = set()
    for view in versions:
        prefix, keys = key_prefix(view), entity_keys(view, entity_rows)
        names += [redis_key(prefix, key) for key in keys]
        digests |= {key_digest(prefix, key) for key in keys}
    # Noted keys are not written, so the note comes first and goes last: a tombstone without one would stop every run.
    if undo:
        reopen_keys(url, names, socket_timeout_seconds=socket_timeout_seconds)
        registry.forget_erasures(versions[0], digests)
    else:
        registry.erase(versions[0], digests)
        erase_keys(url, names, socket_timeout_seconds=socket_timeout_seconds)
    return {"view": versions[0].name, "entities": len(digests), "online_keys": len(names)}

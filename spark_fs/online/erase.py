"""Entities that must not be online: removed, and kept from coming back. Needs neither Spark nor pyarrow."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spark_fs.errors import ConflictError
from spark_fs.online.codec import epoch_prefix, first_key_digest, key_digest, key_prefix, key_space, redis_key
from spark_fs.online.connect import erase_keys, leave_token, reopen_keys
from spark_fs.online.read import entity_keys
from spark_fs.registry import Registry, State
from spark_fs.spec import ViewSpec

#: How often a mark is left anew because a run has noted something meanwhile.
_ATTEMPTS = 10


def versions_alike(state: State, name: str, version: int | None) -> list[ViewSpec]:
    """The versions of a view that have the same entities as one of them, which comes first: with equal join keys.

    Without a version that is the current one, or the newest of a view that is no longer declared. Raises SFS-303.
    """
    if version is None and name not in state.views:
        version = max((number for known, number in state.versions if known == name), default=None)
    named = state.require_view(name, version)
    alike = [view for view in state.versions.values() if view.name == name and view.keys == named.keys and view != named]
    return [named, *alike]


def erase_entities(
    registry: Registry,
    versions: Sequence[ViewSpec],
    entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    url: str,
    *,
    undo: bool = False,
    socket_timeout_seconds: float = 10.0,
) -> dict[str, Any]:
    """Erase entities from these versions of a view, which have the same join keys, or with ``undo`` allow them again.

    Safe to repeat. A mark is left as a run leaves it, so that the next run notices a server that has lost the erasure.

    Gives the view's name and the numbers of entities and of online keys. See ``FeatureStore.erase``. Raises ConflictError
    SFS-615 where runs publish a view again and again meanwhile: all is erased then, but without a mark.
    """
    keys = set(entity_keys(versions[0], entity_rows))
    space = key_space(versions[0])
    # Rows of an epoch that is kept to go back to, or being written, must not come back either.
    prefixes = [epoch_prefix(key_prefix(view), epoch) for view in versions for epoch in registry.epochs(view)]
    names = [redis_key(prefix, key) for prefix in prefixes for key in keys]
    digests = {key_digest(space, key) for key in keys}
    # Noted keys are not written, so the note comes first and goes last: a tombstone without one would stop every run.
    if undo:
        reopen_keys(url, names, socket_timeout_seconds=socket_timeout_seconds)
        registry.forget_erasures(versions[0], digests | {first_key_digest(prefixes[0], key) for key in keys})
    else:
        registry.erase(versions[0], digests)
        erase_keys(url, names, socket_timeout_seconds=socket_timeout_seconds)
    for view in versions:
        _leave_mark(registry, view, url, socket_timeout_seconds)
    return {"view": versions[0].name, "entities": len(digests), "online_keys": len(names)}


def _leave_mark(registry: Registry, view: ViewSpec, url: str, socket_timeout_seconds: float) -> None:
    """Let the next run of a view look for a mark that was left after its keys were erased."""
    for _ in range(_ATTEMPTS):
        known = registry.published(view)
        if known is None:  # nothing is served: the first run that notes something leaves a mark of its own
            return
        marked = replace(known, token=uuid.uuid4().hex[:12])
        prefix = epoch_prefix(key_prefix(view), known.epoch)
        leave_token(url, prefix, marked.token, socket_timeout_seconds=socket_timeout_seconds)
        if registry.set_published(view, known, marked, registry.generation(view)):
            return
    raise ConflictError.of(
        "SFS-615",
        f"Runs have published '{view.reference}' again and again while entities were erased from it.",
        why="They are erased, but a server that loses this would not be noticed.",
        fix="run the same command again",
    )

"""What tasks have confirmed of a publication: noted in the online store, taken into the ledger while the run goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from spark_fs.ledger import Part
from spark_fs.online.connect import notes
from spark_fs.online.executor import Notes
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry

#: How often the ledger is brought up to what tasks have noted.
_NOTE_SECONDS = 2.0


def notes_name(target: OnlineTarget, intent_id: str) -> bytes:
    """The key of the list in which tasks note what they have confirmed of an intent."""
    return b"%bnotes:{0}:%b" % (target.prefix, intent_id.encode())


def collect_notes(registry: Registry, target: OnlineTarget, intent_id: str, name: bytes) -> list[Part]:
    """Take what tasks have noted of an intent, under this name, into the ledger."""
    found = notes(target.url, name, socket_timeout_seconds=target.socket_timeout_seconds)
    parts = [Part(note["step"], note["bucket"], note["generation"], note["counts"]) for note in map(json.loads, found)]
    registry.ledger.note_parts(intent_id, parts)
    return parts


@contextmanager
def confirming(
    registry: Registry, target: OnlineTarget, intent_id: str, name: bytes, step: str, done: list[int]
) -> Iterator[tuple[Notes, list[int]]]:
    """Keep the ledger up with what tasks note of a step during the block: gives where, and ``done``, the buckets left out."""
    ended = threading.Event()

    def collect() -> None:
        # One of both may be away for a moment; what counts is read when it is needed, by the next run.
        with suppress(Exception):
            collect_notes(registry, target, intent_id, name)

    def watch() -> None:
        while not ended.wait(_NOTE_SECONDS):
            collect()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield Notes(name, step), done
    finally:
        ended.set()
        watcher.join()
        collect()

"""Readers see again what they saw before a full refresh. Needs neither Spark nor pyarrow."""

from __future__ import annotations

from spark_fs.errors import ConflictError, InvalidError, SparkFSError
from spark_fs.ledger import Published
from spark_fs.online.connect import has_token, serve_epoch
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec


def roll_back(registry: Registry, view: ViewSpec, target: OnlineTarget) -> Published:
    """Let readers see what they saw before the last full refresh, or before the last roll-back; gives what that is.

    The next run brings it up to the newest version of the table. The registry's note comes first; interrupted before readers
    see it, the next run sees to that. Raises SFS-618 where there is nothing to go back to, SFS-616 where the online store has
    lost it, ConflictError SFS-615 where another run has published meanwhile.
    """
    known, before = registry.published(view), registry.previous(view)
    timeout = {"socket_timeout_seconds": target.socket_timeout_seconds}
    if known is None or before is None:
        raise InvalidError.of(
            "SFS-618",
            f"There is nothing that feature view '{view.reference}' could be rolled back to.",
            why="No full refresh of it has ended yet.",
            fix="spark-fs materialize --full makes one",
        )
    if not has_token(target.url, target.of_epoch(before.epoch).prefix, before.token, **timeout):
        raise SparkFSError.of(
            "SFS-616",
            f"The online store has lost what feature view '{view.reference}' could be rolled back to.",
            why="The mark that its last run left there is gone.",
            fix="correct the source, build, and run spark-fs materialize --full",
        )
    if not registry.set_published(view, known, before, registry.generation(view)):
        raise ConflictError.of("SFS-615", "Another run has published the view meanwhile.", fix="run the same command again")
    serve_epoch(target.url, target.prefix, before.epoch, **timeout)
    return before

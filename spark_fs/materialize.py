"""Feature tables → online store: the newest row of each key, written in parallel from the executors.

What is online of a view is a claim that the registry holds: for each key the newest row of the table at a version, of those
with event times in the published intervals. A run brings the claim up to the newest version and adds an interval to it. It
offers rows that were added or changed, and restates keys that have lost a row.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from spark_fs.confirmed import collect_notes, confirming, notes_name
from spark_fs.dispatch import (
    extra_keys,
    files_in_place,
    newest_rows,
    publish_files,
    publish_rows,
    rows_left,
    run_tasks,
    within_any,
)
from spark_fs.errors import ConflictError, SparkFSError
from spark_fs.intervals import Interval, text
from spark_fs.ledger import Intent, Published
from spark_fs.offline.changes import changes
from spark_fs.offline.table_log import Commit
from spark_fs.offline.tables import FeatureTable, is_version_gone, observed
from spark_fs.online import executor
from spark_fs.online.connect import (
    delete_prefix,
    has_token,
    leave_token,
    remove_key,
    serve_epoch,
    served_epoch,
    serving,
)
from spark_fs.online.executor import Notes
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts
from spark_fs.publication import Publication, Request, plan_publication
from spark_fs.registry import Registry
from spark_fs.room import check_room

#: How often a run begins anew because another one has published or restated the view meanwhile.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class MaterializeResult:
    """What one run did for one view.

    ``rows_read`` rows of the feature table were offered, the newest of each key: ``applied`` were written, ``equal`` were
    there already, ``stale`` were older than what was there, ``expired`` were past their ttl. ``withdrawn`` keys had lost
    their row at the source, so that an older one is served, or none. ``bytes`` went to the server. ``resumed`` buckets were
    left out, for a run that was stopped had written them. ``replicas``: the least number of replicas that had all rows at the
    end of a task, with ``online.wait_replicas``. ``note``: what could not be done, if anything.
    """

    view: str
    interval: Interval
    table_version: int
    rows_read: int
    applied: int
    equal: int
    stale: int
    expired: int
    withdrawn: int
    resumed: int
    bytes: int
    seconds: float
    replicas: int | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "interval": [text(self.interval.start), text(self.interval.end)]}


def materialize_view(
    registry: Registry,
    table: FeatureTable,
    target: OnlineTarget,
    interval: Interval,
    *,
    restate: bool = False,
    everything: bool = False,
    repair: bool = False,
    full: bool = False,
    run_id: str = "",
) -> MaterializeResult:
    """Publish the rows with event times in the interval, and what has changed of all that was published before.

    ``restate``: each key with a row in the interval serves the newest of those from now on, also in the place of a newer one.
    ``everything``: rows of the interval that were published before are sent again. ``repair``: all published rows are written
    again, whatever is there, and rows that should not be there go; the interval adds nothing. ``full``: all that was published
    and the interval are written beside what is served, and then readers see the new rows only, from one moment to the next; the
    old ones are kept until the next such run (``roll_back``).

    What earlier runs were stopped at is finished first, without the buckets that were confirmed. Writes are guarded, so the
    same run can be repeated, overlap others and be interrupted at any point; only a run of which every row is confirmed is
    noted as published. ``run_id``: the registry's number of the run.

    One during which servers have restarted or failed over begins anew, for they may have lost rows.

    Raises SparkFSError SFS-616 where the online store has lost what was published, before the run or during it, and
    ConflictError SFS-615 where other runs of the view, or servers that were lost, came in between three times.
    """
    began, run = time.monotonic(), _Run(registry, table, target, run_id or uuid.uuid4().hex[:12], is_repair=repair)
    asked: Request | None = Request(interval, restate, everything, repair, full)
    for _ in range(_ATTEMPTS):
        for intent in registry.ledger.unfinished(table.view):
            if not run.take_up(intent):
                break
            if asked == Request.from_json(intent.plan["request"]):
                # Done by that, but for what has changed since.
                asked = None if repair else Request(interval)
        else:
            if asked is None or run.publish(asked):
                return run.result(interval, time.monotonic() - began)
    raise ConflictError.of(
        "SFS-615",
        "The view was published, restated or erased from by others, or servers of the online store have restarted or failed "
        "over, again and again, while this run looked at it.",
        why="What was written is right, but not noted as published.",
        fix="run the same command again when they have ended",
    )


class _Run:
    """All attempts of one run, until one is noted as published."""

    def __init__(self, registry: Registry, table: FeatureTable, target: OnlineTarget, run_id: str, *, is_repair: bool) -> None:
        self._registry, self._table, self._target, self._run_id = registry, table, target, run_id
        #: The target of epoch 0; ``_target`` is that of the epoch whose rows the run writes.
        self._first_target, self._is_repair = target, is_repair
        self._totals, self._version = _Totals(), 0

    def publish(self, request: Request, left: Intent | None = None) -> bool:
        """Do what is asked for, by the newest version of the table; False where others came in between.

        ``left``: what another run has left of the same request, and may have written of an older version.
        """
        known = self._known()
        # In this order: whoever has a generation has looked at the table later than those with a lower one.
        target, log = self._current_target(), self._table.commits()
        more = request.everything or request.restate
        todo = plan_publication(log, known, request.interval, everything=more, repair=request.repair, full=request.full)
        if request.full and known:
            epoch = max(self._registry.epochs(self._table.view)) + 1
            return self._attempt(request, todo, known, self._move_to(epoch), log, epoch=epoch, left=left)
        return self._attempt(request, todo, known, target, log, epoch=known.epoch if known else 0, left=left)

    def take_up(self, intent: Intent) -> bool:
        """Finish what a run has left: as it was meant where nothing was published since, else by the newest version."""
        request, todo = Request.from_json(intent.plan["request"]), Publication.from_json(intent.plan["todo"])
        before, known, epoch = intent.plan["before"], self._known(), int(intent.plan["epoch"])
        if request.full and known and known.epoch == epoch:  # nobody else writes this epoch: it was noted, and no more
            return self._note(known, known, 0, [intent.intent_id])
        if (known and known.to_json()) == before:
            log = [commit for commit in self._table.commits() if commit.version <= todo.version]
            try:
                return self._attempt(request, todo, known, self._move_to(epoch), log, epoch=epoch, resumed=intent)
            except Exception as error:
                if not is_version_gone(error):
                    raise
        return self.publish(request, left=intent)

    def result(self, interval: Interval, seconds: float) -> MaterializeResult:
        """What all attempts came to."""
        totals = self._totals
        return MaterializeResult(
            view=self._table.view.reference,
            interval=interval,
            table_version=self._version,
            rows_read=totals.rows_read,
            **{name: getattr(totals.counts, name) for name in COUNTS if name != "fenced"},
            withdrawn=totals.withdrawn,
            resumed=totals.resumed,
            replicas=totals.counts.replicas,
            note=totals.note,
            seconds=round(seconds, 3),
        )

    def _known(self) -> Published | None:
        """What is published; SFS-616 where the online store does not have it any more, but for a repair."""
        known, target = self._registry.published(self._table.view), self._first_target
        self._move_to(known.epoch if known else 0)
        if known and known.token and not self._is_repair and not self._has_mark(known.token):
            raise self._lost(
                "The mark that the last run left there is gone: the server came back without its data, or with older ones."
            )
        timeout = {"socket_timeout_seconds": target.socket_timeout_seconds}
        if known and served_epoch(target.url, target.prefix, **timeout) != known.epoch:
            serve_epoch(target.url, target.prefix, known.epoch, **timeout)  # a run was stopped just before this
        return known

    def _move_to(self, epoch: int) -> OnlineTarget:
        """From here on the run writes rows of this epoch."""
        self._target = self._first_target.of_epoch(epoch)
        return self._current_target()

    def _current_target(self) -> OnlineTarget:
        registry, view = self._registry, self._table.view
        return replace(self._target, generation=registry.generation(view), erased=registry.erased(view))

    def _attempt(
        self,
        request: Request,
        todo: Publication,
        known: Published | None,
        target: OnlineTarget,
        log: Sequence[Commit],
        *,
        epoch: int,
        resumed: Intent | None = None,
        left: Intent | None = None,
    ) -> bool:
        """Publish and note it; False where others came in between."""
        ledger, view = self._registry.ledger, self._table.view
        self._version = todo.version
        closed = [intent.intent_id for intent in (resumed, left) if intent]
        behind = None if request.full else _written_before(left, todo)
        if not (todo.fresh or todo.compared or behind):
            token = known.token if known else ""
            return self._note(known, Published(todo.version, todo.intervals, token, epoch), target.generation, closed)
        # Before it is noted what the run means to do: a refused one must not be taken up in the place of a shorter one.
        if todo.fresh:
            check_room(self._table, todo.version, todo.fresh, target)
        done: frozenset[tuple[str, int]] = frozenset()
        servers = self._servers()
        # Servers that were lost since may have lost confirmed rows, and kept the mark.
        if resumed and resumed.plan["servers"] == servers and self._has_mark(resumed.token):
            mark, intent_id = resumed.token, resumed.intent_id
            parts = collect_notes(self._registry, target, intent_id, notes_name(self._first_target, intent_id))
            done = frozenset((part.step, part.bucket) for part in parts if part.generation == target.generation)
        else:
            mark = self._leave_mark()
            plan = {
                "request": request.to_json(),
                "todo": todo.to_json(),
                "before": known and known.to_json(),
                "buckets": self._table.buckets(todo.version),
                "servers": servers,
                "epoch": epoch,
            }
            intent_id = ledger.begin(view, self._run_id, plan, mark)
            closed.append(intent_id)
        noted = notes_name(self._first_target, intent_id)
        attempt = _Attempt(self._registry, self._table, todo, target, known, self._totals, intent_id, noted, done)
        with suppress(_OvertakenError):
            attempt.run(request, behind, log)
        if attempt.overtaken:
            return False
        if not self._has_mark(mark):
            raise self._lost("The mark that this run left there before it wrote is gone: the server has lost data meanwhile.")
        # The mark first: with it lost, the rows before it may be lost too. A server that was lost before it has the mark, and
        # may lack rows.
        token = self._leave_mark()
        return self._servers() == servers and self._note(
            known, Published(todo.version, todo.intervals, token, epoch), attempt.generation, closed
        )

    def _note(self, known: Published | None, done: Published, generation: int, closed: Sequence[str]) -> bool:
        """Note what is published now; False where another run has noted or restated something meanwhile."""
        registry, view, target = self._registry, self._table.view, self._first_target
        timeout, epochs = {"socket_timeout_seconds": target.socket_timeout_seconds}, registry.epochs(view)
        if known != done and not registry.set_published(view, known, done, generation):
            return False
        if known and known.epoch != done.epoch:
            serve_epoch(target.url, target.prefix, done.epoch, **timeout)
        # Interrupted before this, they are taken up once more, with nothing left to do.
        for intent_id in closed:
            registry.ledger.finish(intent_id)
            remove_key(target.url, notes_name(target, intent_id), **timeout)
        for epoch in set(epochs) - set(registry.epochs(view)):  # nobody can go back to it any more
            delete_prefix(target.url, target.of_epoch(epoch).prefix, **timeout)
        return True

    def _servers(self) -> list[str]:
        """Which processes serve: others after each restart and failover."""
        return sorted(serving(self._target.url, socket_timeout_seconds=self._target.socket_timeout_seconds))

    def _leave_mark(self) -> str:
        token, target = uuid.uuid4().hex[:12], self._target
        leave_token(target.url, target.prefix, token, socket_timeout_seconds=target.socket_timeout_seconds)
        return token

    def _has_mark(self, token: str) -> bool:
        target = self._target
        return has_token(target.url, target.prefix, token, socket_timeout_seconds=target.socket_timeout_seconds)

    def _lost(self, why: str) -> SparkFSError:
        reference = self._table.view.reference
        return SparkFSError.of(
            "SFS-616",
            f"The online store has lost rows of feature view '{reference}'.",
            why=why,
            fix=f"run spark-fs repair {reference}, and if that finds nothing published, the same command again",
        )


def _written_before(left: Intent | None, todo: Publication) -> Publication | None:
    """What a run has left, where it may have written rows that are not in the table any more."""
    if left is None:
        return None
    meant = Publication.from_json(left.plan["todo"])
    return meant if meant.version != todo.version and meant.touched else None


class _OvertakenError(Exception):
    """Another run has noted something since this attempt began."""


@dataclass
class _Totals:
    """What a run has done so far; ``resumed`` counts the buckets that an earlier run had finished."""

    counts: WriteCounts = field(default_factory=WriteCounts)
    withdrawn: int = 0
    rows_read: int = 0
    resumed: int = 0
    note: str = ""

    def add(self, counts: WriteCounts, rows_read: int = 0) -> None:
        """Add what one job did."""
        self.counts, self.rows_read = self.counts + counts, self.rows_read + rows_read


class _Attempt:
    """One attempt at one publication."""

    def __init__(
        self,
        registry: Registry,
        table: FeatureTable,
        todo: Publication,
        target: OnlineTarget,
        known: Published | None,
        totals: _Totals,
        intent_id: str,
        notes: bytes,
        done: frozenset[tuple[str, int]],
    ) -> None:
        self._registry, self._table, self._todo, self._known = registry, table, todo, known
        #: Where rows go; and the generation that the view must still have when they are noted.
        self._target, self.generation = target, target.generation
        self._totals, self._intent_id, self._notes, self._done = totals, intent_id, notes, done
        #: Whether others came in between, so that nothing may be noted.
        self.overtaken = False

    def run(self, request: Request, behind: Publication | None, log: Sequence[Commit]) -> None:
        """Write all that there is to write. ``behind``: what was written, perhaps, of an older version and never noted.

        ``log``: the table's commits up to the version to publish.
        """
        if behind:
            self._withdraw_what_is_gone(behind.version, behind.touched)
        if request.repair:
            self._offer_fresh(log, restate=False, repair=True)
            self._bury_extra()
        else:
            # What is restated comes last: it is to stay.
            self._offer_changes()
            self._offer_fresh(log, restate=request.restate, repair=False)

    def _add(self, counts: WriteCounts, rows_read: int = 0) -> None:
        self.overtaken = self.overtaken or counts.fenced > 0
        self._totals.add(counts, rows_read)

    def _offer_fresh(self, log: Sequence[Commit], *, restate: bool, repair: bool) -> None:
        """Offer all rows of the fresh intervals; a restatement or a repair lets them win over newer ones."""
        todo, target = self._todo, self._target
        if not todo.fresh:
            return
        if restate or repair:
            target = self._restating(restates=restate)
        files = files_in_place(self._table, todo.version, log, todo.fresh[0]) if len(todo.fresh) == 1 else None
        with self._confirming("fresh") as (noted, done):
            if files is not None:
                self._add(*publish_files(self._table, files, target, todo.fresh[0], noted, done))
            else:
                rows = self._rows(todo.version, todo.fresh)
                self._add(*publish_rows(self._table.view, rows, target, noted, done))
        if restate:
            # So that no other row ever carries the generation of a restatement: by it an audit tells them.
            self.generation = self._registry.raise_generation(self._table.view)

    def _offer_changes(self) -> None:
        """Offer rows that were added or changed since they were published, then restate the keys that have lost one."""
        todo, view = self._todo, self._table.view
        if not todo.compared or todo.since is None:
            return
        try:
            self._offer_differences(todo.since)
        except Exception as error:
            if not is_version_gone(error):
                raise
            with self._confirming("changed") as (noted, done):
                self._add(*publish_rows(view, self._rows(todo.version, todo.compared), self._target, noted, done))
            self._note_gone(todo.since, "all rows were offered, but")

    def _offer_differences(self, since: int) -> None:
        changed, view = self._changes(since, self._todo.compared), self._table.view
        seen, lost = Observation(), [F.count_if("_lost").alias("lost")]
        rows = changed.observe(seen, *lost).where(~F.col("_lost")).drop("_lost")
        with self._confirming("changed") as (noted, done):
            self._add(*publish_rows(view, rows, self._target, noted, done))
        if observed(seen, changed, lost)["lost"]:
            self._withdraw(changed)

    def _withdraw_what_is_gone(self, since: int, touched: Sequence[Interval]) -> None:
        """Restate keys with rows that were written, perhaps, of the table at ``since`` and are not in it any more."""
        try:
            gone = self._changes(since, touched)
            if not gone.where("_lost").isEmpty():
                self._withdraw(gone)
        except Exception as error:
            if not is_version_gone(error):
                raise
            self._note_gone(since, "an earlier run was stopped at it, and")

    def _changes(self, since: int, intervals: Sequence[Interval]) -> DataFrame:
        return changes(self._table.view, self._rows(since, intervals), self._rows(self._todo.version, intervals))

    def _note_gone(self, version: int, what: str) -> None:
        told = (
            f"Version {version} of the table is gone: {what} rows that builds have removed since may still be served. "
            f"spark-fs repair {self._table.view.reference} takes them away."
        )
        self._totals.note = " ".join(filter(None, [self._totals.note, told]))

    def _withdraw(self, changed: DataFrame) -> None:
        """Serve what the keys have now, the newest of their rows or none, where that is older than what they have lost.

        A newer one takes the place of a lost row only where that was restated and is served.
        """
        todo, view, target = self._todo, self._table.view, self._restating()
        there = rows_left(view, self._rows(todo.version, todo.intervals), changed.where("_lost"))
        written = [run_tasks(there.where("_left = 'older'"), executor.publish_rows, target)[0]]
        written.append(run_tasks(there.where("_left = 'none'").select("_key"), executor.bury_rows, target)[0])
        if self._registry.restated(view):
            written.append(run_tasks(there.where("_left = 'newer'"), executor.publish_in_place_of_lost, target)[0])
        all_ = reduce(add, written)
        self._totals.withdrawn += all_.applied + all_.expired
        self._add(WriteCounts(fenced=all_.fenced, bytes=all_.bytes, replicas=all_.replicas))

    def _bury_extra(self) -> None:
        """Put tombstones in the place of rows that no published row of the table stands for."""
        published = newest_rows(self._table.view, self._rows(self._todo.version, self._todo.intervals))
        counts, _ = run_tasks(extra_keys(published, self._target), executor.bury_rows, self._restating())
        self._totals.withdrawn += counts.applied
        self._add(WriteCounts(fenced=counts.fenced, bytes=counts.bytes, replicas=counts.replicas))

    def _restating(self, *, restates: bool = False) -> OnlineTarget:
        """The target of rows that may replace newer ones, all of what was written before.

        Raises _OvertakenError where what was known is noted no more; from here on nobody can note anything without seeing this.
        """
        self.generation = self._registry.raise_generation(self._table.view, restates=restates)
        if self._registry.published(self._table.view) != self._known:
            self.overtaken = True
            raise _OvertakenError
        return replace(self._target, generation=self.generation, restating=True)

    def _rows(self, version: int, intervals: Sequence[Interval]) -> DataFrame:
        return self._table.read(version).where(within_any(intervals))

    def _confirming(self, step: str) -> AbstractContextManager[tuple[Notes, list[int]]]:
        done = sorted(bucket for of, bucket in self._done if of == step)
        self._totals.resumed += len(done)
        return confirming(self._registry, self._target, self._intent_id, self._notes, step, done)

"""The ledger of materializations, in the registry: what runs meant to write, what of it is confirmed, and who is at it.

A run notes what it is about to publish before its first write. Whatever stops it, the next run of the view finds the note,
finishes that first, and leaves out the buckets that were confirmed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from spark_fs import registry_tables as tables
from spark_fs.errors import ConflictError
from spark_fs.intervals import Interval, from_micros, text, to_micros
from spark_fs.registry_tables import now_text, user_name
from spark_fs.spec import ViewSpec, canonical_json

_LOG = logging.getLogger(__name__)
#: A lease ends so long after its run was last heard of; a living run is heard of several times meanwhile.
LEASE_SECONDS = 60.0
_RENEW_SECONDS, _LOOK_SECONDS = 10.0, 0.25
#: So many publications of a view the ledger keeps, beside those that are not done.
KEPT_INTENTS = 50

#: Counts of what became of the rows of one bucket, by name.
Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Published:
    """What of a view is online: rows of its table at ``table_version`` with event times in ``intervals`` (merged).

    ``token`` is the mark that the run has left in the online store; empty where it left none. ``epoch`` counts the full
    refreshes: readers see the rows of one epoch only.
    """

    table_version: int
    intervals: tuple[Interval, ...]
    token: str = ""
    epoch: int = 0

    def to_json(self) -> dict[str, Any]:
        """The claim as JSON values; instants in microseconds."""
        pairs = [[to_micros(interval.start), to_micros(interval.end)] for interval in self.intervals]
        return {"table_version": self.table_version, "intervals": pairs, "token": self.token, "epoch": self.epoch}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Published:
        """The claim that ``to_json`` has given."""
        intervals = tuple(Interval(*map(from_micros, pair)) for pair in body["intervals"])
        return cls(body["table_version"], intervals, body["token"], body["epoch"])


@dataclass(frozen=True, slots=True)
class Part:
    """A bucket of one step of a publication of which every row is confirmed, with the generation its rows were written with."""

    step: str
    bucket: int
    generation: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class Intent:
    """What a run has set out to publish: ``plan`` says what (JSON), ``token`` is the mark it left online before it wrote.

    ``state``: ``running`` until it is ``done``; a run that was stopped leaves it ``running`` for the next one.
    """

    intent_id: str
    run_id: str
    view: str
    plan: Mapping[str, Any]
    token: str
    state: str
    started_at: str
    finished_at: str | None = None
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What people are shown of it: table version, intervals, state, and the counts of each confirmed bucket."""
        todo = self.plan["todo"]
        intervals = {name: [[text(from_micros(us)) for us in pair] for pair in todo[name]] for name in ("fresh", "compared")}
        times = {"started_at": self.started_at, "finished_at": self.finished_at}
        left = {"state": self.state, **times, "buckets_left": self.buckets_left}
        parts = [{"step": p.step, "bucket": p.bucket, "generation": p.generation, **p.counts} for p in self.parts]
        return {"view": self.view, "table_version": todo["version"], **intervals, **left, "buckets": parts}

    @property
    def buckets_left(self) -> int:
        """How many buckets are not confirmed yet, at most: empty ones never are."""
        steps = sum(bool(self.plan["todo"][step]) for step in ("fresh", "compared"))
        return 0 if self.state == "done" else max(steps * self.plan["buckets"] - len(self.parts), 0)


@dataclass(frozen=True, slots=True)
class Lease:
    """Who works on a view, and until when nobody else may: renewed while the run lives."""

    run_id: str
    holder: str
    host: str
    pid: int
    taken_at: str
    expires_us: int

    @property
    def expires_at(self) -> str:
        """The end of the lease as text."""
        return text(from_micros(self.expires_us))

    def is_over(self, now_us: int) -> bool:
        """Whether another run may take over: the lease has run out, or its process on this machine has ended."""
        return self.expires_us <= now_us or (self.host == socket.gethostname() and not _is_running(self.pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    try:
        # A process that has ended and whose parent has not asked for it yet is there, but does nothing any more.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


@dataclass(frozen=True)
class Ledger:
    """One project's part of the ledger."""

    project: str
    _transaction: Callable[[], AbstractContextManager[sa.Connection]] = field(repr=False)

    # What runs meant to do, and have done.

    def begin(self, view: ViewSpec, run_id: str, plan: Mapping[str, Any], token: str) -> str:
        """Note what a run is about to publish; gives the number of the note."""
        intent_id = uuid.uuid4().hex[:12]
        values = {"intent_id": intent_id, "run_id": run_id, "plan": canonical_json(plan), "token": token}
        with self._transaction() as connection:
            connection.execute(
                tables.intents.insert().values(
                    **self._identity(view), **values, state="running", started_us=_now_us(), started_at=now_text()
                )
            )
        return intent_id

    def note_parts(self, intent_id: str, parts: list[Part]) -> None:
        """Note buckets as confirmed; those noted before get the new counts."""
        with self._transaction() as connection:
            for part in parts:
                place = tables.parts.c
                same = (place.intent_id == intent_id) & (place.step == part.step) & (place.bucket == part.bucket)
                connection.execute(tables.parts.delete().where(same))
                connection.execute(
                    tables.parts.insert().values(
                        intent_id=intent_id,
                        step=part.step,
                        bucket=part.bucket,
                        generation=part.generation,
                        counts=canonical_json(part.counts),
                    )
                )

    def finish(self, intent_id: str) -> None:
        """Note that all of it is published. Of a view the last ``KEPT_INTENTS`` that are done are kept, with their buckets."""
        values, known = {"state": "done", "finished_at": now_text()}, tables.intents.c
        with self._transaction() as connection:
            noted = tables.intents.update().where(known.intent_id == intent_id).values(values)
            row = connection.execute(noted.returning(known.project, known.view, known.version)).one_or_none()
            if row is None:
                return  # its view was destroyed meanwhile
            of_view = (known.project == row.project) & (known.view == row.view) & (known.version == row.version)
            done = sa.select(known.intent_id).where(of_view, known.state == "done").order_by(known.started_us.desc())
            old = connection.execute(done.offset(KEPT_INTENTS)).scalars().all()
            for table in (tables.parts, tables.intents) if old else ():
                connection.execute(table.delete().where(table.c.intent_id.in_(old)))

    def unfinished(self, view: ViewSpec) -> list[Intent]:
        """What runs of the view version have left, the oldest first."""
        return self._intents(self._of(tables.intents, view) & (tables.intents.c.state == "running"))

    def of_run(self, run_id: str) -> list[Intent]:
        """What one run has set out to publish, the oldest first."""
        return self._intents((tables.intents.c.project == self.project) & (tables.intents.c.run_id == run_id))

    def _intents(self, which: sa.ColumnElement[bool]) -> list[Intent]:
        query = sa.select(tables.intents).where(which).order_by(tables.intents.c.started_us, tables.intents.c.intent_id)
        with self._transaction() as connection:
            rows = connection.execute(query).all()
            ids = [row.intent_id for row in rows]
            found = connection.execute(sa.select(tables.parts).where(tables.parts.c.intent_id.in_(ids))).all() if ids else []
        parts: dict[str, list[Part]] = {intent_id: [] for intent_id in ids}
        for row in found:
            parts[row.intent_id].append(Part(row.step, row.bucket, row.generation, json.loads(row.counts)))
        return [
            Intent(
                intent_id=row.intent_id,
                run_id=row.run_id,
                view=f"{row.view}@{row.version}",
                plan=json.loads(row.plan),
                token=row.token,
                state=row.state,
                started_at=row.started_at,
                finished_at=row.finished_at,
                parts=tuple(sorted(parts[row.intent_id], key=lambda part: (part.step, part.bucket))),
            )
            for row in rows
        ]

    def forget(self, view: ViewSpec) -> None:
        """Forget all of a view version whose table and online values are gone."""
        with self._transaction() as connection:
            mine = sa.select(tables.intents.c.intent_id).where(self._of(tables.intents, view))
            connection.execute(tables.parts.delete().where(tables.parts.c.intent_id.in_(mine)))
            connection.execute(tables.intents.delete().where(self._of(tables.intents, view)))
            connection.execute(tables.leases.delete().where(self._of(tables.leases, view)))

    # Who works on a view.

    def take(self, view: ViewSpec, run_id: str, seconds: float) -> Lease | None:
        """Take the view's lease for so many seconds, also over from a run that is over; the lease in the way, if any.

        Clocks of machines may differ: a lease taken over too early costs work, never a wrong value, for writes are guarded.
        """
        values = {
            "run_id": run_id,
            "holder": f"{user_name()}@{socket.gethostname()}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "taken_at": now_text(),
            "expires_us": _now_us() + int(seconds * 1_000_000),
        }
        mine = self._of(tables.leases, view)
        try:
            with self._transaction() as connection:
                # Written first, so that of two at once one waits for the other's end.
                connection.execute(tables.leases.update().where(mine).values(run_id=tables.leases.c.run_id))
                row = connection.execute(sa.select(tables.leases).where(mine)).one_or_none()
                if row is None:
                    connection.execute(tables.leases.insert().values(**self._identity(view), **values))
                    return None
                there = Lease(row.run_id, row.holder, row.host, row.pid, row.taken_at, row.expires_us)
                if there.run_id != run_id and not there.is_over(_now_us()):
                    return there
                connection.execute(tables.leases.update().where(mine).values(values))
                left = (tables.runs.c.run_id == there.run_id) & (tables.runs.c.state == "running")
                ended = {"state": "interrupted", "details": canonical_json({"taken_over_by": run_id})}
                if there.run_id != run_id:
                    connection.execute(tables.runs.update().where(left).values(**ended, finished_at=now_text()))
                return None
        except IntegrityError:
            return self.take(view, run_id, seconds)  # another run was quicker to be the first

    @contextmanager
    def held(self, view: ViewSpec, run_id: str, wait_seconds: float) -> Iterator[None]:
        """Hold the view's lease for the block; waits so long for another run. Raises ConflictError SFS-617 after that."""
        self._wait_for(view, run_id, wait_seconds)
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(_RENEW_SECONDS):
                with suppress(Exception):  # the registry may be away for a moment
                    self.renew(view, run_id, LEASE_SECONDS)

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            self.release(view, run_id)

    def _wait_for(self, view: ViewSpec, run_id: str, wait_seconds: float) -> None:
        deadline, told = time.monotonic() + wait_seconds, False
        while (there := self.take(view, run_id, LEASE_SECONDS)) is not None:
            who = f"run {there.run_id} of {there.holder} (process {there.pid}, since {there.taken_at})"
            if time.monotonic() >= deadline:
                raise ConflictError.of(
                    "SFS-617",
                    f"Another run is at feature view '{view.reference}'.",
                    why=f"It is {who}; if it is dead, its lease ends at {there.expires_at}.",
                    fix="wait for its end, or raise online.lease_wait_seconds",
                )
            if not told:
                _LOG.warning("%s: waiting for %s", view.reference, who)
                told = True
            time.sleep(_LOOK_SECONDS)

    def renew(self, view: ViewSpec, run_id: str, seconds: float) -> bool:
        """Keep the lease for so many seconds from now; False where another run has taken it over."""
        mine = self._of(tables.leases, view) & (tables.leases.c.run_id == run_id)
        values = {"expires_us": _now_us() + int(seconds * 1_000_000)}
        with self._transaction() as connection:
            return connection.execute(tables.leases.update().where(mine).values(values)).rowcount == 1

    def release(self, view: ViewSpec, run_id: str) -> None:
        """Give the lease back, if it is still this run's."""
        with self._transaction() as connection:
            connection.execute(tables.leases.delete().where(self._of(tables.leases, view) & (tables.leases.c.run_id == run_id)))

    def _identity(self, view: ViewSpec) -> dict[str, Any]:
        return {"project": self.project, "view": view.name, "version": view.version}

    def _of(self, table: sa.Table, view: ViewSpec) -> sa.ColumnElement[bool]:
        return sa.and_(*(table.c[name] == value for name, value in self._identity(view).items()))


def _now_us() -> int:
    return time.time_ns() // 1000

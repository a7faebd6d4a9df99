"""The registry: applied definitions, builds, runs, what is published and erasures, in SQLite or PostgreSQL.

Objects are canonical JSON. ``serial`` counts applies; a commit names the serial it was planned against and changes
nothing when somebody else was first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, ProgrammingError

from spark_fs import registry_tables as tables
from spark_fs.dataset_index import DatasetIndex
from spark_fs.errors import ConflictError, InvalidError, did_you_mean, translate, without_secrets
from spark_fs.intervals import Interval, from_micros, merge, to_micros
from spark_fs.ledger import Ledger, Published
from spark_fs.registry_tables import now_text, user_name
from spark_fs.spec import ServiceSpec, SourceSpec, ViewSpec, canonical_json


@dataclass(frozen=True, slots=True)
class State:
    """All applied definitions of one project at one serial."""

    project: str
    serial: int
    entities: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, SourceSpec]
    views: Mapping[str, ViewSpec]
    versions: Mapping[tuple[str, int], ViewSpec]
    services: Mapping[str, ServiceSpec]

    def require_view(self, name: str, version: int | None = None) -> ViewSpec:
        """The current (or the given) version of a view; SFS-303 with the known names otherwise."""
        view = self.views.get(name) if version is None else self.versions.get((name, version))
        if view is None:
            shown = name if version is None else f"{name}@{version}"
            known = self.views if version is None else [f"{n}@{v}" for n, v in self.versions]
            raise InvalidError.of(
                "SFS-303",
                f"There is no feature view '{shown}'.",
                why=did_you_mean(shown, known),
                fix="run spark-fs apply if it is new",
            )
        return view

    def require_service(self, name: str) -> ServiceSpec:
        """The service; SFS-303 with the known names otherwise."""
        if name not in self.services:
            raise InvalidError.of(
                "SFS-303",
                f"There is no feature service '{name}'.",
                why=did_you_mean(name, self.services),
                fix="run spark-fs apply if it is new",
            )
        return self.services[name]


@dataclass(frozen=True, slots=True)
class Change:
    """One object to write (or, with no body, to take out of use). ``kind``: entity, source, view or service."""

    kind: str
    name: str
    version: int
    body: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build: its number, its interval, and what was noted of it."""

    build: int
    interval: Interval
    details: Mapping[str, Any]


class Registry:
    """One project's part of a registry database."""

    def __init__(self, url: str, project: str) -> None:
        self.project = project
        self._url = url
        if url.startswith("sqlite:///"):
            tables.prepare_file(Path(url.removeprefix("sqlite:///")))
        self._engine = sa.create_engine(url, connect_args={"timeout": 30} if url.startswith("sqlite") else {})
        self._open()
        #: Materializations: what they meant to publish, what is confirmed, and who is at it.
        self.ledger = Ledger(project, self._transaction)
        self.datasets = DatasetIndex(project, self._transaction)

    def __repr__(self) -> str:
        return f"Registry({without_secrets(self._url)!r}, {self.project!r})"

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            if "locked" in str(error):
                raise ConflictError.of("SFS-306", "Another process holds the registry.", fix="try again") from error
            raise (translate(error) or error) from error
        except (IntegrityError, ProgrammingError):
            raise
        except DatabaseError as error:
            raise tables.damaged(without_secrets(str(error.orig))) from error

    def _open(self) -> None:
        """Make the tables where there are none of ours; refuse a registry that is newer, or has lost some of them."""
        try:
            with self._transaction() as connection:
                there = set(sa.inspect(connection).get_table_names()) & set(tables.TABLES.tables)
                if not there:
                    tables.create_tables(connection)
        except (IntegrityError, ProgrammingError):
            there = set(tables.TABLES.tables)  # another process has made them in this very moment
        if there and tables.formats.name not in there:
            raise tables.damaged(f"It has lost {tables.formats.name}.")
        with self._transaction() as connection:
            found = connection.execute(sa.select(tables.formats.c.version)).scalars().all()
        if not found:
            raise tables.damaged("It has lost its format mark.")
        if max(found) > tables.FORMAT:
            raise InvalidError.of(
                "SFS-302", f"The registry has format {max(found)}; this spark_fs knows {tables.FORMAT}.", fix="upgrade spark-fs"
            )
        # Looked for after the format was read: another process may bring the registry up at this moment.
        newer = {table for version, names in tables.NEW_TABLES.items() if version > max(found) for table in names}
        with self._transaction() as connection:
            lost = set(tables.TABLES.tables) - set(sa.inspect(connection).get_table_names()) - newer
        if lost:
            raise tables.damaged(f"It has lost {', '.join(sorted(lost))}.")
        if max(found) < tables.FORMAT:
            with suppress(IntegrityError, ProgrammingError), self._transaction() as connection:  # others may do it too
                tables.bring_up(connection, max(found))

    def state(self) -> State:
        """The applied definitions, all from one moment."""
        # One statement sees one moment, in both databases and at every isolation level.
        joined = tables.serials.outerjoin(tables.objects, tables.serials.c.project == tables.objects.c.project)
        query = (
            sa.select(tables.serials.c.serial, tables.objects)
            .select_from(joined)
            .where(tables.serials.c.project == self.project)
        )
        with self._transaction() as connection:
            found = connection.execute(query).all()
        try:
            return self._state(found[0].serial if found else 0, [row for row in found if row.kind is not None])
        except (ValueError, KeyError, TypeError) as error:
            raise tables.damaged(f"An object in it cannot be read: {error}.") from error

    def _state(self, serial: int, rows: Sequence[Any]) -> State:
        bodies = {(row.kind, row.name, row.version): json.loads(row.body) for row in rows}
        current = {(row.kind, row.name): row.version for row in rows if row.current}
        versions = {(name, n): ViewSpec.from_json(body) for (kind, name, n), body in bodies.items() if kind == "view"}

        def now(kind: str) -> dict[str, Any]:
            return {name: bodies[(kind, name, n)] for (of_kind, name), n in sorted(current.items()) if of_kind == kind}

        return State(
            project=self.project,
            serial=serial,
            entities=now("entity"),
            sources={name: SourceSpec(**body) for name, body in now("source").items()},
            views={name: versions[(name, current[("view", name)])] for name in now("view")},
            versions=versions,
            services={name: ServiceSpec.from_json(body) for name, body in now("service").items()},
        )

    def commit(self, serial: int, changes: Sequence[Change], summary: str) -> int:
        """Carry out the changes in one transaction and return the new serial.

        ``serial`` is the one the changes were planned against; if it has moved, nothing changes: ConflictError SFS-305.
        """
        with self._transaction() as connection:
            try:
                if serial == 0:
                    connection.execute(tables.serials.insert().values(project=self.project, serial=1))
                    moved = 1
                else:
                    mine = (tables.serials.c.project == self.project) & (tables.serials.c.serial == serial)
                    moved = connection.execute(tables.serials.update().where(mine).values(serial=serial + 1)).rowcount
            except IntegrityError:
                moved = 0
            if moved != 1:
                raise ConflictError.of(
                    "SFS-305",
                    "The registry has changed since this plan was made; nothing was applied.",
                    why=f"It was planned against serial {serial}.",
                    fix="plan again, then apply",
                )
            for change in changes:
                self._write(connection, change)
            connection.execute(
                tables.applies.insert().values(
                    project=self.project, serial=serial + 1, at=now_text(), by=user_name(), summary=summary
                )
            )
        return serial + 1

    def _write(self, connection: sa.Connection, change: Change) -> None:
        objects = tables.objects.c
        same_name = (objects.project == self.project) & (objects.kind == change.kind) & (objects.name == change.name)
        connection.execute(tables.objects.update().where(same_name).values(current=False))
        if change.body is None:
            if change.kind != "view":
                connection.execute(tables.objects.delete().where(same_name))
            return
        connection.execute(tables.objects.delete().where(same_name & (objects.version == change.version)))
        connection.execute(
            tables.objects.insert().values(
                project=self.project,
                kind=change.kind,
                name=change.name,
                version=change.version,
                body=canonical_json(change.body),
                current=True,
            )
        )

    def history(self) -> list[dict[str, Any]]:
        """The applies of the project, newest first: serial, at, by, summary."""
        query = (
            sa.select(tables.applies).where(tables.applies.c.project == self.project).order_by(tables.applies.c.serial.desc())
        )
        with self._transaction() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    # Builds: which intervals of which view version are in its feature table.

    def begin_build(self, view: ViewSpec, interval: Interval) -> int:
        """Note that a build has begun and return its number, greater than all before it for this view version."""
        while True:
            try:
                return self._insert_build(view, interval)
            except IntegrityError:
                continue  # another process has just taken this number: the next one is free or somebody else's

    def _insert_build(self, view: ViewSpec, interval: Interval) -> int:
        mine = self._of(tables.builds, view)
        with self._transaction() as connection:
            number = sa.select(sa.func.coalesce(sa.func.max(tables.builds.c.build), 0) + 1).where(mine).scalar_subquery()
            inserted = connection.execute(
                tables.builds.insert()
                .values(
                    project=self.project,
                    view=view.name,
                    version=view.version,
                    build=number,
                    start_us=to_micros(interval.start),
                    end_us=to_micros(interval.end),
                    state="running",
                    started_at=now_text(),
                    details="{}",
                )
                .returning(tables.builds.c.build)
            )
            return int(inserted.scalar_one())

    def finish_build(self, view: ViewSpec, build: int, state: str, details: Mapping[str, Any]) -> None:
        """Note how a build ended: ``done``, ``failed`` or ``interrupted``."""
        mine = self._of(tables.builds, view) & (tables.builds.c.build == build)
        values = {"state": state, "finished_at": now_text(), "details": canonical_json(details)}
        with self._transaction() as connection:
            connection.execute(tables.builds.update().where(mine).values(values))

    def built(self, view: ViewSpec) -> list[Interval]:
        """The intervals that finished builds cover, merged."""
        query = sa.select(tables.builds.c.start_us, tables.builds.c.end_us).where(
            self._of(tables.builds, view), tables.builds.c.state == "done"
        )
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return merge(Interval(from_micros(start), from_micros(end)) for start, end in rows)

    def last_build(self, view: ViewSpec) -> Build | None:
        """The finished build that reached furthest, the newest of those; None without any."""
        query = sa.select(tables.builds).where(self._of(tables.builds, view), tables.builds.c.state == "done")
        with self._transaction() as connection:
            row = connection.execute(
                query.order_by(tables.builds.c.end_us.desc(), tables.builds.c.build.desc()).limit(1)
            ).one_or_none()
        if row is None:
            return None
        return Build(row.build, Interval(from_micros(row.start_us), from_micros(row.end_us)), json.loads(row.details))

    def forget_builds(self, view: ViewSpec) -> None:
        """Forget what was built and published of a view version whose table and online values are gone."""
        with self._transaction() as connection:
            connection.execute(tables.builds.update().where(self._of(tables.builds, view)).values(state="destroyed"))
            connection.execute(tables.published.delete().where(self._of(tables.published, view)))
        self.ledger.forget(view)

    # What is online: published intervals, generations, erasures.

    def published(self, view: ViewSpec) -> Published | None:
        """What has been published of a view version, or None."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(tables.published).where(self._of(tables.published, view))).one_or_none()
        if row is None:
            return None
        known = {"table_version": row.table_version, "token": row.token, "epoch": row.epoch}
        return Published.from_json({**known, "intervals": json.loads(row.intervals)})

    def previous(self, view: ViewSpec) -> Published | None:
        """What was published before the last full refresh or rollback, or None."""
        query = sa.select(tables.published.c.previous).where(self._of(tables.published, view))
        with self._transaction() as connection:
            found = connection.execute(query).scalar()
        return Published.from_json(json.loads(found)) if found else None

    def epochs(self, view: ViewSpec) -> list[int]:
        """The epochs of a view version of which rows may be online: served, kept to go back to, or being written."""
        claims = (self.published(view), self.previous(view))
        begun = {int(intent.plan.get("epoch", 0)) for intent in self.ledger.unfinished(view)}
        return sorted({*begun, *(claim.epoch for claim in claims if claim)}) or [0]

    def set_published(self, view: ViewSpec, before: Published | None, after: Published, generation: int) -> bool:
        """Note what is published, in the place of ``before``.

        False, and no change, where that is noted no more or the generation is another one by now. With another epoch ``before``
        is kept as what can be rolled back to.
        """
        values = _columns_of(after)
        if before is not None and before.epoch != after.epoch:
            values["previous"] = canonical_json(before.to_json())
        self._begin_generations(view)
        try:
            with self._transaction() as connection:
                # Written, so that whoever raises it at the same time has to wait for the end of this.
                mine = self._of(tables.generations, view) & (tables.generations.c.generation == generation)
                if connection.execute(tables.generations.update().where(mine).values(generation=generation)).rowcount != 1:
                    return False
                if before is None:
                    identity = {"project": self.project, "view": view.name, "version": view.version}
                    connection.execute(tables.published.insert().values(**identity, **values))
                    return True
                known = _columns_of(before)
                same = sa.and_(*(tables.published.c[name] == value for name, value in known.items()))
                changed = connection.execute(
                    tables.published.update().where(self._of(tables.published, view) & same).values(values)
                )
                return changed.rowcount == 1
        except IntegrityError:
            return False

    def generation(self, view: ViewSpec) -> int:
        """The generation of rows that a writer which begins now publishes; 1 until something is restated."""
        with self._transaction() as connection:
            found = connection.execute(
                sa.select(tables.generations.c.generation).where(self._of(tables.generations, view))
            ).scalar()
        return int(found or 1)

    def raise_generation(self, view: ViewSpec, *, restates: bool = False) -> int:
        """A generation greater than all before it; ``restates``: rows written with it may be older on purpose."""
        self._begin_generations(view)
        raised = (
            tables.generations.update()
            .where(self._of(tables.generations, view))
            .values(generation=tables.generations.c.generation + 1)
        )
        with self._transaction() as connection:
            row = connection.execute(raised.returning(tables.generations.c.generation, tables.generations.c.restated)).one()
            if restates:
                known = canonical_json([*json.loads(row.restated), row.generation])
                connection.execute(tables.generations.update().where(self._of(tables.generations, view)).values(restated=known))
        return int(row.generation)

    def _begin_generations(self, view: ViewSpec) -> None:
        identity = {"project": self.project, "view": view.name, "version": view.version}
        with suppress(IntegrityError), self._transaction() as connection:
            connection.execute(tables.generations.insert().values(**identity, generation=1, restated="[]"))

    def restated(self, view: ViewSpec) -> frozenset[int]:
        """The generations whose rows may be older than the table's newest, on purpose."""
        with self._transaction() as connection:
            found = connection.execute(
                sa.select(tables.generations.c.restated).where(self._of(tables.generations, view))
            ).scalar()
        return frozenset(json.loads(found or "[]"))

    def erased(self, view: ViewSpec) -> frozenset[bytes]:
        """The digests of the view's keys that must never be published, of all its versions."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(tables.erasures.c.digest).where(self._named(tables.erasures, view))).scalars()
            return frozenset(map(bytes.fromhex, found))

    def erase(self, view: ViewSpec, digests: Iterable[bytes]) -> None:
        """Note keys that must never be published again."""
        for digest in digests:
            values = {"project": self.project, "view": view.name, "digest": digest.hex(), "at": now_text(), "by": user_name()}
            with suppress(IntegrityError), self._transaction() as connection:  # noted before
                connection.execute(tables.erasures.insert().values(values))

    def forget_erasures(self, view: ViewSpec, digests: Iterable[bytes]) -> int:
        """Allow keys to be published again; how many of them were erased."""
        texts = [digest.hex() for digest in digests]
        with self._transaction() as connection:
            mine = self._named(tables.erasures, view) & tables.erasures.c.digest.in_(texts)
            return connection.execute(tables.erasures.delete().where(mine)).rowcount

    # Runs: what was done when, and how it ended.

    def begin_run(self, run_id: str, kind: str, subject: str) -> None:
        """Note that a run has begun."""
        with self._transaction() as connection:
            connection.execute(
                tables.runs.insert().values(
                    run_id=run_id,
                    project=self.project,
                    kind=kind,
                    subject=subject,
                    state="running",
                    started_at=now_text(),
                    details="{}",
                )
            )

    def finish_run(self, run_id: str, state: str, details: Mapping[str, Any]) -> None:
        """Note how a run ended: ``done``, ``failed`` or ``interrupted``."""
        values = {"state": state, "finished_at": now_text(), "details": canonical_json(details)}
        with self._transaction() as connection:
            connection.execute(tables.runs.update().where(tables.runs.c.run_id == run_id).values(values))

    def runs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The latest runs, newest first: run_id, kind, subject, state, started_at, finished_at and their details."""
        query = (
            sa.select(tables.runs)
            .where(tables.runs.c.project == self.project)
            .order_by(tables.runs.c.started_at.desc())
            .limit(limit)
        )
        with self._transaction() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        return [{**row, "details": json.loads(row["details"])} for row in rows]

    def require_run(self, run_id: str) -> dict[str, Any]:
        """One run, as ``runs`` gives it; SFS-303 where there is none of that number."""
        query = sa.select(tables.runs).where(tables.runs.c.project == self.project, tables.runs.c.run_id == run_id)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise InvalidError.of("SFS-303", f"There is no run '{run_id}'.", fix="spark-fs runs lists the latest")
        return {**row._mapping, "details": json.loads(row.details)}

    def _named(self, table: sa.Table, view: ViewSpec) -> sa.ColumnElement[bool]:
        return (table.c.project == self.project) & (table.c.view == view.name)

    def _of(self, table: sa.Table, view: ViewSpec) -> sa.ColumnElement[bool]:
        return self._named(table, view) & (table.c.version == view.version)


def _columns_of(published: Published) -> dict[str, Any]:
    values = published.to_json()
    return {**values, "intervals": canonical_json(values["intervals"])}

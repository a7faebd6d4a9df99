"""The registry: applied definitions, builds, runs, what is published, erasures and datasets, in SQLite or PostgreSQL.

Objects are canonical JSON. ``serial`` counts applies; a commit names the serial it was planned against and changes
nothing when somebody else was first.
"""

from __future__ import annotations

import getpass
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, ProgrammingError

from spark_fs.errors import ConflictError, InvalidError, SparkFSError, did_you_mean, translate, without_secrets
from spark_fs.intervals import BEGINNING, UTC, Interval, from_micros, merge, to_micros
from spark_fs.spec import ServiceSpec, SourceSpec, ViewSpec, canonical_json

#: Raised when the tables change; a registry written by a newer spark_fs is refused, an older one is brought up to it.
FORMAT = 2

_tables = sa.MetaData()
_format = sa.Table("sfs_format", _tables, sa.Column("version", sa.Integer, primary_key=True))
_serials = sa.Table(
    "sfs_serials",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("serial", sa.Integer, nullable=False),
)
_objects = sa.Table(
    "sfs_objects",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("current", sa.Boolean, nullable=False),
)
_applies = sa.Table(
    "sfs_applies",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("serial", sa.Integer, primary_key=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
)
_builds = sa.Table(
    "sfs_builds",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("build", sa.Integer, primary_key=True),
    sa.Column("start_us", sa.BigInteger, nullable=False),
    sa.Column("end_us", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("details", sa.Text, nullable=False),
)
_runs = sa.Table(
    "sfs_runs",
    _tables,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("details", sa.Text, nullable=False),
)
_published = sa.Table(
    "sfs_published",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("table_version", sa.BigInteger, nullable=False),
    sa.Column("intervals", sa.Text, nullable=False),
)
_generations = sa.Table(
    "sfs_generations",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
)
_erasures = sa.Table(
    "sfs_erasures",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
)
_datasets = sa.Table(
    "sfs_datasets",
    _tables,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
)


#: What a registry of format 1 lacks.
_NEW_IN_2 = {table.name for table in (_published, _generations, _erasures)}


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


@dataclass(frozen=True, slots=True)
class Published:
    """What of a view is online: rows of its table at ``table_version`` with event times in ``intervals`` (merged)."""

    table_version: int
    intervals: tuple[Interval, ...]


class Registry:
    """One project's part of a registry database."""

    def __init__(self, url: str, project: str) -> None:
        self.project = project
        self._url = url
        if url.startswith("sqlite:///"):
            _prepare_file(Path(url.removeprefix("sqlite:///")))
        self._engine = sa.create_engine(url, connect_args={"timeout": 30} if url.startswith("sqlite") else {})
        self._open()

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
            raise _damaged(without_secrets(str(error.orig))) from error

    def _open(self) -> None:
        """Make the tables where there are none of ours; refuse a registry that is newer, or has lost some of them."""
        try:
            with self._transaction() as connection:
                there = set(sa.inspect(connection).get_table_names()) & set(_tables.tables)
                if not there:
                    _create_tables(connection)
        except (IntegrityError, ProgrammingError):
            there = set(_tables.tables)  # another process has made them in this very moment
        if there and _format.name not in there:
            raise _damaged(f"It has lost {_format.name}.")
        with self._transaction() as connection:
            found = connection.execute(sa.select(_format.c.version)).scalars().all()
        if not found:
            raise _damaged("It has lost its format mark.")
        if max(found) > FORMAT:
            raise InvalidError.of(
                "SFS-302", f"The registry has format {max(found)}; this spark_fs knows {FORMAT}.", fix="upgrade spark-fs"
            )
        lost = set(_tables.tables) - there - (_NEW_IN_2 if max(found) == 1 else set()) if there else set()
        if lost:
            raise _damaged(f"It has lost {', '.join(sorted(lost))}.")
        if max(found) < FORMAT:
            with suppress(IntegrityError, ProgrammingError), self._transaction() as connection:  # others may do it too
                _from_1_to_2(connection)

    def state(self) -> State:
        """The applied definitions, all from one moment."""
        # One statement sees one moment, in both databases and at every isolation level.
        joined = _serials.outerjoin(_objects, _serials.c.project == _objects.c.project)
        query = sa.select(_serials.c.serial, _objects).select_from(joined).where(_serials.c.project == self.project)
        with self._transaction() as connection:
            found = connection.execute(query).all()
        try:
            return self._state(found[0].serial if found else 0, [row for row in found if row.kind is not None])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(f"An object in it cannot be read: {error}.") from error

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
                    connection.execute(_serials.insert().values(project=self.project, serial=1))
                    moved = 1
                else:
                    mine = (_serials.c.project == self.project) & (_serials.c.serial == serial)
                    moved = connection.execute(_serials.update().where(mine).values(serial=serial + 1)).rowcount
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
                _applies.insert().values(project=self.project, serial=serial + 1, at=_now(), by=_user(), summary=summary)
            )
        return serial + 1

    def _write(self, connection: sa.Connection, change: Change) -> None:
        objects = _objects.c
        same_name = (objects.project == self.project) & (objects.kind == change.kind) & (objects.name == change.name)
        connection.execute(_objects.update().where(same_name).values(current=False))
        if change.body is None:
            if change.kind != "view":
                connection.execute(_objects.delete().where(same_name))
            return
        connection.execute(_objects.delete().where(same_name & (objects.version == change.version)))
        connection.execute(
            _objects.insert().values(
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
        query = sa.select(_applies).where(_applies.c.project == self.project).order_by(_applies.c.serial.desc())
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
        mine = self._of(_builds, view)
        with self._transaction() as connection:
            number = sa.select(sa.func.coalesce(sa.func.max(_builds.c.build), 0) + 1).where(mine).scalar_subquery()
            inserted = connection.execute(
                _builds.insert()
                .values(
                    project=self.project,
                    view=view.name,
                    version=view.version,
                    build=number,
                    start_us=to_micros(interval.start),
                    end_us=to_micros(interval.end),
                    state="running",
                    started_at=_now(),
                    details="{}",
                )
                .returning(_builds.c.build)
            )
            return int(inserted.scalar_one())

    def finish_build(self, view: ViewSpec, build: int, state: str, details: Mapping[str, Any]) -> None:
        """Note how a build ended: ``done``, ``failed`` or ``interrupted``."""
        mine = self._of(_builds, view) & (_builds.c.build == build)
        values = {"state": state, "finished_at": _now(), "details": canonical_json(details)}
        with self._transaction() as connection:
            connection.execute(_builds.update().where(mine).values(values))

    def built(self, view: ViewSpec) -> list[Interval]:
        """The intervals that finished builds cover, merged."""
        query = sa.select(_builds.c.start_us, _builds.c.end_us).where(self._of(_builds, view), _builds.c.state == "done")
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return merge(Interval(from_micros(start), from_micros(end)) for start, end in rows)

    def last_build(self, view: ViewSpec) -> Build | None:
        """The finished build that reached furthest, the newest of those; None without any."""
        query = sa.select(_builds).where(self._of(_builds, view), _builds.c.state == "done")
        with self._transaction() as connection:
            row = connection.execute(query.order_by(_builds.c.end_us.desc(), _builds.c.build.desc()).limit(1)).one_or_none()
        if row is None:
            return None
        return Build(row.build, Interval(from_micros(row.start_us), from_micros(row.end_us)), json.loads(row.details))

    def forget_builds(self, view: ViewSpec) -> None:
        """Forget what was built and published of a view version whose table and online values are gone."""
        with self._transaction() as connection:
            connection.execute(_builds.update().where(self._of(_builds, view)).values(state="destroyed"))
            connection.execute(_published.delete().where(self._of(_published, view)))

    # What is online: published intervals, generations, erasures.

    def published(self, view: ViewSpec) -> Published | None:
        """What has been published of a view version, or None."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(_published).where(self._of(_published, view))).one_or_none()
        if row is None:
            return None
        return Published(row.table_version, tuple(Interval(*map(from_micros, pair)) for pair in json.loads(row.intervals)))

    def set_published(self, view: ViewSpec, before: Published | None, after: Published) -> bool:
        """Note what is published, in the place of ``before``; False, and no change, where that is noted no more."""
        values = _published_values(after)
        try:
            with self._transaction() as connection:
                if before is None:
                    identity = {"project": self.project, "view": view.name, "version": view.version}
                    connection.execute(_published.insert().values(**identity, **values))
                    return True
                known = _published_values(before)
                same = sa.and_(*(_published.c[name] == value for name, value in known.items()))
                changed = connection.execute(_published.update().where(self._of(_published, view) & same).values(values))
                return changed.rowcount == 1
        except IntegrityError:
            return False

    def generation(self, view: ViewSpec) -> int:
        """The generation of rows that a writer which begins now publishes; 1 until something is restated."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(_generations.c.generation).where(self._of(_generations, view))).scalar()
        return int(found or 1)

    def raise_generation(self, view: ViewSpec) -> int:
        """A generation greater than all before it, for a restatement."""
        identity = {"project": self.project, "view": view.name, "version": view.version}
        with suppress(IntegrityError), self._transaction() as connection:
            connection.execute(_generations.insert().values(**identity, generation=1))
        raised = _generations.update().where(self._of(_generations, view)).values(generation=_generations.c.generation + 1)
        with self._transaction() as connection:
            return int(connection.execute(raised.returning(_generations.c.generation)).scalar_one())

    def erased(self, view: ViewSpec) -> frozenset[bytes]:
        """The digests of the view's keys that must never be published, of all its versions."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(_erasures.c.digest).where(self._named(_erasures, view))).scalars()
            return frozenset(map(bytes.fromhex, found))

    def erase(self, view: ViewSpec, digests: Iterable[bytes]) -> None:
        """Note keys that must never be published again."""
        for digest in digests:
            values = {"project": self.project, "view": view.name, "digest": digest.hex(), "at": _now(), "by": _user()}
            with suppress(IntegrityError), self._transaction() as connection:  # noted before
                connection.execute(_erasures.insert().values(values))

    def forget_erasures(self, view: ViewSpec, digests: Iterable[bytes]) -> int:
        """Allow keys to be published again; how many of them were erased."""
        texts = [digest.hex() for digest in digests]
        with self._transaction() as connection:
            mine = self._named(_erasures, view) & _erasures.c.digest.in_(texts)
            return connection.execute(_erasures.delete().where(mine)).rowcount

    # Runs: what was done when, and how it ended.

    def begin_run(self, run_id: str, kind: str, subject: str) -> None:
        """Note that a run has begun."""
        with self._transaction() as connection:
            connection.execute(
                _runs.insert().values(
                    run_id=run_id,
                    project=self.project,
                    kind=kind,
                    subject=subject,
                    state="running",
                    started_at=_now(),
                    details="{}",
                )
            )

    def finish_run(self, run_id: str, state: str, details: Mapping[str, Any]) -> None:
        """Note how a run ended: ``done``, ``failed`` or ``interrupted``."""
        values = {"state": state, "finished_at": _now(), "details": canonical_json(details)}
        with self._transaction() as connection:
            connection.execute(_runs.update().where(_runs.c.run_id == run_id).values(values))

    def runs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The latest runs, newest first: run_id, kind, subject, state, started_at, finished_at and their details."""
        query = sa.select(_runs).where(_runs.c.project == self.project).order_by(_runs.c.started_at.desc()).limit(limit)
        with self._transaction() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        return [{**row, "details": json.loads(row["details"])} for row in rows]

    # Datasets: saved training sets.

    def add_dataset(self, name: str, version: int, manifest: Mapping[str, Any]) -> None:
        """Note a saved version; ConflictError SFS-307 if the number is taken."""
        try:
            with self._transaction() as connection:
                connection.execute(
                    _datasets.insert().values(
                        project=self.project,
                        name=name,
                        version=version,
                        created_at=_now(),
                        manifest=canonical_json(manifest),
                    )
                )
        except IntegrityError as error:
            raise ConflictError.of(
                "SFS-307", f"Dataset '{name}' got a version {version} meanwhile.", fix="save again"
            ) from error

    def datasets(self) -> list[dict[str, Any]]:
        """The manifests of all saved versions, by name and version."""
        query = sa.select(_datasets.c.manifest).where(_datasets.c.project == self.project)
        with self._transaction() as connection:
            found = connection.execute(query.order_by(_datasets.c.name, _datasets.c.version)).scalars().all()
        return [json.loads(manifest) for manifest in found]

    def require_dataset(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The manifest of the newest (or the given) version; SFS-303 with the known ones otherwise."""
        saved = self.datasets()
        chosen = [m for m in saved if m["name"] == name and version in (None, m["version"])]
        if not chosen:
            shown = name if version is None else f"{name}@{version}"
            known = [f"{m['name']}@{m['version']}" for m in saved] if version else {m["name"] for m in saved}
            raise InvalidError.of("SFS-303", f"There is no dataset '{shown}'.", why=did_you_mean(shown, known))
        return chosen[-1]

    def _named(self, table: sa.Table, view: ViewSpec) -> sa.ColumnElement[bool]:
        return (table.c.project == self.project) & (table.c.view == view.name)

    def _of(self, table: sa.Table, view: ViewSpec) -> sa.ColumnElement[bool]:
        return self._named(table, view) & (table.c.version == view.version)


def _published_values(published: Published) -> dict[str, Any]:
    pairs = [[to_micros(interval.start), to_micros(interval.end)] for interval in published.intervals]
    return {"table_version": published.table_version, "intervals": canonical_json(pairs)}


def _prepare_file(file: Path) -> None:
    """Make the file of a SQLite registry where there is none, whole from its first moment: nobody sees half of one.

    A file too short to be a database has lost its content (SQLite would take it for a new one): SFS-302.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        if file.stat().st_size < 512:
            raise _damaged(f"{file} has only {file.stat().st_size} bytes.")
        return
    made = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    engine = sa.create_engine(f"sqlite:///{made}")
    try:
        with engine.begin() as connection:
            _create_tables(connection)
        engine.dispose()
        with suppress(FileExistsError):  # another process was first
            os.link(made, file)
    finally:
        made.unlink(missing_ok=True)


def _create_tables(connection: sa.Connection) -> None:
    _tables.create_all(connection)
    connection.execute(_format.insert().values(version=FORMAT))


def _from_1_to_2(connection: sa.Connection) -> None:
    """Format 1 knew one interval from the beginning on in the place of published ones."""
    _tables.create_all(connection)
    old = sa.Table("sfs_watermarks", sa.MetaData(), autoload_with=connection)
    for row in connection.execute(sa.select(old)).all():
        known = Published(row.table_version, (Interval(BEGINNING, from_micros(row.end_us)),))
        identity = {"project": row.project, "view": row.view, "version": row.version}
        connection.execute(_published.insert().values(**identity, **_published_values(known)))
    old.drop(connection)
    connection.execute(_format.insert().values(version=2))


def _damaged(why: str) -> SparkFSError:
    return SparkFSError.of("SFS-302", "The registry cannot be read.", why=why, fix="restore it from a backup")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())

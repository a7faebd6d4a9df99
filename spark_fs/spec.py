"""Feature views as applied: plain, complete, trusted data that the rest of the pipeline reads.

A ``ViewSpec`` needs nothing else to be built, joined, written online or read: its keys, types and source are resolved.
This module imports neither pydantic nor Spark, so that a serving process stays small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.types import ValueType, parse_type


@dataclass(frozen=True, slots=True)
class Column:
    """A named, typed column: a join key or a feature."""

    name: str
    type: ValueType


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Where raw rows are read. ``kind`` is ``delta``, ``file`` or ``spark``; unused fields are empty.

    ``options`` may hold ``${VARIABLE}`` references; they are resolved where the source is read and never stored.
    """

    name: str
    kind: str
    timestamp_field: str
    created_timestamp_field: str | None = None
    field_mapping: Mapping[str, str] = field(default_factory=dict)
    timezone: str | None = None
    path: str | None = None
    table: str | None = None
    query: str | None = None
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """What a person would call the place: the path, the table or the query."""
        return self.path or self.table or self.query or self.name


@dataclass(frozen=True, slots=True)
class TransformationSpec:
    """How raw rows become feature rows. ``kind`` is ``sql`` (``text`` is the query) or ``python``.

    For a function ``text`` is its source and that of the functions of the same repository that it calls, and
    ``function`` its address ``file.py:name``. ``digest`` ignores comments and layout.
    """

    kind: str
    text: str
    digest: str
    function: str | None = None


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """One version of a feature view."""

    project: str
    name: str
    version: int
    entities: tuple[str, ...]
    keys: tuple[Column, ...]
    features: tuple[Column, ...]
    source: SourceSpec
    ttl: timedelta | None = None
    transformation: TransformationSpec | None = None
    online: bool = True
    description: str = ""
    owner: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def key_names(self) -> tuple[str, ...]:
        """The join keys' names in declared order."""
        return tuple(key.name for key in self.keys)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features' names in declared order."""
        return tuple(feature.name for feature in self.features)

    @property
    def definition_hash(self) -> str:
        """SHA-256 of what the values depend on (keys, schema, transformation, time columns); a change makes a new version."""
        source = self.source
        return _digest(
            {
                "keys": [[key.name, key.type.name] for key in self.keys],
                "features": [[feature.name, feature.type.name] for feature in self.features],
                "transformation": self.transformation.digest if self.transformation else None,
                "time": [source.timestamp_field, source.created_timestamp_field, source.timezone],
                "field_mapping": dict(source.field_mapping),
            }
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything but the version; equal specs need no apply."""
        return _digest({**self.to_json(), "version": 0})

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON form; ``ViewSpec.from_json`` gives the same spec back."""
        source = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name in SourceSpec.__dataclass_fields__
            if (value := getattr(self.source, name)) not in (None, {})
        }
        transformation = self.transformation and {
            name: value
            for name in TransformationSpec.__dataclass_fields__
            if (value := getattr(self.transformation, name)) is not None
        }
        return {
            "project": self.project,
            "name": self.name,
            "version": self.version,
            "entities": list(self.entities),
            "keys": [{"name": key.name, "type": key.type.name} for key in self.keys],
            "features": [{"name": feature.name, "type": feature.type.name} for feature in self.features],
            "source": source,
            "ttl_seconds": self.ttl.total_seconds() if self.ttl else None,
            "transformation": transformation,
            "online": self.online,
            "description": self.description,
            "owner": self.owner,
            "tags": dict(self.tags),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ViewSpec:
        """The spec written by ``to_json``."""
        ttl_seconds = body["ttl_seconds"]
        return cls(
            project=body["project"],
            name=body["name"],
            version=body["version"],
            entities=tuple(body["entities"]),
            keys=tuple(Column(key["name"], parse_type(key["type"])) for key in body["keys"]),
            features=tuple(Column(item["name"], parse_type(item["type"])) for item in body["features"]),
            source=SourceSpec(**body["source"]),
            ttl=timedelta(seconds=ttl_seconds) if ttl_seconds else None,
            transformation=TransformationSpec(**body["transformation"]) if body["transformation"] else None,
            online=body["online"],
            description=body["description"],
            owner=body["owner"],
            tags=body["tags"],
        )


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A feature service: for each view it uses, the version it was applied with (0 before the first apply)."""

    name: str
    views: tuple[ServiceView, ...]
    description: str = ""
    owner: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON form; ``ServiceSpec.from_json`` gives the same spec back."""
        views = [
            {
                **{name: getattr(item, name) for name in ServiceView.__dataclass_fields__},
                "features": list(item.features),
                "join_key_map": dict(item.join_key_map),
            }
            for item in self.views
        ]
        return {
            "name": self.name,
            "views": views,
            "description": self.description,
            "owner": self.owner,
            "tags": dict(self.tags),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ServiceSpec:
        """The spec written by ``to_json``."""
        views = tuple(ServiceView(**{**item, "features": tuple(item["features"])}) for item in body["views"])
        return cls(**{**body, "views": views})

    @property
    def declared_hash(self) -> str:
        """SHA-256 of what the user wrote, without the versions: a change re-pins the service to the current versions."""
        body = self.to_json()
        return _digest({**body, "views": [{**view, "version": 0} for view in body["views"]]})


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One view in a service; empty ``features``: all that the pinned version has."""

    view: str
    version: int = 0
    features: tuple[str, ...] = ()
    alias: str | None = None
    join_key_map: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """Some features of one view, as a training set or an online request uses them.

    ``join_key_map`` renames join keys: from the view's key to the column of the entity DataFrame or entity row.
    """

    view: ViewSpec
    features: tuple[str, ...]
    alias: str
    join_key_map: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The selected features with their types, in the order asked for."""
        by_name = {feature.name: feature for feature in self.view.features}
        return tuple(by_name[name] for name in self.features)

    @property
    def spine_keys(self) -> tuple[str, ...]:
        """The columns of the entity DataFrame that hold this view's join keys, in the view's order."""
        return tuple(self.join_key_map.get(name, name) for name in self.view.key_names)


def select(
    view: ViewSpec,
    features: Sequence[str] | None = None,
    alias: str | None = None,
    join_key_map: Mapping[str, str] | None = None,
) -> Selection:
    """A selection of a view; all features where none are named. Raises SFS-501 for a feature it does not have."""
    names = tuple(features) if features else view.feature_names
    problems = [
        Problem("SFS-501", f"Feature view '{view.name}' has no feature '{name}'.", did_you_mean(name, view.feature_names))
        for name in names
        if name not in view.feature_names
    ]
    problems += [
        Problem("SFS-502", f"Feature view '{view.name}' has no join key '{key}'.", did_you_mean(key, view.key_names))
        for key in join_key_map or {}
        if key not in view.key_names
    ]
    if problems:
        raise InvalidError(*problems)
    return Selection(view, names, alias or view.name, dict(join_key_map or {}))


def merge_selections(selections: Iterable[Selection]) -> list[Selection]:
    """The same features with one selection per (view version, alias, key map), so that each view is joined once."""
    merged: dict[tuple[object, ...], Selection] = {}
    for selection in selections:
        view = selection.view
        identity = (view.name, view.version, selection.alias, tuple(sorted(selection.join_key_map.items())))
        known = merged.get(identity)
        features = tuple(dict.fromkeys((known.features if known else ()) + selection.features))
        merged[identity] = replace(selection, features=features)
    return list(merged.values())


def output_names(
    selections: Sequence[Selection], *, full_feature_names: bool, taken: Iterable[str] = ()
) -> dict[tuple[int, str], str]:
    """The output column of each (index of the selection, feature): ``feature``, or ``alias__feature`` with full names.

    Raises SFS-503 naming every clash between two features or with a column already ``taken``.
    """
    names = {
        (index, feature): f"{selection.alias}__{feature}" if full_feature_names else feature
        for index, selection in enumerate(selections)
        for feature in selection.features
    }
    owners: dict[str, list[str]] = {column: ["the entity DataFrame"] for column in taken}
    for (index, feature), column in names.items():
        owners.setdefault(column, []).append(f"{selections[index].alias}:{feature}")
    problems = [
        Problem(
            "SFS-503",
            f"The column name '{column}' is claimed by {' and '.join(claims)}.",
            fix="use full_feature_names=True, view.with_name(…) or rename the entity DataFrame's column",
        )
        for column, claims in owners.items()
        if len(claims) > 1
    ]
    if problems:
        raise InvalidError(*problems)
    return names


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def canonical_json(body: Any) -> str:
    """JSON text that is equal for equal content: sorted keys, no spaces, no escapes beyond what JSON needs."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

"""Load a feature repository and check all of it: every problem in one go, with file and line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from spark_fs.config import SECRET_NAME
from spark_fs.definitions import (
    DataSource,
    Definition,
    DeltaSource,
    Entity,
    FeatureService,
    FeatureView,
    FileSource,
    SparkSource,
    collecting,
)
from spark_fs.definitions import Field as FieldDefinition
from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.spec import Column, ServiceSpec, ServiceView, SourceSpec, ViewSpec
from spark_fs.transformations import transformation_spec
from spark_fs.types import KEY_KINDS

#: Columns that feature tables and training sets add; no key or feature may be called so.
RESERVED = frozenset({"event_timestamp", "created_timestamp", "source"})
#: A password inside an address or a connection string.
_SECRET_VALUE = re.compile(r"://[^/\s:@]*:[^/\s@$]+@|(password|pwd|secret|token)=[^&;\s$]", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}")

_KINDS: dict[type[Definition], str] = {
    Entity: "Entity",
    DataSource: "Data source",
    FeatureView: "Feature view",
    FeatureService: "Feature service",
}


@dataclass(frozen=True)
class Repository:
    """A checked repository. Views have version 0 here: the registry gives the number at apply."""

    project: str
    entities: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, SourceSpec]
    views: Mapping[str, ViewSpec]
    services: Mapping[str, ServiceSpec]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def load(folder: Path, project: str) -> Repository:
    """The repository of all ``*.py`` files directly in ``folder``; loading it runs this code.

    Raises InvalidError with every problem found: code that does not run (SFS-110), wrong arguments (SFS-101, 102), and
    what ``validate`` finds.
    """
    if not folder.is_dir():
        raise InvalidError.of("SFS-111", f"There is no feature repository at {folder}.", fix="run spark-fs init, or use --repo")
    with collecting() as collected:
        _run_files(sorted(folder.glob("*.py")), folder, collected.problems)
    checked = _Checker(collected.definitions, folder)
    problems = collected.problems + checked.problems
    if problems:
        raise InvalidError(*dict.fromkeys(_relative(problem, folder.parent) for problem in problems))
    return checked.repository(project)


def _relative(problem: Problem, root: Path) -> Problem:
    prefix = f"{root}/"
    where = problem.where.removeprefix(prefix)
    return Problem(problem.code, problem.what, problem.why, where, problem.fix)


def _run_files(files: Iterable[Path], folder: Path, problems: list[Problem]) -> None:
    with _importable(folder):
        for file in files:
            try:
                importlib.import_module(file.stem)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # any failure of users' code is a problem to list, whatever it is
                problems.append(_code_problem(error, folder))


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let files of the folder import each other; forget them afterwards, so that repositories never mix.

    Being forgotten also makes Spark ship their functions by value: executors need not have the files.
    """
    before = set(sys.modules)
    shadowed = {name: sys.modules.pop(name) for name in {f.stem for f in folder.glob("*.py")} if name in sys.modules}
    sys.path.insert(0, str(folder))
    # Compiled files are told apart by second and length only: an edit in a notebook could be missed.
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before | set(shadowed):
            file = getattr(sys.modules.get(name), "__file__", None) or ""
            if Path(file).parent == folder:
                del sys.modules[name]
        sys.modules.update(shadowed)


def _code_problem(error: BaseException, folder: Path) -> Problem:
    if isinstance(error, SyntaxError):
        return Problem("SFS-110", f"A file is not valid Python: {error.msg}.", where=f"{error.filename}:{error.lineno}")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(folder))]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(folder)
    return Problem("SFS-110", f"A file does not run: {type(error).__name__}: {error}.", where=where)


class _Checker:
    """Checks definitions against each other and turns them into specs."""

    def __init__(self, definitions: Iterable[Definition], folder: Path) -> None:
        self.problems: list[Problem] = []
        self.folder = folder
        found = list(definitions)
        self.entities = self._by_name(Entity, found)
        self.sources = self._by_name(DataSource, found)
        self.views = self._by_name(FeatureView, found)
        self.services = self._by_name(FeatureService, found)
        for definition in found:
            if not definition.rejected:
                self._check(definition)

    def _add(self, code: str, definition: Definition, what: str, why: str = "", fix: str = "") -> None:
        self.problems.append(Problem(code, what, why, definition.where, fix))

    def _by_name(self, kind: type[Definition], found: list[Definition]) -> dict[str, Any]:
        """The definitions of one kind; two names that differ at most by case are a problem."""
        by_name: dict[str, Definition] = {}
        folded: dict[str, Definition] = {}
        for definition in found:
            if not isinstance(definition, kind) or not definition.name:
                continue
            if (first := folded.get(definition.name.lower())) is not None:
                if first.where == definition.where and first == definition:
                    continue  # its file failed further down, and was run again by a file that imports it
                self._add(
                    "SFS-104",
                    definition,
                    f"{_KINDS[kind]} '{definition.name}' is defined twice.",
                    f"First as '{first.name}' at {Path(first.where).name}; names must differ by more than case.",
                    "rename one of them",
                )
                continue
            folded[definition.name.lower()] = by_name[definition.name] = definition
        return by_name

    def _check(self, definition: Definition) -> None:
        kind = next(text for cls, text in _KINDS.items() if isinstance(definition, cls))
        self._check_name(definition, kind, definition.name)
        match definition:
            case Entity():
                self._check_entity(definition)
            case DataSource():
                self._check_source(definition)
            case FeatureView():
                self._check_view(definition)
            case FeatureService():
                self._check_service(definition)

    def _check_name(self, definition: Definition, kind: str, name: str) -> None:
        if not _NAME.fullmatch(name) or "__" in name:
            self._add(
                "SFS-112",
                definition,
                f"{kind} has the name '{name}'.",
                "Names start with a letter, hold letters, digits and single underscores, at most 128 characters.",
                "rename it",
            )

    def _check_columns(self, definition: Definition, fields: Iterable[FieldDefinition], kind: str) -> None:
        seen: set[str] = set()
        for column in (column for column in fields if not column.rejected):
            self._check_name(definition, kind, column.name)
            if column.name.lower() in RESERVED:
                self._add(
                    "SFS-113",
                    definition,
                    f"{kind} '{column.name}' of '{definition.name}' has a reserved name.",
                    f"Reserved: {', '.join(sorted(RESERVED))}.",
                    "rename it, with field_mapping if the source has it so",
                )
            if column.name.lower() in seen:
                self._add("SFS-107", definition, f"{kind} '{column.name}' of '{definition.name}' is declared twice.")
            seen.add(column.name.lower())

    def _check_entity(self, entity: Entity) -> None:
        self._check_columns(entity, entity.join_keys, "Join key")
        if not entity.join_keys:
            self._add(
                "SFS-106",
                entity,
                f"Entity '{entity.name}' has no join key.",
                fix="name at least one Field; a view about nothing in particular has entities=[]",
            )
        for key in entity.join_keys:
            if not key.rejected and key.dtype.kind not in KEY_KINDS:
                self._add(
                    "SFS-106",
                    entity,
                    f"Join key '{key.name}' of entity '{entity.name}' has type {key.dtype}.",
                    f"Types that can be compared exactly: {', '.join(sorted(KEY_KINDS))}.",
                    "cast it in the source",
                )

    def _check_source(self, source: DataSource) -> None:
        if isinstance(source, DeltaSource) and (source.path is None) == (source.table is None):
            self._add("SFS-114", source, f"Delta source '{source.name}' needs either path or table.")
        if isinstance(source, SparkSource) and sum(x is not None for x in (source.format, source.table, source.query)) != 1:
            self._add("SFS-114", source, f"Spark source '{source.name}' needs exactly one of format, table and query.")
        if source.created_timestamp_field == source.timestamp_field:
            self._add(
                "SFS-115",
                source,
                f"Source '{source.name}' has one column for event and created time.",
                fix="leave created_timestamp_field out",
            )
        if source.timezone is not None and not _is_zone(source.timezone):
            self._add(
                "SFS-116",
                source,
                f"Source '{source.name}' has the unknown time zone '{source.timezone}'.",
                fix="use an IANA name such as America/New_York",
            )
        for option, value in getattr(source, "options", {}).items():
            named = SECRET_NAME.search(option) and not re.fullmatch(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}", value)
            if named or _SECRET_VALUE.search(value):
                self._add(
                    "SFS-117",
                    source,
                    f"Source '{source.name}' has a secret in plain text in option '{option}'.",
                    "Definitions are stored in the registry.",
                    "write ${VARIABLE} and set it where the job runs",
                )

        for part in ("path", "query"):
            if _SECRET_VALUE.search(getattr(source, part, None) or ""):
                self._add(
                    "SFS-117",
                    source,
                    f"Source '{source.name}' has a secret in plain text in its {part}.",
                    "Definitions are stored in the registry.",
                    "put it into an option as ${VARIABLE}, or into Spark's settings",
                )

    def _check_view(self, view: FeatureView) -> None:
        self._check_columns(view, view.schema, "Feature")
        if not view.schema:
            self._add("SFS-118", view, f"Feature view '{view.name}' has no features.", fix="list them in schema=[…]")
        if view.ttl is not None and view.ttl < timedelta(0):
            self._add("SFS-105", view, f"Feature view '{view.name}' has a ttl below zero.", fix="use None for no bound")
        keys: list[str] = []
        for reference in view.entities:
            name = reference if isinstance(reference, str) else reference.name
            if (entity := self.entities.get(name)) is None:
                self._add(
                    "SFS-103",
                    view,
                    f"Feature view '{view.name}' uses unknown entity '{name}'.",
                    did_you_mean(name, self.entities),
                )
            elif not entity.rejected:
                keys += [key.name for key in entity.join_keys]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            self._add("SFS-108", view, f"Two entities of feature view '{view.name}' share the join key '{key}'.")
        folded = {key.lower() for key in keys}
        for name in sorted({column.name for column in view.schema if column.name.lower() in folded}):
            self._add("SFS-107", view, f"'{name}' is both a join key and a feature of view '{view.name}'.")
        source_name = view.source if isinstance(view.source, str) else view.source.name
        if source_name not in self.sources:
            self._add(
                "SFS-119",
                view,
                f"Feature view '{view.name}' uses unknown source '{source_name}'.",
                did_you_mean(source_name, self.sources),
            )
        self._check_transformation(view)

    def _check_transformation(self, view: FeatureView) -> None:
        transformation = view.transformation
        if isinstance(transformation, str):
            if "{source}" not in transformation or re.search(r"\{(?!source\})", transformation):
                self._add(
                    "SFS-120",
                    view,
                    f"The SQL of feature view '{view.name}' must name its source as {{source}}.",
                    "Braces mean nothing else in it.",
                    "SELECT … FROM {source}",
                )
        elif transformation is not None:
            named = isinstance(transformation, FunctionType) and "<" not in transformation.__qualname__
            if not named:
                self._add(
                    "SFS-121",
                    view,
                    f"The transformation of feature view '{view.name}' must be a named function.",
                    "Its source text is part of the definition.",
                    "def it at the top of a file of the repository",
                )

    def _check_service(self, service: FeatureService) -> None:
        aliases: dict[str, Any] = {}
        for reference in service.features:
            view = self.views.get(reference.view)
            if view is None:
                self._add(
                    "SFS-122",
                    service,
                    f"Feature service '{service.name}' uses unknown view '{reference.view}'.",
                    did_you_mean(reference.view, self.views),
                )
                continue
            if view.rejected:
                continue
            features = [column.name for column in view.schema]
            for name in reference.features or ():
                if name not in features:
                    self._add(
                        "SFS-123",
                        service,
                        f"Feature view '{view.name}' has no feature '{name}'.",
                        did_you_mean(name, features),
                    )
            keys = [key.name for name in _entity_names(view) if name in self.entities for key in self.entities[name].join_keys]
            for key in reference.join_key_map:
                if key not in keys:
                    self._add(
                        "SFS-124",
                        service,
                        f"Feature view '{view.name}' has no join key '{key}'.",
                        did_you_mean(key, keys),
                    )
            alias = reference.alias or reference.view
            use = (reference.view, tuple(sorted(reference.join_key_map.items())))
            if aliases.setdefault(alias, use) != use:
                self._add(
                    "SFS-125",
                    service,
                    f"Feature service '{service.name}' uses the name '{alias}' for two things.",
                    fix="give one of them another name with with_name(…)",
                )

    def repository(self, project: str) -> Repository:
        """The specs of definitions that have passed all checks."""
        sources = {name: source_spec(source) for name, source in self.sources.items()}
        return Repository(
            project=project,
            entities={name: _entity_json(entity) for name, entity in self.entities.items()},
            sources=sources,
            views={name: self._view_spec(project, view, sources) for name, view in self.views.items()},
            services={name: _service_spec(service) for name, service in self.services.items()},
            functions={v.name: v.transformation for v in self.views.values() if callable(v.transformation)},
        )

    def _view_spec(self, project: str, view: FeatureView, sources: Mapping[str, SourceSpec]) -> ViewSpec:
        names = _entity_names(view)
        return ViewSpec(
            project=project,
            name=view.name,
            version=0,
            entities=names,
            keys=tuple(Column(key.name, key.dtype) for name in names for key in self.entities[name].join_keys),
            features=tuple(Column(column.name, column.dtype) for column in view.schema),
            source=sources[view.source if isinstance(view.source, str) else view.source.name],
            ttl=view.ttl or None,
            transformation=transformation_spec(view.transformation, self.folder),
            online=view.online,
            description=view.description,
            owner=view.owner,
            tags=dict(view.tags),
        )


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return False
    return True


def _entity_names(view: FeatureView) -> tuple[str, ...]:
    return tuple(reference if isinstance(reference, str) else reference.name for reference in view.entities)


def _entity_json(entity: Entity) -> dict[str, Any]:
    keys = [{"name": key.name, "type": key.dtype.name} for key in entity.join_keys]
    return {
        "name": entity.name,
        "join_keys": keys,
        "description": entity.description,
        "owner": entity.owner,
        "tags": dict(entity.tags),
    }


def source_spec(source: DataSource) -> SourceSpec:
    """The plain form of a source definition."""
    known = {name: getattr(source, name) for name in SourceSpec.__dataclass_fields__ if hasattr(source, name)}
    if isinstance(source, FileSource | SparkSource):
        known["options"] = dict(source.options)
    return SourceSpec(**{**known, "field_mapping": dict(source.field_mapping)})


def _service_spec(service: FeatureService) -> ServiceSpec:
    views = tuple(
        ServiceView(item.view, 0, item.features or (), item.alias, dict(item.join_key_map)) for item in service.features
    )
    return ServiceSpec(service.name, views, service.description, service.owner, dict(service.tags))

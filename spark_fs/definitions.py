"""What users write in feature_repo/: entities, sources, feature views and services.

Each is a frozen pydantic model whose leading arguments may be positional. While a repository is loaded
(``collecting``), every definition made is noted with its file and line, and a wrong argument becomes a problem in
the list instead of an exception, so that all problems of a repository are found in one go.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError
from pydantic import Field as Setting

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.types import ValueType, as_value_type

_PACKAGE = f"{Path(__file__).parent}/"


@dataclass(slots=True)
class Collected:
    """What loading a repository has met so far."""

    definitions: list[Definition] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


_collected: ContextVar[Collected | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[Collected]:
    """Note every definition made inside the block; wrong arguments are listed, not raised."""
    collected = Collected()
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def _where() -> str:
    """``file:line`` of the user's code that is making a definition."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(_PACKAGE) or "/pydantic/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


#: The default of arguments that must be given: pydantic says so, with all else that is wrong.
_MISSING: Any = object()


class Definition(BaseModel):
    """Base of all definitions: a name and who answers for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    _where: str = PrivateAttr("")
    _rejected: bool = PrivateAttr(False)

    name: str
    description: str = ""
    owner: str = ""
    tags: Mapping[str, str] = {}

    def __init__(self, name: str = _MISSING, **more: Any) -> None:
        where, collected = _where(), _collected.get()
        values = {argument: value for argument, value in {"name": name, **more}.items() if value is not _MISSING}
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [_problem(type(self), values.get("name"), detail, where) for detail in error.errors()]
            if collected is None:
                raise InvalidError(*problems) from error
            collected.problems += problems
            wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
            self._stand_in({name: value for name, value in values.items() if name not in wrong})
        self._where = where
        if collected is not None and not isinstance(self, Field):
            collected.definitions.append(self)

    def _stand_in(self, values: Mapping[str, Any]) -> None:
        """Keep the good arguments of a rejected definition: its name stays known, so others that use it are not blamed too."""
        nothing = {
            name: "" if name in ("name", "source") else () for name, f in type(self).model_fields.items() if f.is_required()
        }
        unchecked = type(self).model_construct(**{**nothing, **values})
        for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, slot, getattr(unchecked, slot))
        self._rejected = True

    @property
    def where(self) -> str:
        """``file:line`` where it was defined."""
        return self._where

    @property
    def rejected(self) -> bool:
        """Whether its own arguments were wrong (already reported)."""
        return self._rejected


def _problem(definition: type[Definition], name: Any, detail: Any, where: str) -> Problem:
    argument = ".".join(str(part) for part in detail["loc"]) or "arguments"
    if detail["type"] == "extra_forbidden":
        hint = did_you_mean(argument, definition.model_fields)
        return Problem("SFS-102", f"{definition.__name__} '{name}' has no argument '{argument}'.", hint, where)
    return Problem("SFS-101", f"{definition.__name__} '{name}': '{argument}' is wrong.", f"{detail['msg']}.", where)


DType = Annotated[ValueType, BeforeValidator(as_value_type)]


class Field(Definition):
    """A named, typed column: a join key or a feature. ``Field("amount", Float64)``."""

    dtype: DType

    def __init__(self, name: str = _MISSING, dtype: ValueType | str = _MISSING, **more: Any) -> None:
        super().__init__(name, dtype=dtype, **more)


class Entity(Definition):
    """What features describe, known by one or several join keys. ``Entity("user", [Field("user_id", Int64)])``."""

    join_keys: tuple[Field, ...]

    def __init__(self, name: str = _MISSING, join_keys: Sequence[Field] = _MISSING, **more: Any) -> None:
        super().__init__(name, join_keys=join_keys, **more)


class DataSource(Definition):
    """Where raw rows come from, and which of their columns tell the time.

    ``timestamp_field`` (when it happened) and ``created_timestamp_field`` (when the warehouse knew it) name columns after
    ``field_mapping`` {source column: new name} and after the view's transformation. ``timezone`` (an IANA name) is needed
    where these columns have no zone; without it such columns are refused.
    """

    timestamp_field: str
    created_timestamp_field: str | None = None
    field_mapping: Mapping[str, str] = {}
    timezone: str | None = None


class DeltaSource(DataSource):
    """A Delta table, by ``path`` or by catalog ``table`` name."""

    kind: Literal["delta"] = "delta"
    path: str | None = None
    table: str | None = None

    def __init__(self, name: str = _MISSING, **more: Any) -> None:
        super().__init__(name=name, **more)


class FileSource(DataSource):
    """Files of one format under ``path``. CSV and JSON: ``options`` go to Spark's reader; give ``schema`` as DDL text there."""

    kind: Literal["file"] = "file"
    path: str
    format: Literal["parquet", "csv", "json", "orc"] = "parquet"
    options: Mapping[str, str] = {}

    def __init__(self, name: str = _MISSING, **more: Any) -> None:
        super().__init__(name=name, **more)


class SparkSource(DataSource):
    """Any format that Spark reads, with its options (JDBC, Snowflake, Iceberg …), or a catalog ``table``, or a ``query``.

    Options may refer to secrets as ``${VARIABLE}``: resolved when the source is read, never stored.
    """

    kind: Literal["spark"] = "spark"
    format: str | None = None
    options: Mapping[str, str] = {}
    table: str | None = None
    query: str | None = None

    def __init__(self, name: str = _MISSING, **more: Any) -> None:
        super().__init__(name=name, **more)


Transformation = str | Callable[..., Any] | None


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


with warnings.catch_warnings():
    # `schema` is Feast's word and the users' word; pydantic's deprecated method of that name is of no use to us.
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class FeatureView(Definition):
        """Features of one or several entities (or of none) from one source.

        ``ttl`` bounds how old a value may be, at training and at serving alike; None or zero: no bound. ``transformation``
        is SQL text with ``{source}`` for the source, or a named function ``DataFrame → DataFrame``.
        """

        entities: Annotated[tuple[Entity | str, ...], BeforeValidator(_as_tuple)] = ()
        schema: Annotated[tuple[Field, ...], BeforeValidator(_as_tuple)]  # type: ignore[assignment]  # see above
        source: DeltaSource | FileSource | SparkSource | str
        ttl: timedelta | None = None
        transformation: Transformation = None
        online: bool = True

        def __init__(
            self,
            name: str = _MISSING,
            entities: Sequence[Entity | str] | Entity | str = (),
            schema: Sequence[Field] = _MISSING,
            source: DataSource | str = _MISSING,
            **more: Any,
        ) -> None:
            super().__init__(name, entities=entities, schema=schema, source=source, **more)

        def __getitem__(self, features: Sequence[str]) -> ViewReference:
            """Only these features: ``view[["amount"]]``."""
            return ViewReference(view=self.name, features=tuple([features] if isinstance(features, str) else features))

        def with_name(self, alias: str) -> ViewReference:
            """The view under another name, so that it can be used twice."""
            return ViewReference(view=self.name, alias=alias)

        def with_join_key_map(self, join_key_map: Mapping[str, str]) -> ViewReference:
            """The view with join keys taken from other columns: {its key: column of the entity DataFrame}."""
            return ViewReference(view=self.name, join_key_map=dict(join_key_map))


class ViewReference(BaseModel):
    """A feature view as a service uses it: some features, perhaps another name and other key columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    view: str
    features: tuple[str, ...] | None = None
    alias: str | None = None
    join_key_map: Mapping[str, str] = {}

    def __getitem__(self, features: Sequence[str]) -> ViewReference:
        """Only these features."""
        return self.model_copy(update={"features": tuple([features] if isinstance(features, str) else features)})

    def with_name(self, alias: str) -> ViewReference:
        """The same under another name."""
        return self.model_copy(update={"alias": alias})

    def with_join_key_map(self, join_key_map: Mapping[str, str]) -> ViewReference:
        """The same with other key columns."""
        return self.model_copy(update={"join_key_map": dict(join_key_map)})


def _as_references(value: Any) -> Any:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(ViewReference(view=item.name) if isinstance(item, FeatureView) else item for item in items)


class FeatureService(Definition):
    """The features that one model uses. It keeps the view versions it was applied with until it is changed itself."""

    features: Annotated[tuple[ViewReference, ...], BeforeValidator(_as_references)] = Setting(min_length=1)

    def __init__(
        self,
        name: str = _MISSING,
        features: Sequence[FeatureView | ViewReference] | FeatureView | ViewReference = _MISSING,
        **more: Any,
    ) -> None:
        super().__init__(name, features=features, **more)

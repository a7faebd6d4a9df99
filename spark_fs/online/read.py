"""Feature values for entities, in one round trip. Needs neither a JVM nor pyspark, pandas, pyarrow or numpy."""

from __future__ import annotations

import base64
import html
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.intervals import from_micros, text, to_micros
from spark_fs.online.codec import (
    HEADER,
    SIGN_BIT,
    TIME_AND_SCHEMA,
    Decoder,
    epoch_name,
    epoch_prefix,
    key_bytes,
    key_bytes_of_columns,
    key_prefix,
    key_tags,
    redis_keys,
    schema_id,
)
from spark_fs.spec import Selection, ViewSpec, output_names, select

if TYPE_CHECKING:
    from spark_fs.online.connect import Client

PRESENT = "PRESENT"
NULL_VALUE = "NULL_VALUE"
NOT_FOUND = "NOT_FOUND"
OUTSIDE_MAX_AGE = "OUTSIDE_MAX_AGE"

#: More different selections than that are not remembered.
_MOST_PLANS = 256
#: Rows that a notebook shows.
SHOWN_ROWS = 20


@dataclass(frozen=True, slots=True)
class _Found:
    """What one view gave: per entity row whether the row counts, its event time, and one list of values per feature."""

    states: list[str]
    event_us: list[int | None]
    columns: list[list[Any]]


@dataclass(frozen=True, slots=True, repr=False)
class OnlineResponse:
    """Feature values in the order of the entity rows, duplicates included.

    Values are natural Python ones: int, float, bool, str, bytes, Decimal, date, datetime (UTC), list; None where
    there is none.
    """

    _entities: Mapping[str, list[Any]]
    _features: Mapping[str, tuple[_Found, int]]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The output names of the features, in the order asked for."""
        return tuple(self._features)

    def __len__(self) -> int:
        columns = (*self._entities.values(), *(found.states for found, _ in self._features.values()))
        return len(columns[0]) if columns else 0

    def __repr__(self) -> str:
        return f"OnlineResponse({len(self)} rows: {', '.join([*self._entities, *self._features])})"

    @property
    def statuses(self) -> dict[str, list[str]]:
        """Feature → one status per entity row.

        PRESENT; NULL_VALUE: the row is there, the value is null; NOT_FOUND: no row, or one of another schema;
        OUTSIDE_MAX_AGE: the row is older than the view's ttl. The value is None for all but PRESENT.
        """
        return {
            name: [
                NULL_VALUE if state is PRESENT and value is None else state
                for state, value in zip(found.states, found.columns[place], strict=True)
            ]
            for name, (found, place) in self._features.items()
        }

    @property
    def event_timestamps(self) -> dict[str, list[datetime | None]]:
        """Feature → the event time (UTC) of the row the value comes from, per entity row; None where NOT_FOUND."""
        instants: dict[int, list[datetime | None]] = {}
        for found, _ in self._features.values():
            if id(found) not in instants:
                instants[id(found)] = [None if us is None else from_micros(us) for us in found.event_us]
        return {name: instants[id(found)] for name, (found, _) in self._features.items()}

    def to_dict(self, *, include_event_timestamps: bool = False) -> dict[str, list[Any]]:
        """Column → values: the entity rows' columns, then the features, then, if wanted, one ``<feature>__ts`` each."""
        columns = {name: list(values) for name, values in self._entities.items()}
        columns |= {name: list(found.columns[place]) for name, (found, place) in self._features.items()}
        if include_event_timestamps:
            columns |= {f"{name}__ts": list(instants) for name, instants in self.event_timestamps.items()}
        return columns

    def to_json(self) -> dict[str, Any]:
        """The answer in the shape of Feast's feature server, of JSON types only.

        ``{"metadata": {"feature_names": […]}, "results": [{"values", "statuses", "event_timestamps"}, …]}``, one
        result per column, entity columns first. Instants and dates are ISO 8601 text, decimals text, bytes base64,
        and the floats JSON lacks are the text ``NaN``, ``Infinity`` and ``-Infinity``. Integers stay integers, also
        above 2**53.
        """
        results = [
            {
                "values": [_jsonable(value) for value in values],
                "statuses": [NULL_VALUE if value is None else PRESENT for value in values],
                "event_timestamps": [None] * len(values),
            }
            for values in self._entities.values()
        ]
        statuses, instants = self.statuses, self.event_timestamps
        results += [
            {
                "values": [_jsonable(value) for value in found.columns[place]],
                "statuses": statuses[name],
                "event_timestamps": [_jsonable(instant) for instant in instants[name]],
            }
            for name, (found, place) in self._features.items()
        ]
        return {"metadata": {"feature_names": [*self._entities, *self._features]}, "results": results}

    def _repr_html_(self) -> str:
        columns, statuses = self.to_dict(), self.statuses
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        rows = []
        for row in range(min(len(self), SHOWN_ROWS)):
            cells = []
            for name, values in columns.items():
                status = statuses[name][row] if name in statuses else PRESENT
                cells.append(f"<td>{html.escape(str(values[row]) if status == PRESENT else status)}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
        more = f"<p>and {len(self) - SHOWN_ROWS} more rows</p>" if len(self) > SHOWN_ROWS else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, datetime):
        return text(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class OnlineReader:
    """Reads features from one online store; threads may share it. Close it, or use it in a ``with`` block.

    ``url``: see ``address.parse_address``, which raises SFS-614; no connection is made before the first read. A read that
    gets no answer in ``socket_timeout_seconds`` is tried twice more, then fails. While a replica takes over, reads of what
    it has fail; after that they give the same values again.
    """

    def __init__(self, url: str, *, socket_timeout_seconds: float = 5.0) -> None:
        from spark_fs.online import address, connect, lookup  # redis takes 0.2 s to import: not before a reader is made

        #: By the identity of the selection, which its plan keeps alive; services read by the same selections again and again.
        self._plans: dict[int, _Plan] = {}
        address.parse_address(url)
        self._errors, self._stored_values = connect.redis_errors, lookup.stored_values
        self._open = partial(connect.open_client, url, socket_timeout_seconds=socket_timeout_seconds)
        self._client: Client | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> OnlineReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            self._client.close()

    def read(
        self,
        selections: Sequence[Selection],
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        full_feature_names: bool = False,
        now: datetime | None = None,
    ) -> OnlineResponse:
        """The latest values of the selected features for each entity row, in one round trip for all rows and views.

        ``entity_rows`` is a list of rows or a mapping of columns; columns that are no join keys are handed back
        unchanged. A null join key finds nothing. A row is too old, OUTSIDE_MAX_AGE, when its event time is before
        ``now`` − ttl (at exactly that age it still counts); ``now`` defaults to the clock and needs a time zone.

        Raises SFS-607 naming every missing join key, or for columns of unequal length; SFS-606 for a join key of
        another type; SFS-503 for two features of the same output name; SFS-601 and SFS-602 where the server is down
        or refuses the login.
        """
        columns, count = _columns(entity_rows)
        _require_keys(selections, columns)
        names = output_names(selections, full_feature_names=full_feature_names, taken=columns)
        plans = [self._plan(selection) for selection in selections]
        wanted, values = self._values(plans, columns, count)
        now_us = time.time_ns() // 1000 if now is None else to_micros(now)
        features: dict[str, tuple[_Found, int]] = {}
        for number, (plan, keys) in enumerate(zip(plans, wanted, strict=True)):
            found = _interpret(plan, [None if key is None else next(values) for key in keys], now_us)
            features |= {names[number, name]: (found, place) for place, name in enumerate(plan.selection.features)}
        return OnlineResponse(columns, features)

    def _values(
        self, plans: Sequence[_Plan], columns: Mapping[str, list[Any]], count: int
    ) -> tuple[list[list[bytes | None]], Iterator[bytes | None]]:
        """For each plan the keys that were asked for, and what is stored there, all of the epoch that is served now.

        Which one that is comes with the values; after a full refresh the first read asks twice.
        """
        encoded: dict[Any, tuple[list[int | None], list[bytes | None]]] = {}
        while True:
            epochs = [plan.epoch for plan in plans]
            wanted = [_wanted_keys(plan, epoch, columns, count, encoded) for plan, epoch in zip(plans, epochs, strict=True)]
            flat = [key for keys in wanted for key in keys if key is not None]
            found = self._fetch([*(plan.epoch_name for plan in plans), *flat])
            served = [int(epoch or 0) for epoch in found[: len(plans)]]
            if served == epochs:
                return wanted, iter(found[len(plans) :])
            for plan, epoch in zip(plans, served, strict=True):
                plan.epoch = epoch

    def _plan(self, selection: Selection) -> _Plan:
        known = self._plans.get(id(selection))
        if known is None or known.selection is not selection:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            known = self._plans[id(selection)] = _Plan(selection)
        return known

    def _fetch(self, keys: list[bytes]) -> list[bytes | None]:
        with self._errors():
            with self._opening:
                self._client = self._client or self._open()
            return self._stored_values(self._client, keys)


def entity_keys(view: ViewSpec, entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> list[bytes]:
    """The key bytes of each entity row. Raises SFS-606 for a null or a value of another type, SFS-607 for a missing key."""
    columns, count = _columns(entity_rows)
    _require_keys([select(view, view.feature_names)], columns)
    rows = zip(*(columns[name] for name in view.key_names), strict=True) if view.keys else [()] * count
    return [key_bytes(row, view.keys) for row in rows]


def _columns(
    entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
) -> tuple[dict[str, list[Any]], int]:
    """The entity rows as columns, and how many rows they are; a column that a row lacks is left out."""
    if isinstance(entity_rows, Mapping):
        columns = {name: list(values) for name, values in entity_rows.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InvalidError.of("SFS-607", f"The columns of the entity rows have unequal lengths: {shown}.")
        return columns, next(iter(lengths.values()), 0)
    names = dict.fromkeys(name for row in entity_rows for name in row)
    return {name: [row[name] for row in entity_rows] for name in names if all(name in row for row in entity_rows)}, len(
        entity_rows
    )


def _require_keys(selections: Sequence[Selection], columns: Mapping[str, Any]) -> None:
    missing: dict[str, list[str]] = {}
    for selection in selections:
        for key in selection.spine_keys:
            if key not in columns:
                missing.setdefault(key, []).append(selection.alias)
    if missing:
        raise InvalidError(
            *(
                Problem(
                    "SFS-607",
                    f"The entity rows lack the join key '{key}' of {', '.join(sorted(set(views)))}.",
                    did_you_mean(key, columns),
                    fix=f"give '{key}' in every entity row",
                )
                for key, views in missing.items()
            )
        )


class _Plan:
    """What is the same in every read of a selection."""

    def __init__(self, selection: Selection) -> None:
        view = selection.view
        self.selection, self.keys, self.prefix = selection, view.keys, key_prefix(view)
        #: The epoch that was served last, as far as is known, and the key that tells.
        self.epoch, self.epoch_name = 0, epoch_name(self.prefix)
        self.spine_keys = selection.spine_keys
        #: Views that agree on this have the same key bytes for the same entity rows.
        self.key_identity = (self.spine_keys, tuple(key.type.name for key in view.keys))
        self.decoder, self.schema_id = Decoder(view.features, selection.features), schema_id(view.features)
        self.ttl_us = view.ttl // timedelta(microseconds=1) if view.ttl else None


def _wanted_keys(
    plan: _Plan,
    epoch: int,
    columns: Mapping[str, list[Any]],
    count: int,
    encoded: dict[Any, tuple[list[int | None], list[bytes | None]]],
) -> list[bytes | None]:
    """The Redis key of each entity row, None where a join key is null. Views with equal keys share the encoded ones."""
    if plan.key_identity not in encoded:
        keys = key_bytes_of_columns([columns[name] for name in plan.spine_keys], count, plan.keys)
        encoded[plan.key_identity] = key_tags(keys), keys
    return redis_keys(epoch_prefix(plan.prefix, epoch), *encoded[plan.key_identity])


def _interpret(plan: _Plan, values: Sequence[bytes | None], now_us: int) -> _Found:
    """Stored values → states, event times and columns; a ttl older than the view's start of time keeps all."""
    unpack, schema, size = TIME_AND_SCHEMA.unpack_from, plan.schema_id, HEADER.size
    oldest_us = -SIGN_BIT if plan.ttl_us is None else now_us - plan.ttl_us
    states: list[str] = []
    event_us: list[int | None] = []
    present: list[bytes] = []
    for value in values:
        state, event = NOT_FOUND, None
        if value is not None and len(value) >= size:
            biased, found_schema = unpack(value)
            if found_schema == schema:
                event = biased - SIGN_BIT
                if event >= oldest_us:
                    state = PRESENT
                    present.append(value)
                else:
                    state = OUTSIDE_MAX_AGE
        states.append(state)
        event_us.append(event)
    columns = plan.decoder.decode_all(present)
    if len(present) < len(values):
        columns = [_spread(column, states) for column in columns]
    return _Found(states, event_us, columns)


def _spread(column: Sequence[Any], states: Sequence[str]) -> list[Any]:
    """The values, which are those of the rows that are PRESENT, with None for the other rows."""
    values = iter(column)
    return [next(values) if state is PRESENT else None for state in states]

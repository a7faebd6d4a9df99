"""What an apply would do, as a value: the steps that are printed are the steps that are carried out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from spark_fs.errors import InvalidError, Problem
from spark_fs.registry import Change, Registry, State
from spark_fs.repo import Repository
from spark_fs.spec import ServiceSpec, ServiceView, ViewSpec, canonical_json

FORMAT = 1


class Action(str, Enum):
    """What happens to an object; the value is the sign that is printed."""

    ADD = "+"
    CHANGE = "~"
    REMOVE = "-"
    REPLACE = "-/+"


@dataclass(frozen=True, slots=True)
class Step:
    """One object's change, why it happens, and who is affected. ``body`` is None for a removal."""

    action: Action
    kind: str
    name: str
    version: int
    body: Mapping[str, Any] | None
    reasons: tuple[str, ...] = ()
    dependents: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """``view weather@2``; only views have versions."""
        return f"{self.kind} {self.name}@{self.version}" if self.kind == "view" else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps from the registry at ``serial`` to what the repository declares."""

    project: str
    serial: int
    steps: tuple[Step, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def summary(self) -> str:
        """``2 to add, 1 to change, 0 to replace, 0 to remove``."""
        words = {Action.ADD: "add", Action.CHANGE: "change", Action.REPLACE: "replace", Action.REMOVE: "remove"}
        return ", ".join(f"{sum(s.action is action for s in self.steps)} to {word}" for action, word in words.items())

    def __str__(self) -> str:
        if not self.steps:
            return f"Project {self.project}: no changes; the registry matches the repository."
        lines = [f"Project {self.project}, registry serial {self.serial}:", ""]
        for step in self.steps:
            lines.append(f"  {step.action.value:>3} {step.title}")
            lines += [f"        {reason}" for reason in step.reasons]
            lines += [f"        → {dependent}" for dependent in step.dependents]
        return "\n".join([*lines, "", f"Plan: {self.summary}."])

    def to_markdown(self) -> str:
        """The plan as a table for a review comment."""
        if not self.steps:
            return f"**{self.project}**: no changes."
        rows = [f"| `{s.action.value}` | {s.title} | {_cell(s.reasons)} | {_cell(s.dependents)} |" for s in self.steps]
        head = [f"**{self.project}**: {self.summary} (registry serial {self.serial})", ""]
        return "\n".join([*head, "| | object | why | affects |", "|---|---|---|---|", *rows])

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, with a checksum; ``Plan.from_json`` gives the same plan back."""
        steps = [{**asdict(step), "action": step.action.value} for step in self.steps]
        body = {"format": FORMAT, "project": self.project, "serial": self.serial, "steps": steps}
        return {**body, "summary": self.summary, "checksum": _checksum(body)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """The plan written by ``to_json``; SFS-308 if it is not one, or was edited."""
        document = document if isinstance(document, Mapping) else {}
        body = {name: document.get(name) for name in ("format", "project", "serial", "steps")}
        if body["format"] != FORMAT or document.get("checksum") != _checksum(body):
            raise InvalidError.of(
                "SFS-308",
                "This is not a plan, or it was edited or cut after it was written.",
                fix="write it again with spark-fs plan --out FILE",
            )
        steps = tuple(
            Step(
                **{
                    **step,
                    "action": Action(step["action"]),
                    "reasons": tuple(step["reasons"]),
                    "dependents": tuple(step["dependents"]),
                }
            )
            for step in document["steps"]
        )
        return cls(document["project"], document["serial"], steps)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def _cell(texts: Sequence[str]) -> str:
    """Texts as one cell of a Markdown table."""
    return " ".join("; ".join(texts).replace("|", "\\|").split()) or "—"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def make_plan(state: State, repository: Repository) -> Plan:
    """The plan from what is applied to what is declared. Raises SFS-304 where a removed view is still in use."""
    views = _views_after(state, repository)
    services = {name: _pinned(spec, state, views) for name, spec in repository.services.items()}
    _check_pins(state, views, services)
    steps = [
        *_plain_steps("entity", state.entities, repository.entities, state),
        *_plain_steps(
            "source",
            {n: _json(s) for n, s in state.sources.items()},
            {n: _json(s) for n, s in repository.sources.items()},
            state,
        ),
        *_view_steps(state, views, services),
        *_plain_steps(
            "service",
            {n: s.to_json() for n, s in state.services.items()},
            {n: s.to_json() for n, s in services.items()},
            state,
        ),
    ]
    kinds = {"service": 0, "view": 1, "source": 2, "entity": 3}
    removals = sorted((s for s in steps if s.action is Action.REMOVE), key=lambda s: kinds[s.kind])
    return Plan(state.project, state.serial, (*(s for s in steps if s.action is not Action.REMOVE), *removals))


def apply_plan(plan: Plan, registry: Registry) -> int:
    """Carry out the plan in one transaction and return the new serial.

    Raises ConflictError SFS-305 if the registry has moved since, SFS-309 for another project's plan; either way nothing
    changes. An empty plan changes nothing and returns its serial.
    """
    if plan.project != registry.project:
        raise InvalidError.of("SFS-309", f"This plan is for project '{plan.project}', not '{registry.project}'.")
    if not plan.steps:
        return plan.serial
    changes = [Change(step.kind, step.name, step.version, step.body) for step in plan.steps]
    return registry.commit(plan.serial, changes, plan.summary)


def _json(source: Any) -> dict[str, Any]:
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in asdict(source).items() if v not in (None, {})}


def _views_after(state: State, repository: Repository) -> dict[str, ViewSpec]:
    """The declared views with the version each will have."""
    after = {}
    for name, view in repository.views.items():
        current = state.views.get(name)
        newest = max((n for known, n in state.versions if known == name), default=0)
        same = current is not None and current.definition_hash == view.definition_hash
        after[name] = replace(view, version=current.version if current and same else newest + 1)
    return after


def _pinned(service: ServiceSpec, state: State, views: Mapping[str, ViewSpec]) -> ServiceSpec:
    """The service as it is applied while its declaration is unchanged; else with the versions current after the plan."""
    applied = state.services.get(service.name)
    if applied is not None and applied.declared_hash == service.declared_hash:
        return applied
    return replace(service, views=tuple(replace(item, version=views[item.view].version) for item in service.views))


def _check_pins(state: State, views: Mapping[str, ViewSpec], services: Mapping[str, ServiceSpec]) -> None:
    gone = set(state.views) - set(views)
    problems = [
        Problem(
            "SFS-304",
            f"Feature view '{item.view}' was removed, but service '{service.name}' uses it.",
            fix="remove it from the service first, or keep the view",
        )
        for service in services.values()
        for item in service.views
        if item.view in gone
    ]
    if problems:
        raise InvalidError(*problems)


def _view_steps(state: State, views: Mapping[str, ViewSpec], services: Mapping[str, ServiceSpec]) -> Iterator[Step]:
    for name, view in sorted(views.items()):
        current = state.views.get(name)
        if current is None:
            yield Step(Action.ADD, "view", name, view.version, view.to_json(), (f"{len(view.features)} features",))
        elif current.version != view.version:
            cost = f"a new table is built from source '{view.source.name}'; {current.reference} stays as it is"
            reasons = (*_definition_changes(current, view), cost)
            yield Step(Action.REPLACE, "view", name, view.version, view.to_json(), reasons, _users(view, services))
        elif current.content_hash != view.content_hash:
            reasons = _differences(current.to_json(), view.to_json())
            users = (
                s.name for s in services.values() if (name, view.version) in {(item.view, item.version) for item in s.views}
            )
            affected = tuple(f"service {user}" for user in sorted(users))
            yield Step(Action.CHANGE, "view", name, view.version, view.to_json(), reasons, affected)
    for name in sorted(set(state.views) - set(views)):
        reason = "its feature table and online values stay until spark-fs destroy"
        yield Step(Action.REMOVE, "view", name, state.views[name].version, None, (reason,))


def _users(view: ViewSpec, services: Mapping[str, ServiceSpec]) -> tuple[str, ...]:
    """What each service that uses the view will read after the plan."""
    uses = {(service.name, item.version) for service in services.values() for item in service.views if item.view == view.name}
    return tuple(
        f"service {name} {'keeps' if version != view.version else 'moves to'} {view.name}@{version}"
        + (" until it is changed itself" if version != view.version else "")
        for name, version in sorted(uses)
    )


def _definition_changes(old: ViewSpec, new: ViewSpec) -> tuple[str, ...]:
    reasons = [
        *_column_changes("join key", old.keys, new.keys),
        *_column_changes("feature", old.features, new.features),
    ]
    before, after = old.transformation, new.transformation
    if (before and before.digest) != (after and after.digest):
        reasons.append("transformation " + ("changed" if before and after else "added" if after else "removed"))
    for name in ("timestamp_field", "created_timestamp_field", "timezone", "field_mapping"):
        if (was := getattr(old.source, name)) != (now := getattr(new.source, name)):
            reasons.append(f"source {name}: {was or '—'} → {now or '—'}")
    return tuple(reasons)


def _column_changes(kind: str, old: Sequence[Any], new: Sequence[Any]) -> Iterator[str]:
    before, after = {c.name: c.type.name for c in old}, {c.name: c.type.name for c in new}
    yield from (f"{kind} '{name}' removed" for name in before if name not in after)
    yield from (f"{kind} '{name}' added ({after[name]})" for name in after if name not in before)
    both = [name for name in before if name in after]
    yield from (f"{kind} '{name}': {before[name]} → {after[name]}" for name in both if before[name] != after[name])
    if both == list(before) and sorted(before) == sorted(after) and list(before) != list(after):
        yield f"{kind}s reordered"


def _plain_steps(
    kind: str, old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], state: State
) -> Iterator[Step]:
    for name, body in sorted(new.items()):
        if name not in old:
            yield Step(Action.ADD, kind, name, 0, body)
        elif canonical_json(old[name]) != canonical_json(body):
            reasons = _service_changes(old[name], body) if kind == "service" else _differences(old[name], body)
            yield Step(Action.CHANGE, kind, name, 0, body, reasons, _views_of(kind, name, state))
    for name in sorted(set(old) - set(new)):
        yield Step(Action.REMOVE, kind, name, 0, None)


def _views_of(kind: str, name: str, state: State) -> tuple[str, ...]:
    """The applied views that use an entity or a source."""
    views = state.views.values()
    users = {"entity": [v for v in views if name in v.entities], "source": [v for v in views if v.source.name == name]}
    return tuple(f"view {view.reference}" for view in users.get(kind, []))


def _service_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(body: Mapping[str, Any]) -> dict[str, str]:
        views = ServiceSpec.from_json(body).views
        return {item.alias or item.view: _use(item) for item in views}

    before, after = shown(old), shown(new)
    return (
        *(f"'{name}' removed" for name in before if name not in after),
        *(f"'{name}' added: {use}" for name, use in after.items() if name not in before),
        *(f"{before[name]} → {use}" for name, use in after.items() if name in before and before[name] != use),
        *_differences({**old, "views": None}, {**new, "views": None}),
    )


def _use(item: ServiceView) -> str:
    return f"{item.view}@{item.version}" + (f"[{', '.join(item.features)}]" if item.features else "")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> tuple[str, ...]:
    reasons: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            reasons += _differences(was, now, f"{path}{name}.")
        else:
            reasons.append(f"{path}{name}: {'—' if was in (None, '') else was} → {'—' if now in (None, '') else now}")
    return tuple(reasons)

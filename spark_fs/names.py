"""What users name, views, features and services → what is applied."""

from __future__ import annotations

from collections.abc import Iterable

from spark_fs.errors import InvalidError, did_you_mean
from spark_fs.registry import State
from spark_fs.spec import Selection, ServiceSpec, ViewSpec, merge_selections, select


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Name and version of ``view`` or ``view@2``; SFS-511 if the version is no number."""
    name, at, version = reference.partition("@")
    if at and not (version.isascii() and version.isdigit()):
        raise InvalidError.of("SFS-511", f"'{reference}' does not name a view.", fix="write view or view@2")
    return name, int(version) if at else None


def choose_views(state: State, names: Iterable[str] | None, *, online: bool = False) -> list[ViewSpec]:
    """The named views, else all current ones and the older versions that services still use."""
    if names is not None:
        chosen = [state.require_view(*parse_reference(name)) for name in names]
        offline_only = [view.name for view in chosen if online and not view.online]
        if offline_only:
            raise InvalidError.of("SFS-605", f"Not for online use: {', '.join(offline_only)}.", fix="set online=True and apply")
        return chosen
    pinned = [state.versions[(item.view, item.version)] for service in state.services.values() for item in service.views]
    every = {view.reference: view for view in (*state.views.values(), *pinned)}
    if not every:
        raise InvalidError.of("SFS-303", "No feature views are applied yet.", fix="run spark-fs apply")
    return [view for view in every.values() if view.online or not online]


def feature_selection(state: State, reference: str) -> Selection:
    """The feature of ``view:feature`` or ``view@2:feature``; SFS-511 for what names none, SFS-303 for an unknown view."""
    view, _, feature = reference.partition(":")
    name, _, version = view.partition("@")
    if not feature or (version and not version.isdigit()):
        raise InvalidError.of(
            "SFS-511",
            f"'{reference}' does not name a feature.",
            why=did_you_mean(reference, [f"{v.name}:{f}" for v in state.views.values() for f in v.feature_names]),
            fix="write view:feature or view@2:feature; a service is given by its name alone, not in a list",
        )
    return select(state.require_view(name, int(version) if version else None), [feature])


def service_selections(state: State, service: ServiceSpec) -> list[Selection]:
    """The features of a service, view by view."""
    return merge_selections(
        select(state.require_view(item.view, item.version), item.features, item.alias, item.join_key_map)
        for item in service.views
    )


def refuse_in_use(state: State, spec: ViewSpec) -> None:
    """Raises SFS-310 where a view version is current, or a service uses it."""
    users = [
        s.name for s in state.services.values() for item in s.views if (item.view, item.version) == (spec.name, spec.version)
    ]
    if state.views.get(spec.name) == spec or users:
        by = f"service {', '.join(users)}" if users else "the repository"
        raise InvalidError.of(
            "SFS-310", f"Feature view '{spec.reference}' is in use by {by}.", fix="remove it there and apply first"
        )

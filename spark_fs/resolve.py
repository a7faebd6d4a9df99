"""The features that a request names → selections of views, by the applied definitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.registry import State
from spark_fs.spec import Selection, ServiceSpec, merge_selections, select

if TYPE_CHECKING:
    from spark_fs.definitions import FeatureService

#: So old may the definitions be by which an online request is answered: asking the registry takes longer than to answer it.
RECENT_SECONDS = 1.0
#: Of more different requests in that time none is remembered.
_MOST_REQUESTS = 1_000


def resolve(state: State, features: Sequence[str] | str | FeatureService) -> list[Selection]:
    """The views and features that a request names; InvalidError with every name that is not known."""
    if not isinstance(features, str) and not isinstance(features, Sequence):
        features = features.name
    if isinstance(features, str):
        return _service_selections(state, state.require_service(features))
    selections: list[Selection] = []
    problems: list[Problem] = []
    for reference in features:
        try:
            selections.append(_reference_selection(state, reference))
        except InvalidError as error:
            problems += error.problems
    if problems:
        raise InvalidError(*problems)
    return merge_selections(selections)


class RecentRequests:
    """Remembers for ``RECENT_SECONDS`` what requests have been resolved to; threads may share it."""

    def __init__(self, resolve: Callable[[Sequence[str] | str | FeatureService], list[Selection]]) -> None:
        self._resolve = resolve
        self._found: dict[str | tuple[str, ...], tuple[float, list[Selection]]] = {}

    def resolve(self, features: Sequence[str] | str | FeatureService) -> list[Selection]:
        """As ``resolve``; within the time the very same selections again."""
        now = time.monotonic()
        name = features if isinstance(features, str) else tuple(features) if isinstance(features, Sequence) else features.name
        known = self._found.get(name)
        if known is not None and now - known[0] < RECENT_SECONDS:
            return known[1]
        selections = self._resolve(features)
        if len(self._found) >= _MOST_REQUESTS:
            self._found.clear()
        self._found[name] = now, selections
        return selections

    def forget(self) -> None:
        """Resolve all requests anew."""
        self._found.clear()


def _reference_selection(state: State, reference: str) -> Selection:
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


def _service_selections(state: State, service: ServiceSpec) -> list[Selection]:
    return merge_selections(
        select(state.require_view(item.view, item.version), item.features, item.alias, item.join_key_map)
        for item in service.views
    )

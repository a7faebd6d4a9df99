"""Deciding how training rows are joined: which views share a shuffle, what is pruned, and what is wrong with a request.

Plain data and pure functions, no Spark: a plan can be printed, compared and tested anywhere. ``asof`` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import reduce
from typing import Any

from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.intervals import BEGINNING, text, to_micros
from spark_fs.offline.layout import DataFile, Layout
from spark_fs.offline.placement import Placement, place

#: Columns with their Spark types as text, as ``DataFrame.dtypes`` gives them.
Columns = Sequence[tuple[str, str]]

STRATEGIES = ("auto", "window", "colocated")

#: Up to so many distinct keys the feature rows of other keys are dropped before the shuffle, by a broadcast semi-join.
#: The set then takes some 10 MB per executor; it costs a second pass over the spine's keys.
BROADCAST_KEYS = 100_000

#: The most tasks of a join whose spine the driver sends, in rounds of those that run at a time.
_PACKED_ROUNDS = 4

_INTEGERS = ("tinyint", "smallint", "int", "bigint")
#: Types on which equality is exact. Floats (NaN, -0.0), collated strings and nested types are left out.
_KEY_TYPES = frozenset({*_INTEGERS, "string", "binary", "boolean", "date", "timestamp", "timestamp_ntz"})


@dataclass(frozen=True, slots=True)
class AsofView:
    """One frame of feature rows and what is wanted of it; no Spark inside.

    ``keys`` pairs (spine column, feature column), empty for a view without entity; ``features`` pairs (feature column,
    output column). ``columns`` is the frame's ``dtypes``. ``ttl`` None or zero: no lower bound. ``unique``: each (keys,
    event, created) is there once; where it is not, ``hash_columns`` names ALL value columns of the view, asked for or
    not, so that ties end the same way in every request. ``source`` is what ``explain`` shows.

    ``layout``: the files of a feature table, whose ``keys`` are in the order of its buckets; None for other frames.
    ``obstacle`` says why its files cannot be read where they lie.
    """

    name: str
    keys: tuple[tuple[str, str], ...]
    features: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]
    event_time: str = "event_timestamp"
    created_time: str | None = None
    ttl: timedelta | None = None
    unique: bool = False
    hash_columns: tuple[str, ...] = ()
    source: str = ""
    layout: Layout | None = None
    obstacle: str = ""

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The frame's columns that the join needs, each once; all others are never read."""
        times = (self.event_time,) if self.created_time is None else (self.event_time, self.created_time)
        hashed = () if self.unique else self.hash_columns
        return tuple(dict.fromkeys([*(key for _, key in self.keys), *times, *(name for name, _ in self.features), *hashed]))


@dataclass(frozen=True, slots=True)
class SpineStats:
    """What the spine tells before the join: its rows, their times, and how many keys they have.

    ``first`` and ``last`` are the least and greatest time, None without any; ``null_times`` counts rows without one.
    ``distinct_keys`` estimates (± 5 %) the distinct keys without nulls of each sorted tuple of key columns. ``residues`` has
    for each tuple, in its own order, the rows without null keys by their checksum modulo ``placement.RESIDUES``.
    """

    rows: int
    null_times: int
    first: datetime | None
    last: datetime | None
    distinct_keys: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    residues: Mapping[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AsofGroup:
    """Views that share their spine columns and are joined in one step.

    ``keys`` pairs (spine column, Spark type in which keys are compared), in the order in which each view has its keys; views
    without keys may be among those of a colocated group. ``reasons`` says for each view why this strategy. ``files`` has for
    each view those left after pruning. ``semi_join``: feature rows whose keys the spine does not have are dropped before the
    shuffle. ``placement``: where a colocated join sends the spine's rows; None: they stay. ``packed``: the
    driver sends them, for the spine is small and already there.
    """

    keys: tuple[tuple[str, str], ...]
    views: tuple[AsofView, ...]
    strategy: str
    reasons: tuple[str, ...]
    files: tuple[tuple[DataFile, ...], ...]
    semi_join: bool = False
    semi_join_reason: str = ""
    placement: Placement | None = None
    packed: bool = False

    @property
    def shuffles(self) -> int:
        """How often the spine is shuffled for this group."""
        return 1 if self.strategy == "window" or (self.placement and not self.packed) else 0


@dataclass(frozen=True, slots=True)
class AsofPlan:
    """What ``execute`` will do; ``str(plan)`` is the text of ``explain``, ``to_json`` the same as data."""

    spine_columns: tuple[str, ...]
    spine_time: str
    known_at: bool
    outputs: tuple[str, ...]
    groups: tuple[AsofGroup, ...]
    stats: SpineStats | None
    notes: tuple[str, ...] = ()

    def time_range(self, view: AsofView) -> tuple[datetime, datetime] | None:
        """The event times, both inclusive, outside which no row of the view can be visible; None where not known.

        Without a ttl the first is BEGINNING.
        """
        if self.stats is None or self.stats.first is None or self.stats.last is None:
            return None
        first = self.stats.first
        start = first - view.ttl if view.ttl and view.ttl < first - BEGINNING else BEGINNING
        return start, self.stats.last

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data: times as ISO 8601 UTC text, ttl in seconds."""
        stats = self.stats
        return {
            "spine": None
            if stats is None
            else {
                "rows": stats.rows,
                "null_times": stats.null_times,
                "first": stats.first and text(stats.first),
                "last": stats.last and text(stats.last),
            },
            "spine_time": self.spine_time,
            "known_at": self.known_at,
            "groups": [self._group_json(group) for group in self.groups],
            "shuffles": sum(group.shuffles for group in self.groups),
            "notes": list(self.notes),
        }

    def _group_json(self, group: AsofGroup) -> dict[str, Any]:
        return {
            "keys": [name for name, _ in group.keys],
            "strategy": group.strategy,
            "shuffles": group.shuffles,
            "tasks": group.placement.count if group.placement else None,
            "packed": group.packed,
            "semi_join": group.semi_join,
            "semi_join_reason": group.semi_join_reason,
            "views": [
                {**self._view_json(view, files), "reason": reason}
                for view, files, reason in zip(group.views, group.files, group.reasons, strict=True)
            ],
        }

    def _view_json(self, view: AsofView, files: Sequence[DataFile]) -> dict[str, Any]:
        bounds = self.time_range(view)
        before = view.layout.files if view.layout else ()
        return {
            "name": view.name,
            "source": view.source,
            "features": [output for _, output in view.features],
            "read_columns": list(view.read_columns),
            "ttl_seconds": view.ttl.total_seconds() if view.ttl else None,
            "event_time_range": bounds and [text(instant) for instant in bounds],
            "buckets": view.layout.buckets if view.layout else None,
            "files": {"all": len(before), "read": len(files)} if view.layout else None,
            "bytes": {"all": _size(before), "read": _size(files)} if view.layout else None,
            "rows": {"all": _rows(before), "read": _rows(files)} if view.layout else None,
        }

    def __str__(self) -> str:
        body = self.to_json()
        spine, rule = body["spine"], "event and created time" if self.known_at else "event time"
        rows = f"{spine['rows']:,} spine rows" if spine else "a spine not looked at yet"
        lines = [f"As-of join of {rows} on {self.spine_time}; visible by {rule}."]
        if spine and spine["first"]:
            lines.append(f"The spine's times go from {spine['first']} to {spine['last']}.")
        if spine and spine["null_times"]:
            lines.append(f"{spine['null_times']:,} spine rows have no time and get nulls.")
        for number, group in enumerate(body["groups"], 1):
            lines.append(f"{number}. keys {', '.join(group['keys']) or '(none)'}: {group['strategy']}: {_movement(group)}")
            lines += [line for view in group["views"] for line in _view_lines(view)]
        return "\n".join([*lines, *self.notes])


def _movement(group: Mapping[str, Any]) -> str:
    views = f"{len(group['views'])} views" if len(group["views"]) > 1 else "the view"
    if group["strategy"] == "window":
        return f"one shuffle and one sort for {views}; feature rows: {group['semi_join_reason']}"
    moved = f"the spine moves once, to {group['tasks']} tasks" if group["shuffles"] else "nothing moves"
    if group["packed"]:
        moved = f"the spine is small: the driver has read it and sends it to {group['tasks']} tasks"
    return f"{moved}; the rows of {views} are read where they lie"


def _view_lines(view: Mapping[str, Any]) -> list[str]:
    bounds = view["event_time_range"]
    ttl = "no ttl" if view["ttl_seconds"] is None else f"ttl {timedelta(seconds=view['ttl_seconds'])}"
    seen = "all"
    if bounds:
        seen = f"up to {bounds[1]}" if view["ttl_seconds"] is None else f"{bounds[0]} to {bounds[1]}"
    lines = [
        f"   - {view['name']}: {view['source'] or 'a DataFrame'}",
        f"     why: {view['reason']}",
        f"     reads {', '.join(view['read_columns'])}",
        f"     event times: {seen} ({ttl})",
    ]
    if view["files"]:
        files, sizes, rows = view["files"], view["bytes"], view["rows"]
        lines.append(
            f"     files: {files['read']:,} of {files['all']:,}, {sizes['read'] / 1e6:,.1f} of {sizes['all'] / 1e6:,.1f} MB, "
            f"{rows['read']:,} of {rows['all']:,} rows, in {view['buckets']} buckets"
        )
    return lines


def _size(files: Sequence[DataFile]) -> int:
    return sum(file.size_bytes for file in files)


def _rows(files: Sequence[DataFile]) -> int:
    return sum(file.rows for file in files)


def plan_asof(
    views: Sequence[AsofView],
    spine_columns: Columns,
    *,
    spine_time: str = "event_timestamp",
    stats: SpineStats | None = None,
    known_at: bool = False,
    strategy: str = "auto",
    spine_obstacle: str = "",
    parallelism: int = 2,
    small_spine: bool = False,
    notes: Sequence[str] = (),
) -> AsofPlan:
    """Check the request and decide how to join. Starts no Spark job and needs no Spark.

    ``spine_columns`` is the spine's ``dtypes``. Without ``stats`` nothing is pruned by time or key: plan once without
    them to have the names and types checked before ``spine_stats`` starts a job, then again with them.

    ``strategy``: ``window``, ``colocated`` or ``auto``, which is colocated for every view that has a ``layout`` and no
    ``obstacle``, unless ``spine_obstacle`` says why the spine's rows cannot pass through Arrow. ``parallelism``: how many tasks
    run at a time. ``small_spine``: the driver has the spine's rows. ``notes`` are lines for ``explain``.

    Raises InvalidError with all problems at once: SFS-503 an output name is taken (case does not tell names apart),
    SFS-504 a column is missing or there twice, SFS-505 key types that cannot be compared exactly, SFS-506 a time column
    that is not TIMESTAMP, SFS-507 ``known_at`` for a view without created time, SFS-508 a negative ttl, SFS-513 a strategy
    that is unknown or, asked for, cannot join a view.
    """
    problems = [
        *_problems(views, spine_columns, spine_time, known_at),
        *_strategy_problems(views, strategy, spine_obstacle),
    ]
    if problems:
        raise InvalidError(*problems)
    grouped: dict[tuple[str, tuple[str, ...]], list[tuple[AsofView, str]]] = {}
    for view in views:
        chosen, reason = _decide_strategy(view, strategy, spine_obstacle)
        if chosen == "window":  # the order of the keys plays a part only where rows lie by them
            view = replace(view, keys=tuple(sorted(view.keys)))
        grouped.setdefault((chosen, tuple(spine for spine, _ in view.keys)), []).append((view, reason))
    _attach_keyless(grouped)
    # The fewest columns first: they are moved again by each step that follows.
    order = sorted(grouped, key=lambda group: (group[0] != "window", sum(len(view.features) for view, _ in grouped[group])))
    plan = AsofPlan(
        spine_columns=tuple(name for name, _ in spine_columns),
        spine_time=spine_time,
        known_at=known_at,
        outputs=tuple(output for view in views for _, output in view.features),
        groups=(),
        stats=stats,
        notes=tuple(notes),
    )
    groups = [_plan_group(plan, *group, grouped[group], dict(spine_columns), parallelism) for group in order]
    # Rows come to the first step as the spine has them, to all others with what was joined before. What is packed has no more
    # partitions than tasks run at a time now; a cluster that can grow is to see all tasks of a large join.
    if small_spine and groups and groups[0].placement and groups[0].placement.count <= _PACKED_ROUNDS * parallelism:
        groups[0] = replace(groups[0], packed=True)
    return replace(plan, groups=tuple(groups))


def _strategy_problems(views: Sequence[AsofView], strategy: str, spine_obstacle: str) -> Iterator[Problem]:
    if strategy not in STRATEGIES:
        fix = did_you_mean(strategy, STRATEGIES) or f"one of {', '.join(STRATEGIES)}"
        yield Problem("SFS-513", f"There is no join strategy '{strategy}'.", fix=fix)
    if strategy == "colocated":
        for view in views:
            if why := spine_obstacle or _obstacle(view):
                fix = "use strategy auto, or build the view"
                yield Problem("SFS-513", f"View '{view.name}' cannot be joined where its rows lie.", f"{why}.", fix=fix)


def _obstacle(view: AsofView) -> str:
    return view.obstacle or ("" if view.layout else "its rows do not come from a feature table")


def _decide_strategy(view: AsofView, strategy: str, spine_obstacle: str) -> tuple[str, str]:
    if strategy == "window":
        return "window", "asked for"
    if obstacle := _obstacle(view) or spine_obstacle:
        return "window", obstacle
    return "colocated", "asked for" if strategy == "colocated" else "a feature table, with files that can be read in place"


def _attach_keyless(grouped: dict[tuple[str, tuple[str, ...]], list[tuple[AsofView, str]]]) -> None:
    """Views without keys match rows of every key: they need no step of their own where there is another colocated one."""
    others = [group for group in grouped if group[0] == "colocated" and group[1]]
    if others and ("colocated", ()) in grouped:
        grouped[others[0]] += grouped.pop(("colocated", ()))


def _plan_group(
    plan: AsofPlan,
    strategy: str,
    keys: tuple[str, ...],
    members: Sequence[tuple[AsofView, str]],
    spine: Mapping[str, str],
    parallelism: int,
) -> AsofGroup:
    views, reasons = zip(*members, strict=True)
    keyed = [view for view in views if view.keys]
    types = [
        reduce(_wider, (dict(view.columns)[view.keys[position][1]] for view in keyed), spine[name])
        for position, name in enumerate(keys)
    ]
    files = tuple(_visible_files(plan, view) for view in views)
    group = AsofGroup(tuple(zip(keys, types, strict=True)), views, strategy, reasons, files)
    if strategy == "window":
        semi_join, reason = _decide_semi_join(keys, plan.stats)
        return replace(group, semi_join=semi_join, semi_join_reason=reason)
    if not keys:
        return group
    lying = [(view.layout.buckets, found) for view, found in zip(views, files, strict=True) if view.keys and view.layout]
    return replace(group, placement=place(lying, plan.stats.residues.get(keys) if plan.stats else None, parallelism))


def _visible_files(plan: AsofPlan, view: AsofView) -> tuple[DataFile, ...]:
    """The view's files that can hold a visible row, by the event times that the table's log states."""
    if view.layout is None or (plan.stats is not None and plan.stats.first is None):
        return ()
    bounds = plan.time_range(view)
    if bounds is None:
        return view.layout.files
    first, last = to_micros(bounds[0]), to_micros(bounds[1])
    return tuple(
        file
        for file in view.layout.files
        if (file.first is None or file.first <= last) and (not view.ttl or file.last is None or file.last >= first)
    )


def _decide_semi_join(keys: tuple[str, ...], stats: SpineStats | None) -> tuple[bool, str]:
    if not keys:
        return False, "all rows (no keys)"
    if stats is None or keys not in stats.distinct_keys:
        return False, "all (the spine's keys were not counted)"
    count = stats.distinct_keys[keys]
    if count > BROADCAST_KEYS:
        return False, f"all (about {count:,}, more than {BROADCAST_KEYS:,} are not broadcast)"
    return True, f"only those of the spine (about {count:,}, at most {BROADCAST_KEYS:,} are broadcast)"


def _problems(views: Sequence[AsofView], spine: Columns, spine_time: str, known_at: bool) -> Iterator[Problem]:
    wanted = [spine_time, *(name for view in views for name, _ in view.keys)]
    yield from _column_problems("the spine", spine, wanted, [spine_time])
    for view in views:
        owner = f"view '{view.name}'"
        times = [name for name in (view.event_time, view.created_time) if name is not None]
        yield from _column_problems(owner, view.columns, view.read_columns, times)
        yield from _key_problems(owner, view, dict(spine))
        if known_at and view.created_time is None:
            yield Problem(
                "SFS-507",
                f"known_at needs the created time of {owner}, which has none.",
                fix="name the column that says when a row became known, or leave known_at out",
            )
        if view.ttl is not None and view.ttl < timedelta(0):
            yield Problem("SFS-508", f"The ttl of {owner} is negative ({view.ttl}).", fix="use None for no lower bound")
    yield from _name_problems(views, spine)


def _column_problems(owner: str, columns: Columns, wanted: Iterable[str], times: Iterable[str]) -> Iterator[Problem]:
    names, types = [name for name, _ in columns], dict(columns)
    for name in dict.fromkeys(wanted):
        if name not in types:
            yield Problem("SFS-504", f"Column '{name}' is missing in {owner}.", did_you_mean(name, names))
        elif names.count(name) > 1:
            yield Problem("SFS-504", f"Column '{name}' is there twice in {owner}.", fix="rename one of them")
    for name in times:
        if types.get(name, "timestamp") != "timestamp":
            yield Problem(
                "SFS-506",
                f"The time column '{name}' of {owner} is {types[name]}, not timestamp.",
                "Without a time zone it does not say which instant is meant.",
                fix=f"convert it first: F.to_utc_timestamp('{name}', '<its zone>'), with the session time zone UTC",
            )


def _key_problems(owner: str, view: AsofView, spine: Mapping[str, str]) -> Iterator[Problem]:
    columns = dict(view.columns)
    for spine_key, feature_key in view.keys:
        left, right = spine.get(spine_key), columns.get(feature_key)
        if left is None or right is None:
            continue  # reported as missing
        both_integers = left in _INTEGERS and right in _INTEGERS
        if not both_integers and (left != right or (left not in _KEY_TYPES and not left.startswith("decimal"))):
            yield Problem(
                "SFS-505",
                f"The key '{spine_key}' is {left} in the spine, '{feature_key}' is {right} in {owner}.",
                "Keys are compared exactly: integers of any width, or equal types that are no floats and not nested.",
                fix="cast one of them",
            )


def _name_problems(views: Sequence[AsofView], spine: Columns) -> Iterator[Problem]:
    claims: dict[str, list[tuple[str, str]]] = {}
    for name, _ in spine:
        claims.setdefault(name.lower(), []).append((name, "the spine"))
    for view in views:
        for feature, output in view.features:
            claims.setdefault(output.lower(), []).append((output, f"{view.name}:{feature}"))
    for claim in claims.values():
        if len(claim) > 1:
            yield Problem(
                "SFS-503",
                f"The column name '{claim[0][0]}' is claimed by {' and '.join(owner for _, owner in claim)}.",
                fix="give the features other output names (prefix, full_feature_names) or rename the spine's column",
            )


def _wider(left: str, right: str) -> str:
    return max(left, right, key=_INTEGERS.index) if left in _INTEGERS and right in _INTEGERS else left

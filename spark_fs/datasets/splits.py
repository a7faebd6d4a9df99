"""How rows of a dataset are split: rules as values, and the column that they give.

By time, by a hash of chosen columns (also stratified), or into folds of equal size. A rule looks at a row and at itself, never
at other rows: the same row falls into the same split however the dataset grows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate, pairwise
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_fs.datasets.manifest import SPLIT
from spark_fs.errors import InvalidError, Problem, did_you_mean
from spark_fs.intervals import BEGINNING, from_text, text, to_micros
from spark_fs.offline.compute import instant_literal, joined_bytes, key_text, quoted

#: Hashes become numbers in [0, 1) with so many bits, which a double holds exactly.
_BITS = 53
#: The names of parts that were given none.
_NAMES = {2: ("train", "test"), 3: ("train", "validation", "test")}
#: Of so many strata at most the shares are held exactly.
MOST_STRATA = 1_000
#: Types of columns that a hash may go by: their text tells them apart.
_BY_TYPES = re.compile(r"tinyint|smallint|int|bigint|string|binary|boolean|date|timestamp|decimal\(\d+,0\)")


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Parts one after the other in time, cut at instants that belong to the later part.

    ``gap`` (an embargo) leaves out rows with a time in the ``gap`` before each cut-off: labels that look ahead so far would
    tell the earlier part what the later one is about. Rows without a time, and in a gap, are of no split.
    """

    cutoffs: tuple[datetime, ...]
    names: tuple[str, ...] = ()
    gap: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        object.__setattr__(self, "names", _names(self.names, len(self.cutoffs) + 1))
        problems = []
        if not self.cutoffs or any(instant.tzinfo is None for instant in self.cutoffs):
            problems.append("A split by time needs cut-offs with a time zone.")
        elif any(later - earlier <= self.gap for earlier, later in pairwise(self.cutoffs)):
            problems.append("Cut-offs must rise, by more than the gap between splits.")
        if self.gap < timedelta(0):
            problems.append("The gap between splits is negative.")
        _refuse(problems)

    def column(self, time: str) -> Column:
        """The name of each row's part, by the column with its time."""
        starts = [BEGINNING, *self.cutoffs]
        split = F.lit(None).cast("string")
        for start, end, name in zip(starts, [*self.cutoffs, None], self.names, strict=True):
            inside = quoted(time) >= instant_literal(start) if start != BEGINNING else quoted(time).isNotNull()
            if end is not None:
                inside &= quoted(time) < F.timestamp_micros(F.lit(to_micros(end) - self.gap // timedelta(microseconds=1)))
            split = F.when(inside, name).otherwise(split)
        return split

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON values."""
        cutoffs, gap = [text(instant) for instant in self.cutoffs], self.gap.total_seconds()
        return {"kind": "time", "names": list(self.names), "cutoffs": cutoffs, "gap_seconds": gap}


@dataclass(frozen=True, slots=True)
class RandomSplit:
    """Parts of given shares, by a hash of the columns ``by``: all rows with the same values there are of one part.

    ``by`` empty: the join keys of the features, so that no entity is in two parts. Rows with a null there are of no split.
    With ``stratify``, a column of the spine that does not change within ``by``, each of its values (at most 1,000; null is one)
    is cut in these shares by itself, to an entity, in the version that saw it first; ``bounds`` notes where, and later versions
    of the dataset keep to it.
    """

    shares: tuple[float, ...]
    names: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    seed: int = 0
    stratify: str | None = None
    bounds: Mapping[str, tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        object.__setattr__(self, "by", tuple(self.by))
        object.__setattr__(self, "names", _names(self.names, len(self.shares)))
        problems = []
        if len(self.shares) < 2 or any(not 0 < share < 1 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-9:
            problems.append("The shares of a split must be two or more numbers above 0 whose sum is 1.")
        _refuse(problems)

    @property
    def edges(self) -> tuple[float, ...]:
        """Where one part ends and the next begins, in [0, 1)."""
        return tuple(accumulate(self.shares[:-1]))

    def column(self, types: Mapping[str, str]) -> Column:
        """The name of each row's part; ``types`` are those of the frame's columns."""
        place = self.place(types)
        bounds = dict(self.bounds or {})
        edges = [F.lit(edge) for edge in self.edges]
        if bounds:
            stratum = stratum_of(quoted(str(self.stratify)))
            noted = F.create_map(*(part for name, of in bounds.items() for part in (F.lit(name), F.array(*map(F.lit, of)))))
            edges = [F.coalesce(noted[stratum][n], edge) for n, edge in enumerate(edges)]
        split = F.lit(self.names[-1])
        for edge, name in reversed(list(zip(edges, self.names, strict=False))):
            split = F.when(place < edge, name).otherwise(split)
        return F.when(place.isNotNull(), split)

    def place(self, types: Mapping[str, str]) -> Column:
        """A number in [0, 1) of the columns ``by``: xxHash64 of seed and key bytes; null where one of them is."""
        return _unit_interval(types, self.by, self.seed)

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON values."""
        body = {
            "kind": "random",
            "names": list(self.names),
            "shares": list(self.shares),
            "by": list(self.by),
            "seed": self.seed,
        }
        if self.stratify is None:
            return body
        bounds = None if self.bounds is None else {name: list(edges) for name, edges in self.bounds.items()}
        return {**body, "stratify": self.stratify, "bounds": bounds}


@dataclass(frozen=True, slots=True)
class KFold:
    """``k`` parts of about equal size, ``fold0`` to ``fold<k-1>``, by a hash of the columns ``by`` as in ``RandomSplit``."""

    k: int
    by: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", tuple(self.by))
        _refuse([] if 2 <= self.k <= 1_000 else ["The number of folds must be between 2 and 1,000."])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the folds."""
        return tuple(f"fold{number}" for number in range(self.k))

    def column(self, types: Mapping[str, str]) -> Column:
        """The name of each row's fold; ``types`` are those of the frame's columns."""
        number = F.floor(_unit_interval(types, self.by, self.seed) * self.k).cast("string")
        return F.concat(F.lit("fold"), number)

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return {"kind": "kfold", "names": list(self.names), "k": self.k, "by": list(self.by), "seed": self.seed}


SplitRule = TimeSplit | RandomSplit | KFold


def split_column(rule: SplitRule, frame: DataFrame, time: str) -> Column:
    """The name of the part that each row of the frame is in; null for rows of none."""
    return rule.column(time) if isinstance(rule, TimeSplit) else rule.column(dict(frame.dtypes))


def split_from_json(body: Mapping[str, Any]) -> SplitRule:
    """The rule that ``to_json`` has given."""
    if body["kind"] == "time":
        gap = timedelta(seconds=body["gap_seconds"])
        return TimeSplit(tuple(map(from_text, body["cutoffs"])), tuple(body["names"]), gap)
    if body["kind"] == "kfold":
        return KFold(body["k"], tuple(body["by"]), body["seed"])
    bounds = body.get("bounds")
    return RandomSplit(
        tuple(body["shares"]),
        tuple(body["names"]),
        tuple(body["by"]),
        body["seed"],
        body.get("stratify"),
        None if bounds is None else {name: tuple(edges) for name, edges in bounds.items()},
    )


def settle_split(rule: SplitRule, spine: DataFrame, keys: Sequence[str], earlier: SplitRule | None = None) -> SplitRule:
    """The rule with all that it leaves open: columns to go by, and where strata are cut.

    ``keys`` are the join keys of the features, ``earlier`` the settled rule of the version before. Two Spark jobs for strata,
    none otherwise. Raises InvalidError SFS-515 for columns that are missing or cannot be hashed, for a stratum that changes
    within ``by``, and for too many strata.
    """
    if isinstance(rule, TimeSplit):
        return rule
    settled = replace(rule, by=rule.by or tuple(keys))
    types = dict(spine.dtypes)
    wanted = [*settled.by, *([settled.stratify] if isinstance(settled, RandomSplit) and settled.stratify else [])]
    problems = [
        Problem("SFS-515", f"There is no column '{name}' to split by.", did_you_mean(name, types))
        for name in wanted
        if name not in types
    ]
    problems += [
        Problem(
            "SFS-515",
            f"Rows cannot be split by '{name}', which is {types[name]}.",
            fix="go by whole numbers, text, dates or instants",
        )
        for name in settled.by
        if name in types and not _BY_TYPES.fullmatch(types[name])
    ]
    if not settled.by:
        problems.append(Problem("SFS-515", "The features have no join keys to split by.", fix="name columns of the spine"))
    if problems:
        raise InvalidError(*problems)
    if not isinstance(settled, RandomSplit) or settled.stratify is None:
        return settled
    kept = earlier.bounds if isinstance(earlier, RandomSplit) and replace(earlier, bounds=None) == settled else None
    return replace(settled, bounds={**_bounds(settled, spine), **(kept or {})})


def _bounds(rule: RandomSplit, spine: DataFrame) -> dict[str, tuple[float, ...]]:
    """Where the hashes of each stratum are cut, for its entities to fall into the parts as the shares say."""
    stratum = stratum_of(quoted(str(rule.stratify)))
    entities = spine.select(rule.place(dict(spine.dtypes)).alias("place"), stratum.alias("stratum")).dropna().distinct()
    mixed = entities.groupBy("place").agg(F.count("*").alias("strata")).where("strata > 1").limit(1).count()
    if mixed:
        raise InvalidError.of(
            "SFS-515",
            f"'{rule.stratify}' changes within {', '.join(rule.by)}.",
            why="An entity would be in two splits.",
            fix="stratify by what does not change, or split by more columns",
        )
    cut = F.percentile("place", F.array(*map(F.lit, rule.edges)))
    found = entities.groupBy("stratum").agg(cut.alias("edges")).limit(MOST_STRATA + 1).collect()
    if len(found) > MOST_STRATA:
        raise InvalidError.of(
            "SFS-515", f"'{rule.stratify}' has more than {MOST_STRATA:,} values.", fix="stratify by fewer, such as ranges"
        )
    return {row["stratum"]: tuple(row["edges"]) for row in sorted(found, key=lambda row: str(row["stratum"]))}


def stratum_of(column: Column) -> Column:
    """The text by which a stratum is noted."""
    return F.coalesce(column.cast("string"), F.lit("null"))


def _unit_interval(types: Mapping[str, str], by: Sequence[str], seed: int) -> Column:
    key = joined_bytes([key_text(quoted(name), types[name]) for name in by])
    hashed = F.shiftrightunsigned(F.xxhash64(F.lit(seed).cast("bigint"), key), 64 - _BITS)
    return F.when(key.isNotNull(), hashed / F.lit(float(1 << _BITS)))


def split_counts(names: Sequence[str], column: str = SPLIT) -> list[Column]:
    """Aggregates: how many rows each part has, ``split_<n>``."""
    return [F.count_if(F.col(column) == name).alias(f"split_{n}") for n, name in enumerate(names)]


def parse_split(
    given: str, *, by: Sequence[str] = (), seed: int = 0, gap: timedelta = timedelta(0), stratify: str | None = None
) -> SplitRule:
    """A rule from text: ``time=2013-07-01,2013-10-01``, ``random=0.8,0.1,0.1`` or ``kfold=5``.

    ``by``, ``seed``, ``gap`` and ``stratify`` as the rules have them. Raises InvalidError SFS-515 for other text, and for what
    the rule does not know.
    """
    kind, _, values = given.partition("=")
    fitting = {"time": {"gap"}, "random": {"by", "seed", "stratify"}, "kfold": {"by", "seed"}}
    if kind not in fitting or not values:
        fix = "time=2013-07-01,2013-10-01, random=0.8,0.1,0.1 or kfold=5"
        raise InvalidError.of("SFS-515", f"'{given}' is no rule to split by.", fix=fix)
    options = {"by": tuple(by), "seed": seed, "gap": gap, "stratify": stratify}
    unfit = [name for name, value in options.items() if value and name not in fitting[kind]]
    if unfit:
        raise InvalidError.of(
            "SFS-515",
            f"A split by {kind} does not know {', '.join(unfit)}.",
            fix=f"it knows {', '.join(sorted(fitting[kind]))}",
        )
    try:
        if kind == "time":
            return TimeSplit(tuple(from_text(value) for value in values.split(",")), gap=gap)
        if kind == "random":
            return RandomSplit(tuple(map(float, values.split(","))), by=tuple(by), seed=seed, stratify=stratify)
        return KFold(int(values), tuple(by), seed)
    except ValueError as error:
        raise InvalidError.of("SFS-515", f"'{given}' is no rule to split by.", why=f"{error}.") from None


def _names(names: Sequence[str], parts: int) -> tuple[str, ...]:
    chosen = tuple(names) or _NAMES.get(parts, tuple(f"part{number}" for number in range(parts)))
    if len(chosen) != parts or len(set(chosen)) != parts or not all(chosen):
        raise InvalidError.of("SFS-515", f"{parts} parts need {parts} different names.", fix="name each of them once")
    return chosen


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise InvalidError(*(Problem("SFS-515", problem) for problem in problems))

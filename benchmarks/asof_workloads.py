"""What bench_asof measures: workloads of arms that run in turns, and the targets they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Engine processes by name: what benchmarks.asof_engines is started with.
SESSIONS = {
    "spark": ("spark", "--memory", "8g"),
    #: Ours, so that what a range join of minutes leaves behind in a JVM is nobody else's price.
    "colocated": ("spark", "--memory", "8g"),
    "spark_4g": ("spark", "--memory", "4g"),
    "spark_1core": ("spark", "--memory", "4g", "--cores", "1"),
    "spark_1cpu": ("spark", "--memory", "4g", "--cores", "1", "--cpus", "1"),
    "duckdb": ("duckdb",),
    "polars": ("polars",),
}


@dataclass(frozen=True)
class Cell:
    """One arm on one training set in one process: what is run once a round."""

    arm: str
    training: str
    session: str = "spark"

    @property
    def name(self) -> str:
        """Arm, training set, and the process where that is not the usual one."""
        usual = self.session in ("spark", self.arm)
        return f"{self.arm}@{self.training}" + ("" if usual else f" in {self.session}")


@dataclass(frozen=True)
class Target:
    """A bound on ``of``, or on the ratio ``of`` : ``to``; ``metric`` is what a run records."""

    name: str
    of: Cell
    to: Cell | None = None
    at_least: float | None = None
    at_most: float | None = None
    metric: str = "seconds"

    @property
    def bound(self) -> str:
        """The bound as a person writes it."""
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Workload:
    """Cells that run in turns. The first is the one that the others are compared with."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]


def _cells(training: str, arms: Sequence[str]) -> tuple[Cell, ...]:
    return tuple(Cell(arm, training, arm if arm in SESSIONS else "spark") for arm in arms)


_ALL_ARMS = ("colocated", "window", "range", "shuffle", "duckdb", "polars")


def _medium() -> Workload:
    ours, window, range_, shuffle, duckdb, _ = cells = _cells("medium", _ALL_ARMS)
    return Workload(
        "medium",
        "1 M spine rows, views of 10 M and 5 M rows, 200,000 keys",
        cells,
        (
            Target("range join : colocated", range_, ours, at_least=6),
            Target("range join : window", range_, window, at_least=2),
            Target("window : colocated", window, ours, at_least=5),
            Target("shuffle only : colocated", shuffle, ours, at_least=1),
            Target("colocated : DuckDB", ours, duckdb, at_most=1.2),
        ),
    )


def _deep() -> Workload:
    ours, _, range_, _, duckdb, _ = cells = _cells("deep", _ALL_ARMS)
    medium = Cell("colocated", "medium", "colocated")
    return Workload(
        "deep",
        "the same rows of 20,000 keys",
        (*cells, medium),
        (
            Target("range join : colocated", range_, ours, at_least=25),
            Target("colocated : DuckDB", ours, duckdb, at_most=1.0),
            Target("deep : medium", ours, medium, at_most=1.1),
        ),
    )


def _skew() -> Workload:
    ours, *others = _cells("skew", ("colocated", "window", "duckdb"))
    medium = Cell("colocated", "medium", "colocated")
    return Workload(
        "skew",
        "as medium, but one key has 30 % of the feature rows and 10 % of the spine",
        (ours, medium, *others),
        (
            Target("skew : medium", ours, medium, at_most=1.5),
            Target("largest worker, skew : medium", ours, medium, at_most=1.3, metric="worker_max_bytes"),
        ),
    )


def _small() -> Workload:
    ours, *others = _cells("small", ("colocated", "window", "duckdb"))
    medium = Cell("colocated", "medium", "colocated")
    target = Target("small : medium", ours, medium, at_most=0.5)
    return Workload("small", "10,000 spine rows on medium's tables", (ours, medium, *others), (target,))


def _ten() -> Workload:
    ours, *others = _cells("ten", ("colocated", "window", "duckdb"))
    one = Cell("colocated", "one_of_ten", "colocated")
    target = Target("ten views : one", ours, one, at_most=4)
    return Workload("ten", "ten views of 1 M rows, 3 features each, 1 M spine rows", (ours, one, *others), (target,))


def _wide() -> Workload:
    ours, *others = _cells("five_of_wide", ("colocated", "window", "duckdb"))
    five = Cell("colocated", "five", "colocated")
    target = Target("5 of 200 columns : 5 of 5", ours, five, at_most=1.3)
    return Workload("wide", "5 features of a view of 200, 1 M rows, 1 M spine rows", (ours, five, *others), (target,))


def _decayed() -> Workload:
    daily, compacted, once = (Cell("colocated", name) for name in ("daily", "compacted", "once"))
    return Workload(
        "decayed",
        "10 M rows built in 100 daily builds; the same, then compacted; the same rows built at once",
        (daily, compacted, once),
        (
            Target("daily builds : one build", daily, once, at_most=2),
            Target("compacted : one build", compacted, once, at_most=1.1),
        ),
    )


def _growth() -> Workload:
    growth, medium = (Cell("colocated", name, "spark_4g") for name in ("growth", "medium"))
    return Workload(
        "growth",
        "ten times medium: 10 M spine rows, 100 M and 50 M rows, 2 M keys; a driver of 4 GB",
        (growth, medium),
        (
            Target("growth : medium", growth, medium, at_most=11),
            Target("largest worker, bytes", growth, at_most=1.5e9, metric="worker_max_bytes"),
        ),
    )


def _cores() -> Workload:
    two, one, pinned = (Cell("colocated", "medium", session) for session in ("spark_4g", "spark_1core", "spark_1cpu"))
    return Workload(
        "cores",
        "medium with local[2], with local[1], and with local[1] where the machine has one processor only",
        (two, one, pinned),
        (
            Target("local[1] : local[2]", one, two, at_least=1.7),
            Target("one processor : local[2]", pinned, two, at_least=1.7),
        ),
    )


def _price() -> Workload:
    build, plain = _cells("medium", ("build", "plain_write"))
    target = Target("build : plain Delta write", build, plain, at_most=2)
    return Workload("price", "10 M rows of raw data into a feature table", (build, plain), (target,))


_EVERY = (_medium(), _deep(), _skew(), _small(), _ten(), _wide(), _decayed(), _growth(), _cores(), _price())
WORKLOADS = {workload.name: workload for workload in _EVERY}

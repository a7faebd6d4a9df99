"""From raw flights to what is known once they have landed.

The raw table gives an arrival as the clock at the destination (``hhmm``, no date). Features need the instant, in UTC,
for nobody knows a delay before. No result depends on the session's time zone.
"""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

#: An arrival is late when it is more than so many minutes behind schedule, as the US authorities count.
LATE_MINUTES = 15
#: How far back a carrier's and a route's figures look. A route has few flights a day, so it needs more time.
CARRIER_HOURS = 3
ROUTE_HOURS = 7 * 24

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS

#: The time zone of every destination in the data. airports.csv lacks those of the last line.
ZONES = {
    "America/New_York": "ACK ALB ATL AVL BDL BGR BOS BTV BUF BWI CAE CAK CHO CHS CLE CLT CMH CRW CVG DAY DCA DTW EYW "
    "FLL GRR GSO GSP IAD ILM IND JAX LEX LGA MCO MHT MIA MVY MYR ORF PBI PHL PIT PVD PWM RDU RIC ROC RSW SAV SBN SDF "
    "SRQ SYR TPA TVC TYS",
    "America/Chicago": "AUS BHM BNA DFW DSM HOU IAH MCI MDW MEM MKE MSN MSP MSY OKC OMA ORD SAT STL TUL XNA",
    "America/Denver": "ABQ BZN DEN EGE HDN JAC MTJ SLC",
    "America/Phoenix": "PHX",
    "America/Los_Angeles": "BUR LAS LAX LGB OAK PDX PSP SAN SEA SFO SJC SMF SNA",
    "America/Anchorage": "ANC",
    "Pacific/Honolulu": "HNL",
    "America/Puerto_Rico": "BQN PSE SJU STT",
}


def arrived_flights(flights: DataFrame) -> DataFrame:
    """The flights that arrived where they should, with ``arrived_at`` (TIMESTAMP, UTC) added.

    Set aside are cancelled flights, which have no arrival, and diverted ones (an arrival clock at most, no
    ``arr_delay``), for which it is unknown at which airport, so in which zone, the clock was read.
    """
    zone = F.coalesce(*(F.when(F.col("dest").isin(codes.split()), F.lit(name)) for name, codes in ZONES.items()))
    scheduled = F.unix_seconds("time_hour") + 60 * F.col("minute")
    departed = F.timestamp_seconds(scheduled + 60 * F.col("dep_delay"))
    return flights.where(F.col("arr_delay").isNotNull()).withColumn(
        "arrived_at", first_instant_after(departed, F.col("arr_time"), zone)
    )


def first_instant_after(departed: Column, clock: Column, zone: Column) -> Column:
    """The first instant after ``departed`` at which clocks in ``zone`` show ``clock`` (hhmm; 2400 is midnight).

    Where clocks go back, an hour is shown twice, and its second pass counts if the first is over. Where they go
    forward, a time that is never shown was read from a watch not yet set, and means what that watch meant.
    Null where any argument is null.
    """
    departed_seconds = F.unix_seconds(departed)
    shown = F.unix_seconds(F.from_utc_timestamp(departed, zone))  # the local clock and calendar, read as if in UTC
    midnight = shown - F.pmod(shown, F.lit(DAY_SECONDS))
    same_day = midnight + F.floor(clock / 100) * HOUR_SECONDS + F.pmod(clock, F.lit(100)) * 60
    first = _instant(same_day, zone)
    second = first + HOUR_SECONDS
    shown_twice = F.unix_seconds(F.from_utc_timestamp(F.timestamp_seconds(second), zone)) == same_day
    candidates = [first, F.when(shown_twice, second), _instant(same_day + DAY_SECONDS, zone)]
    return F.timestamp_seconds(F.least(*(F.when(seconds > departed_seconds, seconds) for seconds in candidates)))


def _instant(local_seconds: Column, zone: Column) -> Column:
    """Seconds since 1970 UTC of a local time; the first pass of an hour shown twice."""
    return F.unix_seconds(F.to_utc_timestamp(F.timestamp_seconds(local_seconds), zone))


def plane_arrivals(flights: DataFrame) -> DataFrame:
    """One row per arrival: ``tailnum``, ``arrived_at``, ``arrival_delay`` (minutes, below 0 if early), ``landed_at``.

    A flight whose tail number is not recorded says nothing about any plane and is set aside.
    """
    known = arrived_flights(flights).where(F.col("tailnum").isNotNull())
    return known.select("tailnum", "arrived_at", F.col("arr_delay").alias("arrival_delay"), F.col("dest").alias("landed_at"))


def carrier_delays(flights: DataFrame) -> DataFrame:
    """A carrier's arrivals of the last ``CARRIER_HOURS`` hours, at each of its arrivals (see ``recent_delays``)."""
    return recent_delays(arrived_flights(flights), ["carrier"], CARRIER_HOURS)


def route_delays(flights: DataFrame) -> DataFrame:
    """A route's arrivals of the last ``ROUTE_HOURS`` hours, at each of its arrivals (see ``recent_delays``)."""
    return recent_delays(arrived_flights(flights), ["origin", "dest"], ROUTE_HOURS)


def recent_delays(arrived: DataFrame, keys: list[str], hours: int) -> DataFrame:
    """The arrivals in ``[arrived_at - hours, arrived_at]`` of the same keys, at each instant with an arrival.

    Columns: keys, ``arrived_at``, ``arrivals`` (count), ``mean_arrival_delay`` (minutes) and ``late_share`` (0 to 1).
    One row per keys and instant, however many planes land in the same minute: they are added up first.
    """
    by_instant = arrived.groupBy(*keys, "arrived_at").agg(
        F.count("*").alias("landed"),
        F.sum("arr_delay").alias("delay"),
        F.sum((F.col("arr_delay") > LATE_MINUTES).cast("int")).alias("late"),
    )
    window = Window.partitionBy(*keys).orderBy(F.unix_seconds("arrived_at")).rangeBetween(-hours * HOUR_SECONDS, 0)
    landed, delay, late = (F.sum(name).over(window) for name in ("landed", "delay", "late"))
    return by_instant.select(
        *keys,
        "arrived_at",
        landed.alias("arrivals"),
        (delay / landed).alias("mean_arrival_delay"),
        (late / landed).alias("late_share"),
    )

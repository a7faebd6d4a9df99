"""The features: what is known of a departure, each from the moment it was known.

A ttl counts from the event time to the moment of asking, in training and online alike. The data ends with 2013, so
the online store has nothing to give today from a view with a ttl: that is so for the weather here, and meant. The
others stand for "the last known", however old.
"""

from datetime import timedelta

from arrivals import carrier_delays, plane_arrivals, route_delays
from entities import airport, carrier, flight, origin, plane, route
from sources import airports, arrivals, observations, planes, programme
from spark_fs import FeatureView, Field, Float64, Int32, Int64, String

RECENT_DELAYS = [Field("arrivals", Int64), Field("mean_arrival_delay", Float64), Field("late_share", Float64)]

weather = FeatureView(
    "weather",
    origin,
    [
        Field("temperature_f", Float64),
        Field("wind_mph", Float64),
        Field("gust_mph", Float64, description="null: no gust was reported"),
        Field("rain_inches", Float64),
        Field("visibility_miles", Float64),
        Field("pressure_mb", Float64, description="null in one row of ten"),
    ],
    observations,
    ttl=timedelta(hours=3),
    # One row claims a wind of 1,048 mph; the strongest ever measured on the ground was 253.
    transformation="""
        SELECT origin, time_hour, temp AS temperature_f, IF(wind_speed < 254, wind_speed, NULL) AS wind_mph,
               wind_gust AS gust_mph, precip AS rain_inches, visib AS visibility_miles, pressure AS pressure_mb
        FROM {source}
    """,
    description="Hourly weather at the airport of departure",
    owner="operations",
)

plane_last_arrival = FeatureView(
    "plane_last_arrival",
    plane,
    [Field("arrival_delay", Int32, description="minutes, negative if early"), Field("landed_at", String)],
    arrivals,
    transformation=plane_arrivals,
    description="How late the plane landed the last time, and where; known when it landed, not when it left",
    owner="operations",
)

carrier_recent_delays = FeatureView(
    "carrier_recent_delays",
    carrier,
    RECENT_DELAYS,
    arrivals,
    transformation=carrier_delays,
    description="The carrier's arrivals of the last 3 hours, as of its last arrival",
    owner="operations",
)

route_recent_delays = FeatureView(
    "route_recent_delays",
    route,
    RECENT_DELAYS,
    arrivals,
    transformation=route_delays,
    description="The route's arrivals of the last 7 days, as of its last arrival",
    owner="operations",
)

plane_facts = FeatureView(
    "plane_facts",
    plane,
    [Field("built_year", Int32), Field("seats", Int32), Field("engines", Int32), Field("manufacturer", String)],
    planes,
    # The register tells only the year. Where even that is missing, the plane is known from the first day of the data.
    transformation="""
        SELECT tailnum, year AS built_year, seats, engines, manufacturer,
               CAST(CONCAT(COALESCE(year, 2013), '-01-01T00:00:00Z') AS TIMESTAMP) AS known_since
        FROM {source}
    """,
    description="What the register says of a plane, which never grows old. One flight in six has a plane not in it",
    owner="operations",
)

airport_facts = FeatureView(
    "airport_facts",
    airport,
    [Field("latitude", Float64), Field("longitude", Float64), Field("altitude_feet", Int32)],
    airports,
    transformation="""
        SELECT faa AS airport, lat AS latitude, lon AS longitude, alt AS altitude_feet,
               CAST('1970-01-01T00:00:00Z' AS TIMESTAMP) AS known_since
        FROM {source}
    """,
    description="Where an airport lies. Puerto Rico and the Virgin Islands are missing in the data",
    owner="operations",
)

flight_plan = FeatureView(
    "flight_plan",
    flight,
    [
        Field("local_hour", Int32),
        Field("day_of_week", Int32, description="0 is Monday"),
        Field("distance_miles", Int32),
    ],
    programme,
    # In seconds: to `timestamp - INTERVAL '24' HOUR` a day is one of the session's time zone, which may have 23 hours.
    transformation="""
        SELECT carrier, flight, origin, make_date(year, month, day) AS departs_on, hour AS local_hour,
               weekday(make_date(year, month, day)) AS day_of_week, distance AS distance_miles,
               timestamp_seconds(unix_seconds(time_hour) + 60 * minute - 24 * 3600) AS announced_at
        FROM {source}
    """,
    description="The timetable, taken as known one day before the planned departure",
    owner="operations",
)

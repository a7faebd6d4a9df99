"""Where the raw rows lie (``demo/prepare.py`` puts them there), and which column of a view's rows tells the time."""

from spark_fs import DeltaSource, FileSource

WEATHER_COLUMNS = """
    origin STRING, year INT, month INT, day INT, hour INT, temp DOUBLE, dewp DOUBLE, humid DOUBLE, wind_dir DOUBLE,
    wind_speed DOUBLE, wind_gust DOUBLE, precip DOUBLE, pressure DOUBLE, visib DOUBLE, time_hour TIMESTAMP
"""

# One table, two sources: an arrival is known when the plane has landed, a departure plan the day before.
arrivals = DeltaSource("arrivals", path=".spark_fs/raw/flights", timestamp_field="arrived_at")
programme = DeltaSource("programme", path=".spark_fs/raw/flights", timestamp_field="announced_at")
observations = FileSource(
    "observations",
    path=".spark_fs/raw/weather.csv",
    format="csv",
    options={"header": "true", "nullValue": "NA", "schema": " ".join(WEATHER_COLUMNS.split())},
    timestamp_field="time_hour",
)
planes = FileSource("planes", path=".spark_fs/raw/planes.parquet", timestamp_field="known_since")
airports = FileSource("airports", path=".spark_fs/raw/airports.parquet", timestamp_field="known_since")

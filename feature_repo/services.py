"""What each model reads."""

from spark_fs import FeatureService
from views import (
    airport_facts,
    carrier_recent_delays,
    flight_plan,
    plane_facts,
    plane_last_arrival,
    route_recent_delays,
    weather,
)

departure_delay_v1 = FeatureService(
    "departure_delay_v1",
    [
        flight_plan,
        weather[["temperature_f", "wind_mph", "rain_inches", "visibility_miles", "pressure_mb"]],
        plane_last_arrival,
        carrier_recent_delays,
        route_recent_delays,
        plane_facts,
        airport_facts.with_name("destination").with_join_key_map({"airport": "dest"}),
    ],
    description="Will the flight leave more than 15 minutes late? Asked an hour before the planned departure",
    owner="operations",
)

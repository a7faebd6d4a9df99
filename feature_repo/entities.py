"""What the features describe, and the columns that identify it."""

from spark_fs import Date, Entity, Field, Int32, String

flight = Entity(
    "flight",
    [Field("carrier", String), Field("flight", Int32), Field("origin", String), Field("departs_on", Date)],
    description="One planned departure: airline, flight number, airport and local calendar day",
    owner="operations",
)
plane = Entity("plane", [Field("tailnum", String)], description="An aircraft, by tail number", owner="operations")
carrier = Entity("carrier", [Field("carrier", String)], description="An airline, by IATA code", owner="operations")
origin = Entity("origin", [Field("origin", String)], description="EWR, JFK or LGA", owner="operations")
route = Entity(
    "route",
    [Field("origin", String), Field("dest", String)],
    description="From a New York airport to a destination",
    owner="operations",
)
airport = Entity("airport", [Field("airport", String)], description="Any airport, by FAA code", owner="operations")

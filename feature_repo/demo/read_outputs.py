"""Read the outputs of the demo as a data scientist's notebook would: percent cells, no Spark."""

# %% [markdown]
# # The outputs without Spark
#
# Feature tables and training datasets are plain Delta tables: any reader opens them. This one needs `deltalake` and
# `polars`, no JVM. Run it cell by cell in an editor or notebook, or as `python feature_repo/demo/read_outputs.py` in the
# project folder, after `make demo`.

# %%
import json
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
from deltalake import DeltaTable

OFFLINE = Path(".spark_fs/offline/flights")

# %% [markdown]
# ## The training dataset
# Each version of a dataset is one Delta commit, which carries the manifest: where each column came from.

# %%
dataset = DeltaTable(str(OFFLINE / "_datasets" / "delays"))
manifest = json.loads(dataset.history(1)[0]["userMetadata"])["manifest"]
print(f"{manifest['name']}@{manifest['version']}: {manifest['rows']:,} rows in {len(dataset.file_uris())} files")
training = pl.scan_delta(str(OFFLINE / "_datasets" / "delays"))
print(training.collect_schema())

# %%
by_weather = (
    training.group_by(rainy=pl.col("weather__rain_inches") > 0)
    .agg(flights=pl.len(), late_share=pl.col("late").mean().round(3))
    .sort("rainy")
)
print(by_weather.collect())

# %% [markdown]
# ## A split by time
# Never at random: a model is used on flights that come after those it has seen. `dataset create --split time=2013-10-01` would
# have saved it as a column.

# %%
split = datetime(2013, 10, 1, tzinfo=timezone.utc)
train, test = training.filter(pl.col("event_timestamp") < split), training.filter(pl.col("event_timestamp") >= split)
print(train.select(pl.len()).collect().item(), "rows to train on,", test.select(pl.len()).collect().item(), "to judge by")

# %% [markdown]
# ## A feature table
# Rows are sorted by key and time within each bucket, and files know their least and greatest time, so that readers skip
# what they do not need.

# %%
carrier = DeltaTable(str(OFFLINE / "carrier_recent_delays" / "v1"))
last_build = json.loads(carrier.history(1)[0].get("userMetadata", "{}"))
print("last commit:", last_build)
worst = (
    pl.scan_delta(str(OFFLINE / "carrier_recent_delays" / "v1"))
    .filter(pl.col("arrivals") >= 10)
    .sort("mean_arrival_delay", descending=True)
    .select("carrier", "event_timestamp", "arrivals", "mean_arrival_delay", "late_share")
    .head(5)
)
print(worst.collect())

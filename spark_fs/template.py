"""A new project for ``spark-fs init``: settings, one small source, and the definitions that read it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path

from spark_fs.errors import InvalidError
from spark_fs.intervals import UTC

_CONF = ("base.yml", "local.yml", "prod.example.yml", "spark-defaults.conf", "log4j2.properties")
#: Installed, the settings are part of the package; in a checkout they stand beside it.
_CONF_PLACES = (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf")

_DEFINITIONS = '''"""What users spend: one entity, one source, one feature view, one service."""

from datetime import timedelta

from spark_fs import Entity, FeatureService, FeatureView, Field, FileSource, Float64, Int64

user = Entity("user", [Field("user_id", Int64)], description="A customer")

payments = FileSource(
    "payments",
    path="data/payments.csv",
    format="csv",
    options={"header": "true", "schema": "user_id BIGINT, paid_at TIMESTAMP, amount DOUBLE"},
    timestamp_field="paid_at",
)

spending = FeatureView(
    "spending",
    user,
    [Field("amount", Float64), Field("spent_so_far", Float64)],
    payments,
    ttl=timedelta(days=90),
    transformation="""
        SELECT user_id, paid_at, amount, SUM(amount) OVER (PARTITION BY user_id ORDER BY paid_at) AS spent_so_far
        FROM {source}
    """,
    description="The last payment, and the sum of all until then",
)

churn_v1 = FeatureService("churn_v1", [spending], description="Will the customer leave?")
'''


def _payments(today: date) -> str:
    """Payments of ten users in the four weeks before today."""
    rows = (
        f"{user},{today - timedelta(days=day)}T{user + 7:02}:00:00Z,{(user * 37 + day * 11) % 90 + 0.5}\n"
        for day in range(28, 0, -1)
        for user in range(1, 11)
        if (day + user) % 3
    )
    return "user_id,paid_at,amount\n" + "".join(rows)


def create(folder: Path) -> Iterator[str]:
    """Write a new project into ``folder`` and yield the files written, relative to it.

    Raises InvalidError SFS-208 before anything is written if one of the files is there already.
    """
    conf = next(place for place in _CONF_PLACES if place.is_dir())
    files = {f"conf/{name}": (conf / name).read_text(encoding="utf-8") for name in _CONF}
    files["conf/base.yml"] = files["conf/base.yml"].replace("project: flights", f"project: {_project_name(folder)}")
    today = datetime.now(UTC).date()
    files |= {"feature_repo/features.py": _DEFINITIONS, "data/payments.csv": _payments(today)}
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise InvalidError.of("SFS-208", f"{folder} holds a project already.", why=f"There is {', '.join(there)}.",
                              fix="choose another folder")  # fmt: skip
    if not (folder / ".gitignore").exists():
        files[".gitignore"] = ".spark_fs/\n"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
        yield name


def _project_name(folder: Path) -> str:
    name = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in folder.resolve().name).strip("_")
    return (name if name[:1].isalpha() else f"project_{name}")[:64]

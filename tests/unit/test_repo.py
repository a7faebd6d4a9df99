"""Loading a feature repository: every problem at once, and what counts as a change of a transformation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from spark_fs.errors import InvalidError, Problem
from spark_fs.repo import Repository, load

IMPORTS = """\
from datetime import timedelta
from spark_fs.definitions import *; from spark_fs.types import *
"""
GOOD = """\
user = Entity("user", [Field("user_id", Int64)])
payments = DeltaSource("payments", path="data/payments", timestamp_field="paid_at")
spending = FeatureView("spending", user, [Field("amount", Float64), Field("city", String)], payments)
churn = FeatureService("churn", [spending])
"""


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """A feature repository below ``folder`` with these files."""
    repo = folder / "feature_repo"
    repo.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (repo / name).write_text(dedent(text), encoding="utf-8")
    return repo


@pytest.fixture
def problems(tmp_path) -> Callable[..., list[Problem]]:
    """The problems of a repository whose one file ends with the given code (the first line of it is line 7)."""

    def found(code: str) -> list[Problem]:
        with pytest.raises(InvalidError) as caught:
            load(write(tmp_path, {"features.py": IMPORTS + GOOD + code}), "shop")
        assert caught.value.exit_code == 2
        return list(caught.value.problems)

    return found


# What a good repository gives.


def test_definitions_of_several_files_become_specs(tmp_path):
    """Files may import each other; views have no version yet."""
    repo = load(
        write(
            tmp_path,
            {
                "entities.py": IMPORTS + 'user = Entity("user", [Field("user_id", Int64)], owner="me")',
                "views.py": IMPORTS + "from entities import user\n"
                'p = DeltaSource("payments", table="shop.payments", timestamp_field="paid_at")\n'
                'spending = FeatureView("spending", user, [Field("amount", Float64)], p, ttl=timedelta(days=7))\n',
                "services.py": IMPORTS + 'from views import spending\nchurn = FeatureService("churn", spending[["amount"]])',
            },
        ),
        "shop",
    )
    view = repo.views["spending"]
    assert (view.reference, view.key_names, view.feature_names) == ("spending@0", ("user_id",), ("amount",))
    assert view.source.table == "shop.payments"
    assert repo.services["churn"].views[0].features == ("amount",)
    assert repo.entities["user"]["owner"] == "me"


def test_entities_and_sources_may_be_given_by_name(tmp_path):
    """So that files need not import each other."""
    code = IMPORTS + GOOD.replace('user, [Field("amount"', '"user", [Field("amount"').replace("payments)\n", '"payments")\n')
    assert load(write(tmp_path, {"a.py": code}), "shop").views["spending"].entities == ("user",)


def test_a_view_may_have_no_entity_or_several(tmp_path):
    """Keys stand in the order of the entities."""
    code = (
        IMPORTS
        + GOOD
        + dedent("""\
        shop = Entity("shop", [Field("country", String), Field("number", Int32)])
        both = FeatureView("both", [shop, user], [Field("amount", Float64)], payments)
        everywhere = FeatureView("everywhere", [], [Field("rate", Float64)], payments)
    """)
    )
    views = load(write(tmp_path, {"a.py": code}), "shop").views
    assert views["both"].key_names == ("country", "number", "user_id")
    assert views["everywhere"].key_names == ()


def test_a_ttl_of_zero_is_no_bound(tmp_path):
    """As with None."""
    code = IMPORTS + GOOD.replace("payments)\n", "payments, ttl=timedelta(0))\n")
    assert load(write(tmp_path, {"a.py": code}), "shop").views["spending"].ttl is None


def test_repositories_never_mix(tmp_path):
    """Two projects with the same file names in one process: each gets its own; nothing stays imported."""
    code = IMPORTS + "from rates import RATE\n" + GOOD.replace('"city"', "RATE")
    loaded = [
        load(write(tmp_path / name, {"features.py": code, "rates.py": f'RATE = "{name}"\n'}), "shop") for name in ("one", "two")
    ]
    assert [repo.views["spending"].feature_names[1] for repo in loaded] == ["one", "two"]
    assert not {"features", "rates"} & set(sys.modules)
    assert not [path for path in sys.path if path.startswith(str(tmp_path))]


def test_a_file_named_like_a_standard_module_does_not_replace_it(tmp_path):
    """Neither during nor after loading is anybody else's module taken away."""
    import calendar

    load(write(tmp_path, {"calendar.py": IMPORTS + GOOD}), "shop")
    assert sys.modules["calendar"] is calendar


def test_an_edit_is_seen_at_once(tmp_path, monkeypatch):
    """In a notebook the same process loads again and again; text of the same length, within the same second, included."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # compiled files are told apart by second and length
    repo = write(tmp_path, {"features.py": IMPORTS + GOOD})
    os.utime(repo / "features.py", (1_700_000_000, 1_700_000_000))
    load(repo, "shop")
    (repo / "features.py").write_text(IMPORTS + GOOD.replace('"city"', '"town"'))
    os.utime(repo / "features.py", (1_700_000_000, 1_700_000_000))
    assert load(repo, "shop").views["spending"].feature_names == ("amount", "town")


def test_a_missing_folder_is_told_with_the_fix(tmp_path):
    """SFS-111."""
    with pytest.raises(InvalidError, match=r"\[SFS-111\] There is no feature repository at .* Fix: run spark-fs init"):
        load(tmp_path / "feature_repo", "shop")


# What is refused. Each case: the code, what the message must say.

CASES = {
    "unknown entity": (
        'FeatureView("v", "usr", [Field("a", Int64)], payments)',
        "SFS-103",
        "Feature view 'v' uses unknown entity 'usr'. Did you mean 'user'?",
    ),
    "same name": ('Entity("user", [Field("user_id", Int64)])', "SFS-104", "Entity 'user' is defined twice. First as 'user'"),
    "same name but for case": ('Entity("User", [Field("id", Int64)])', "SFS-104", "Entity 'User' is defined twice"),
    "source of another kind with the name": (
        'FileSource("Payments", path="x", timestamp_field="t")',
        "SFS-104",
        "Data source 'Payments' is defined twice",
    ),
    "ttl below zero": (
        'FeatureView("v", user, [Field("a", Int64)], payments, ttl=timedelta(microseconds=-1))',
        "SFS-105",
        "Feature view 'v' has a ttl below zero",
    ),
    "float key": ('Entity("e", [Field("k", Float64)])', "SFS-106", "Join key 'k' of entity 'e' has type float64"),
    "list key": ('Entity("e", [Field("k", Array(Int64))])', "SFS-106", "has type array<int64>"),
    "no key": ('Entity("e", [])', "SFS-106", "Entity 'e' has no join key"),
    "key twice": ('Entity("e", [Field("k", Int64), Field("K", Int64)])', "SFS-107", "Join key 'K' of 'e' is declared twice"),
    "feature twice": (
        'FeatureView("v", user, [Field("a", Int64), Field("A", Int64)], payments)',
        "SFS-107",
        "Feature 'A' of 'v' is declared twice",
    ),
    "key as feature": (
        'FeatureView("v", user, [Field("user_id", Int64)], payments)',
        "SFS-107",
        "'user_id' is both a join key and a feature of view 'v'",
    ),
    "key as feature but for case": (
        'FeatureView("v", user, [Field("User_ID", Int64)], payments)',
        "SFS-107",
        "both a join key",
    ),
    "shared key": (
        'FeatureView("v", [user, Entity("payer", [Field("user_id", Int64)])], [Field("a", Int64)], payments)',
        "SFS-108",
        "Two entities of feature view 'v' share the join key 'user_id'",
    ),
    "bad name": ('Entity("my user", [Field("k", Int64)])', "SFS-112", "Entity has the name 'my user'"),
    "double underscore": ('Entity("my__user", [Field("k", Int64)])', "SFS-112", "single underscores"),
    "name of a key separator": ('FeatureView("a:b", user, [Field("a", Int64)], payments)', "SFS-112", "'a:b'"),
    "name with a line break": (r'Entity("user2\n", [Field("k", Int64)])', "SFS-112", "Entity has the name"),
    "leading underscore": ('FeatureView("v", user, [Field("_bucket", Int64)], payments)', "SFS-112", "'_bucket'"),
    "reserved feature": (
        'FeatureView("v", user, [Field("Event_Timestamp", Int64)], payments)',
        "SFS-113",
        "Feature 'Event_Timestamp' of 'v' has a reserved name. Reserved: created_timestamp, event_timestamp",
    ),
    "reserved key": ('Entity("e", [Field("created_timestamp", Timestamp)])', "SFS-113", "Join key 'created_timestamp'"),
    "no path and no table": ('DeltaSource("d", timestamp_field="t")', "SFS-114", "'d' needs either path or table"),
    "path and table": ('DeltaSource("d", path="a", table="b", timestamp_field="t")', "SFS-114", "'d' needs either"),
    "format and query": (
        'SparkSource("s", format="jdbc", query="SELECT 1", timestamp_field="t")',
        "SFS-114",
        "'s' needs exactly one of format, table and query",
    ),
    "one column for both times": (
        'DeltaSource("d", path="a", timestamp_field="t", created_timestamp_field="t")',
        "SFS-115",
        "one column for event and created time",
    ),
    "unknown zone": ('DeltaSource("d", path="a", timestamp_field="t", timezone="Mars/Base")', "SFS-116", "'Mars/Base'"),
    "zone outside of the database": (
        'DeltaSource("d", path="a", timestamp_field="t", timezone="../etc")',
        "SFS-116",
        "'../etc'",
    ),
    "no features": ('FeatureView("v", user, [], payments)', "SFS-118", "Feature view 'v' has no features"),
    "unknown source": (
        'FeatureView("v", user, [Field("a", Int64)], "paymnts")',
        "SFS-119",
        "uses unknown source 'paymnts'. Did you mean 'payments'?",
    ),
    "SQL without source": (
        'FeatureView("v", user, [Field("a", Int64)], payments, transformation="SELECT 1")',
        "SFS-120",
        "must name its source as {source}",
    ),
    "SQL with other braces": (
        'FeatureView("v", user, [Field("a", Int64)], payments, transformation="SELECT {x} FROM {source}")',
        "SFS-120",
        "Braces mean nothing else",
    ),
    "lambda": (
        'FeatureView("v", user, [Field("a", Int64)], payments, transformation=lambda df: df)',
        "SFS-121",
        "must be a named function",
    ),
    "built-in": ('FeatureView("v", user, [Field("a", Int64)], payments, transformation=len)', "SFS-121", "named function"),
    "unknown view": (
        'from spark_fs.definitions import ViewReference\nFeatureService("s", [ViewReference(view="spendin")])',
        "SFS-122",
        "uses unknown view 'spendin'. Did you mean 'spending'?",
    ),
    "unknown feature in a service": (
        'FeatureService("s", [spending[["amuont"]]])',
        "SFS-123",
        "Feature view 'spending' has no feature 'amuont'. Did you mean 'amount'?",
    ),
    "unknown key in a service": (
        'FeatureService("s", [spending.with_join_key_map({"usr_id": "payer_id"})])',
        "SFS-124",
        "has no join key 'usr_id'. Did you mean 'user_id'?",
    ),
    "one alias for two": (
        'FeatureService("s", [spending, spending.with_join_key_map({"user_id": "payer_id"})])',
        "SFS-125",
        "uses the name 'spending' for two things",
    ),
    "code that fails": ("1 / 0", "SFS-110", "ZeroDivisionError: division by zero"),
    "code that does not parse": ("def (", "SFS-110", "not valid Python"),
    "code that exits": ("raise SystemExit(3)", "SFS-110", "SystemExit"),
    "missing package": ("import no_such_package", "SFS-110", "No module named 'no_such_package'"),
    "wrong type": ('Field("a", "int46")', "SFS-101", "Field 'a': 'dtype' is wrong. Value error, unknown type 'int46'"),
    "unknown argument": ('Entity("e", [Field("k", Int64)], ower="me")', "SFS-102", "Did you mean 'owner'?"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_with_code_file_and_line(problems, case):
    """One mistake is one problem, at the line of the definition that makes it."""
    code, expected, message = CASES[case]
    (problem,) = problems(code)
    assert problem.code == expected
    assert message in str(problem)
    assert problem.where == f"feature_repo/features.py:{7 + code.count(chr(10))}"


def test_all_problems_of_all_files_come_at_once(tmp_path):
    """Wrong arguments, wrong references and a file that does not run; each names its file and line."""
    repo = write(
        tmp_path,
        {
            "a.py": IMPORTS + GOOD,
            "b.py": IMPORTS + 'FeatureView("v", "usr", [Field("x", "int46")], "payment", ttl=timedelta(-1))\n',
            "c.py": IMPORTS + '\n\nEntity("USER", [Field("k", Float64)])\nFeatureService("s", [])\n',
            "d.py": "import nowhere\n",
        },
    )
    with pytest.raises(InvalidError) as caught:
        load(repo, "shop")
    found = {(problem.code, problem.where.removeprefix("feature_repo/")) for problem in caught.value.problems}
    assert found == {
        ("SFS-101", "b.py:3"),
        ("SFS-103", "b.py:3"),
        ("SFS-119", "b.py:3"),
        ("SFS-105", "b.py:3"),
        ("SFS-104", "c.py:5"),
        ("SFS-106", "c.py:5"),
        ("SFS-101", "c.py:6"),
        ("SFS-110", "d.py:1"),
    }
    assert str(caught.value).startswith(f"{len(caught.value.problems)} problems:\n")


def test_a_wrong_definition_does_not_put_the_blame_on_those_that_use_it(problems):
    """Only the mistake itself is told."""
    found = problems(
        dedent("""\
            shop = Entity("shop", [Field("shop_id", Int64)], colour="red")
            sales = FeatureView("sales", shop, [Field("sum", Float64)], payments, colour="red")
            FeatureService("s", [sales[["sum"]]])
        """)
    )
    assert [(problem.code, problem.where.rpartition(":")[2]) for problem in found] == [("SFS-102", "7"), ("SFS-102", "8")]


@pytest.mark.parametrize(
    "code",
    [
        'shop = Entity("shop", Field("shop_id", Int64))',
        'shop = Entity("shop")',
        'shop = Entity("shop", ["shop_id"])',
        'shop = Entity("shop", [Field(5, Int64)])',
        'shop = Entity("shop", [Field(dtype=Int64)])',
        'shop = Entity(5, [Field("shop_id", Int64)])',
        'shop = Entity(join_keys=[Field("shop_id", Int64)])',
        'shop = Entity("shop", None)',
    ],
)
def test_a_half_made_definition_is_a_problem_and_no_crash(problems, code):
    """Whatever arguments are missing or of another type, also where a view and a service go on to use it."""
    found = problems(
        f"{code}\n"
        'sales = FeatureView("sales", shop, [Field("sum", Float64)], payments)\n'
        'FeatureService("s", [sales.with_join_key_map({"shop_id": "x"}), spending])\n'
        'FeatureView("v", "usr", [Field("a", Int64)], payments)\n'
    )
    assert ("SFS-101", "feature_repo/features.py:7") in {(problem.code, problem.where) for problem in found}
    assert ("SFS-103", "feature_repo/features.py:10") in {(problem.code, problem.where) for problem in found}


def test_a_file_that_fails_is_told_once_however_many_files_import_it(tmp_path):
    """Its definitions before the failure are no duplicates of themselves."""
    repo = write(
        tmp_path,
        {
            "entities.py": IMPORTS + 'user = Entity("user", [Field("user_id", Int64)])\nbroken\n',
            "views.py": "from entities import user\n",
            "zzz.py": "import entities\n",
        },
    )
    with pytest.raises(InvalidError) as caught:
        load(repo, "shop")
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("SFS-110", "feature_repo/entities.py:4")]


# Secrets.


@pytest.mark.parametrize("option", ["password", "sfPassword", "fs.s3a.secret.key", "authToken", "pem_private_key", "pwd",
                                    "apiKey", "fs.azure.account.key"])  # fmt: skip
def test_a_secret_in_plain_text_is_refused_without_showing_it(problems, option):
    """SFS-117: definitions are stored in the registry."""
    (problem,) = problems(f'SparkSource("s", format="jdbc", options={{"{option}": "hunter2"}}, timestamp_field="t")')
    assert problem.code == "SFS-117"
    assert option in problem.what
    assert "${VARIABLE}" in problem.fix
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize(
    "source",
    [
        'SparkSource("s", format="jdbc", options={"url": "jdbc:postgresql://h/d?password=hunter2"}, timestamp_field="t")',
        'SparkSource("s", format="mongodb", options={"uri": "mongodb://me:hunter2@host/db"}, timestamp_field="t")',
        'FileSource("s", path="s3a://key:hunter2@bucket/x", timestamp_field="t")',
        'SparkSource("s", format="jdbc", options={"password": "${PW:-hunter2}"}, timestamp_field="t")',
    ],
)
def test_a_secret_inside_an_address_or_as_a_default_is_refused_too(problems, source):
    """It would be stored as well."""
    (problem,) = problems(source)
    assert problem.code == "SFS-117"
    assert "hunter2" not in str(problem)


def test_a_reference_to_a_secret_is_kept_as_reference(tmp_path, monkeypatch):
    """Its value is in no spec."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    code = IMPORTS + 'SparkSource("s", format="jdbc", options={"password": "${DB_PASSWORD}"}, timestamp_field="t")'
    source = load(write(tmp_path, {"a.py": code}), "shop").sources["s"]
    assert source.options == {"password": "${DB_PASSWORD}"}


# What counts as a change of a transformation.

FUNCTIONS = {
    "rates.py": """\
        import datetime

        LIMIT = 15
        CODES = {"JFK", "EWR"}
        START = datetime.date(2013, 1, 1)


        def capped(frame):
            return frame.where(f"amount < {LIMIT}")
    """,
    "cleaning.py": """\
        LIMIT = 99


        def clean(frame):
            return helper(frame).limit(LIMIT)


        def helper(frame):
            return frame.dropna()
    """,
    "features.py": """\
        import cleaning
        from rates import CODES, LIMIT, START, capped

        from spark_fs import DeltaSource, Entity, FeatureView, Field, Float64, Int64

        SCALE = {"a": 1.0}


        def helper(frame):
            return frame.distinct()


        def spend(frame, days=7):
            # The comment.
            def inner(x):
                return SCALE[x]
            kept = capped(helper(cleaning.clean(frame))).where(f"code in {CODES} and day > {START} and x < {LIMIT}")
            return kept.withColumn("scaled", kept.amount * inner("a")).limit(days)


        FeatureView("v", Entity("user", [Field("user_id", Int64)]), [Field("amount", Float64)],
                    DeltaSource("p", path="p", timestamp_field="t"), transformation=spend)
    """,
}


def hash_of(folder: Path, file: str = "features.py", old: str = "", new: str = "") -> str:
    """The view's definition hash after one replacement in one file."""
    files = {name: dedent(text) for name, text in FUNCTIONS.items()}
    assert old in files[file]
    files[file] = files[file].replace(old, new, 1) if old else files[file]
    return load(write(folder, files), "shop").views["v"].definition_hash


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("features.py", "    # The comment.\n", "\n    # Another comment,\n    # longer.\n\n"),
        ("features.py", "return SCALE[x]", "return (\n            SCALE[x]\n        )"),
        ("features.py", 'SCALE = {"a": 1.0}', "SCALE = {\n    'a': 1.00,  # one\n}"),
        ("features.py", "import cleaning\n", "import cleaning\n\nUNUSED = 5\n\n\ndef unused():\n    return 1\n"),
        ("rates.py", "def capped", "# Why.\ndef capped"),
        ("cleaning.py", "    return frame.dropna()", "    return frame.dropna(  )"),
        ("rates.py", '{"JFK", "EWR"}', '{"EWR", "JFK"}'),
    ],
)
def test_comments_layout_and_unused_code_make_no_new_version(tmp_path, file, old, new):
    """Wherever they change."""
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b", file, old, new)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("features.py", ".limit(days)", ".limit(days + 1)"),
        ("features.py", "days=7", "days=8"),
        ("features.py", "return SCALE[x]", "return SCALE[x] + 1"),
        ("features.py", "frame.distinct()", "frame"),
        ("features.py", '{"a": 1.0}', '{"a": 2.0}'),
        ("rates.py", "LIMIT = 15", "LIMIT = 20"),
        ("rates.py", "amount <", "amount <="),
        ("rates.py", '"EWR"}', '"LGA"}'),
        ("rates.py", "2013, 1, 1", "2014, 1, 1"),
        ("cleaning.py", "return helper(frame)", "return helper(frame).distinct()"),
        ("cleaning.py", "frame.dropna()", "frame"),
        ("cleaning.py", "LIMIT = 99", "LIMIT = 98"),
    ],
    ids=[
        "the function", "a default", "a nested function", "a helper", "a constant", "an imported constant",
        "an imported helper", "a set", "a date", "a function by its module",
        "a helper of another file with the same name", "a constant of another file with the same name",
    ],
)  # fmt: skip
def test_a_change_of_what_a_transformation_uses_makes_a_new_version(tmp_path, file, old, new):
    """The function, what it calls in the repository, and the constants of all of these."""
    assert hash_of(tmp_path / "a") != hash_of(tmp_path / "b", file, old, new)


@pytest.mark.parametrize(
    "constant",
    ["[print, len]", "{'f': print}", "(object(),)", "frozenset([1, 'a'])", "float('nan')", "[b'bytes', None, 1j]"],
)
def test_a_constant_of_any_value_is_accepted(tmp_path, constant):
    """A table of functions is good Python; and loading twice gives the same hash."""
    first = hash_of(tmp_path / "a", "features.py", '{"a": 1.0}', constant)
    assert first == hash_of(tmp_path / "b", "features.py", '{"a": 1.0}', constant)


def test_the_hash_is_the_same_in_every_process(tmp_path):
    """Also with a set inside a dict, whose order Python chooses anew for each process."""
    files = {**FUNCTIONS, "features.py": FUNCTIONS["features.py"].replace('{"a": 1.0}', '{"a": {"x", "y", "z", "w"}}')}
    repo = write(tmp_path, files)
    script = "import sys; from pathlib import Path; from spark_fs.repo import load; "
    script += "print(load(Path(sys.argv[1]), 'shop').views['v'].definition_hash)"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, str(repo)],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(hashes) == 1


def sql_hash(folder: Path, sql: str) -> str:
    code = IMPORTS + GOOD.replace("payments)\n", f"payments, transformation={sql!r})\n")
    return load(write(folder, {"a.py": code}), "shop").views["spending"].definition_hash


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT amount, city FROM {source}", "\n    SELECT amount,\n           city\n    FROM {source}\n"),
        ("SELECT amount, city FROM {source}", "SELECT amount, -- in euros\n city /* of the shop */ FROM {source}"),
        ("SELECT '--' AS a FROM {source}", "SELECT '--' AS a -- a dash\nFROM {source}"),
    ],
    ids=["layout", "comments", "dashes in a literal"],
)
def test_layout_and_comments_of_sql_make_no_new_version(tmp_path, one, other):
    """Only its words do."""
    assert sql_hash(tmp_path / "a", one) == sql_hash(tmp_path / "b", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT amount FROM {source}", "SELECT 2 * amount FROM {source}"),
        ("SELECT 'a b' AS city FROM {source}", "SELECT 'a  b' AS city FROM {source}"),
        ("SELECT amount -- x\n, city FROM {source}", "SELECT amount -- x , city\nFROM {source}"),
        ("SELECT '--a' AS city FROM {source}", "SELECT '--b' AS city FROM {source}"),
    ],
    ids=["a word", "blanks in a literal", "a line moved into a comment", "dashes in a literal"],
)
def test_any_other_change_of_sql_makes_a_new_version(tmp_path, one, other):
    """Though it may look like layout or a comment."""
    assert sql_hash(tmp_path / "a", one) != sql_hash(tmp_path / "b", other)


def test_a_loaded_function_is_there_to_run_and_its_text_to_read(tmp_path):
    """The text holds the helpers too; the address names file and function."""
    repo: Repository = load(write(tmp_path, FUNCTIONS), "shop")
    transformation = repo.views["v"].transformation
    assert repo.functions["v"].__name__ == "spend"
    assert transformation.function == "features.py:spend"
    assert "def capped(frame):" in transformation.text
    assert "# The comment." in transformation.text

"""The rules of the layout: reading order is import order, and what each part works without."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import spark_fs

ROOT = Path(spark_fs.__file__).parents[1]
PACKAGE = ROOT / "spark_fs"

#: Each module imports only what stands before it.
ORDER = [
    "errors", "intervals", "types", "spec", "definitions", "config", "transformations", "repo", "registry_tables", "ledger",
    "dataset_index", "registry", "names", "plan",
    "jars", "session", "files", "key_bytes",
    "offline.sources", "offline.compute", "offline.changes", "offline.layout", "offline.blocks", "offline.bucket_files",
    "offline.table_log", "offline.transaction", "offline.tables", "offline.placement", "offline.asof_plan",
    "offline.colocated", "offline.spine_files", "offline.spine_stats", "offline.asof",
    "offline.spines",
    "datasets.content", "datasets.manifest", "datasets.splits", "datasets.tables", "datasets.report", "datasets.naive",
    "datasets.diff", "datasets.dataset", "datasets.origins", "datasets.saving", "datasets.retrieval", "datasets.verify",
    "datasets.catalog",
    "online.codec", "online.trust", "online.address", "online.connect", "online.lookup", "online.encode", "online.script",
    "online.links", "online.pace", "online.calls", "online.redis_store", "online.acl", "online.capacity", "online.compare",
    "online.executor", "online.server", "online.read", "online.erase",
    "doctor", "build", "publication", "rollback", "confirmed", "dispatch", "room", "materialize", "audit", "store",
    "console", "submit", "template", "command", "machine", "publishing", "cli",
]  # fmt: skip

FILES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: file for name, file in FILES.items() if not name.endswith("__init__")}
JOBS = sorted((ROOT / "jobs").glob("*.py"))
SOURCES = [*FILES.values(), *JOBS]
#: Where a public name lives: `from spark_fs import FeatureStore` is an import of `store`.
HOMES = {name: module.removeprefix("spark_fs.") for name, module in spark_fs._MODULE_OF.items()}


def shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Every module of ours that the file imports, wherever it does so, functions and type checking included, and the line."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("spark_fs."), node.lineno) for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(file)}:{node.lineno} imports relatively"
            if not _ours(node.module or ""):
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("spark_fs.")
                yield (full if full in MODULES else HOMES.get(full) or full.rpartition(".")[0]), node.lineno


def _ours(module: str) -> bool:
    return module == "spark_fs" or module.startswith("spark_fs.")


def test_every_module_has_its_place_in_the_order():
    """A new module is entered above, where it may be read."""
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module):
    """Reading order is import order; so there are no cycles either."""
    place = ORDER.index(module)
    wrong = [f"{shown(MODULES[module])}:{line} imports {name}" for name, line in imports(MODULES[module])
             if name not in ORDER[:place]]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(("side", "other"), [("offline", "online"), ("online", "offline")])
def test_offline_and_online_do_not_know_each_other(side, other):
    """A serving process has no Spark, a training cluster no Redis."""
    wrong = [f"{name}:{line} imports {imported}" for name, file in MODULES.items() if name.startswith(side)
             for imported, line in imports(file) if imported.startswith(other)]  # fmt: skip
    assert wrong == []


def test_nobody_imports_the_command_line_or_the_jobs():
    """They are how people come in; nothing leads back to them."""
    wrong = [f"{shown(file)}:{line} imports {name}" for file in SOURCES for name, line in imports(file)
             if name.split(".")[0] in ("cli", "jobs")]  # fmt: skip
    assert wrong == []


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after a statement."""
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return {name for name in json.loads(done.stdout) if "." not in name}


HEAVY = {"pyspark", "py4j", "pandas", "delta"}
ARROW = {"pyarrow", "numpy"}
MODELS = {"pydantic", "sqlalchemy", "yaml"}


@pytest.mark.parametrize(
    ("modules", "not_loaded"),
    [
        ("spark_fs", HEAVY | ARROW | MODELS | {"redis", "rich", "click"}),
        ("spark_fs.spec", HEAVY | ARROW | MODELS | {"redis"}),
        ("spark_fs.definitions, spark_fs.config, spark_fs.repo", HEAVY | ARROW | {"redis", "sqlalchemy"}),
        ("spark_fs.registry, spark_fs.plan, spark_fs.store", HEAVY | ARROW | {"redis"}),
        ("spark_fs.online.codec, spark_fs.online.read", HEAVY | ARROW | MODELS | {"redis"}),
        ("spark_fs.online.redis_store, spark_fs.online.server", HEAVY | ARROW | MODELS),
        ("spark_fs.datasets.catalog, spark_fs.datasets.dataset", HEAVY),
        ("spark_fs.online.encode", HEAVY | MODELS | {"redis"}),
        ("spark_fs.submit, spark_fs.jars, spark_fs.doctor", HEAVY | ARROW | {"redis", "sqlalchemy"}),
        ("spark_fs.cli, spark_fs.template, spark_fs.console", HEAVY | ARROW | MODELS | {"redis", "rich"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_import_does_not_load(modules, not_loaded):
    """Proved in a fresh interpreter: no JVM, no pandas, and no more than the part needs."""
    loaded = loaded_by(f"import {modules}")
    assert "spark_fs" in loaded
    assert loaded & not_loaded == set()


def test_the_definition_and_online_sides_work_where_pyspark_cannot_be_imported():
    """Not merely late: every module of theirs is imported with pyspark, pandas and py4j forbidden."""
    parts = [
        "definitions",
        "config",
        "repo",
        "registry",
        "plan",
        "store",
        "cli",
        *(m for m in ORDER if m.startswith("online.")),
    ]
    forbid = "import sys; sys.modules.update(dict.fromkeys(('pyspark', 'pandas', 'py4j', 'delta')))"
    script = "; ".join([forbid, *(f"import spark_fs.{part}" for part in parts)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_public_names_are_listed_once_and_all_exist():
    """``__all__`` is sorted, and every name in it can be had without a session."""
    assert spark_fs.__all__ == sorted(spark_fs.__all__) == sorted(spark_fs._MODULE_OF)
    assert all(before != after for before, after in pairwise(spark_fs.__all__))
    for name in set(spark_fs.__all__) - {"asof_join"}:
        assert getattr(spark_fs, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FeatureStor'"):
        _ = spark_fs.FeatureStor


def test_every_module_is_named_after_a_concept():
    """What belongs nowhere else belongs nowhere."""
    banned = {"utils", "util", "helpers", "helper", "base", "common", "constants", "misc"}
    assert [shown(file) for file in SOURCES if file.stem.strip("_") in banned] == []


@pytest.mark.parametrize("file", FILES.values(), ids=shown)
def test_a_module_can_be_read_in_one_sitting(file):
    """At most 500 lines; beyond that it is two concepts."""
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("file", JOBS, ids=shown)
def test_a_job_is_one_call(file):
    """At most 40 lines: what it does is in the package."""
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40


def test_nothing_reads_code_out_of_data():
    """No pickle, dill, marshal or shelve, no eval or exec, no YAML loader that makes objects."""
    wrong = []
    for file in SOURCES:
        for node in nodes(file):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
            else:
                continue
            banned = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "eval", "exec", "compile",
                      "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system"}  # fmt: skip
            wrong += [f"{shown(file)}:{node.lineno} uses {name}" for name in names if name in banned]
    assert wrong == []


def test_only_the_console_prints():
    """The library returns values; jobs go through the console too."""
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in SOURCES
        if file != MODULES["console"]
        for node in nodes(file)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert wrong == []


def test_only_the_session_module_builds_a_session():
    """Every Spark setting has one home."""
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in SOURCES
        if file != MODULES["session"]
        for node in nodes(file)
        if isinstance(node, ast.Attribute) and node.attr in ("builder", "Builder", "getOrCreate")
    ]
    assert wrong == []


def test_no_error_is_swallowed_unnamed():
    """No bare except."""
    wrong = [f"{shown(file)}:{node.lineno}" for file in SOURCES for node in nodes(file)
             if isinstance(node, ast.ExceptHandler) and node.type is None]  # fmt: skip
    assert wrong == []

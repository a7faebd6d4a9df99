"""The documentation says what the code does: links, error codes, settings, dependencies, commands, examples."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from spark_fs import FeatureStore, repo
from spark_fs.cli import main
from spark_fs.config import Config
from spark_fs.errors import ExitCode

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ADRS = sorted((ROOT / "docs" / "adr").glob("*.md"))
#: A fenced block: its language and its text.
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(page: str, language: str) -> list[str]:
    return [text for found, text in _FENCE.findall(page) if found == language]


def _rows(page: str) -> list[list[str]]:
    """The cells of all table rows of a page."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines() if line.startswith("| ")]


# Links.


def _anchors(page: str) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _dead_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text(encoding="utf-8"))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_relative_links_lead_somewhere(page):
    """Every relative link of a page names a file that is there and, behind #, a heading of it."""
    assert list(_dead_links(page)) == []


def test_every_page_and_decision_can_be_found():
    """The README links each page of docs/, and the architecture each decision."""
    linked = re.findall(r"\]\((docs/[\w-]+\.md)\)", _page("README.md"))
    assert {_shown(page) for page in PAGES if page.parent.name == "docs"} <= {*linked, "docs/benchmarks.md"}
    assert [file.name for file in ADRS] == sorted(re.findall(r"\]\(adr/([\w-]+\.md)\)", _page("docs/architecture.md")))


@pytest.mark.parametrize("page", ADRS, ids=_shown)
def test_a_decision_is_short_and_complete(page):
    """An ADR has its number as title, context, decision and consequences, on at most 60 lines."""
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert text.startswith(f"# {page.name[:4]} ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


# What the code has, and what the pages say of it.


def test_the_schema_of_manifests_is_the_one_of_the_code():
    """docs/manifest.schema.json is what the model gives."""
    from spark_fs.datasets.manifest import Manifest

    assert json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8")) == Manifest.model_json_schema()


def test_every_error_code_is_explained_and_every_explained_code_exists():
    """docs/errors.md has one row for each code that the code raises, with meaning and fix, and no other."""
    sources = [*(ROOT / "spark_fs").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    raised = {code for file in sources for code in re.findall(r"\bSFS-\d{3}\b", file.read_text(encoding="utf-8"))}
    explained = [row for row in _rows(_page("docs/errors.md")) if row[0].startswith("SFS-")]
    assert [row[0] for row in explained] == sorted(raised)
    assert all(len(row) == 3 and row[1] and row[2] for row in explained)


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_codes_that_a_page_mentions_are_explained(page):
    """An error code named anywhere is one of docs/errors.md."""
    mentioned = set(re.findall(r"\bSFS-\d{3}\b", page.read_text(encoding="utf-8")))
    assert mentioned <= {row[0] for row in _rows(_page("docs/errors.md"))}


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting's key and how its default is written."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}`", "required" if field.is_required() else f"`{field.default}`"


def test_every_setting_is_described_with_its_default():
    """The table of settings has the keys of Config in their order, each with its real default and a meaning."""
    known = dict(_settings(Config))
    described = [row for row in _rows(_page("docs/operations.md")) if row[0] in known]
    assert [(key, default) for key, default, _ in described] == list(known.items())
    assert all(meaning for _, _, meaning in described)


def test_every_exit_code_is_described():
    """The table of exit codes has each code with its name."""
    described = [(row[0], row[1]) for row in _rows(_page("docs/operations.md")) if row[0].isdigit()]
    assert described == [(str(int(code)), code.name) for code in ExitCode]


def _dependencies() -> dict[str, set[str]]:
    """Distribution → the extras of setup.py that bring it; "" is the plain install."""
    tree = ast.parse(_page("setup.py"))
    extras = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "EXTRAS"
    )
    plain = next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    found: dict[str, set[str]] = {}
    for extra, requirements in {"": plain, **extras}.items():
        for requirement in requirements:
            match = re.match(r"([\w.-]+)(?:\[([\w-]+)\])?", requirement)
            name, feature = match.groups()
            # What `redis[hiredis]` adds to redis, which is there already, is hiredis.
            found.setdefault(feature if name in found and feature else name, set()).add(extra)
    return found


def test_every_dependency_is_justified():
    """ADR 0002 has one row for each dependency of setup.py, with its extras and what it is for, and no other."""
    rows = [row for row in _rows(_page("docs/adr/0002-dependencies.md")) if row[0].startswith("`")]
    told = {name.strip("`"): {extra.strip() for extra in extras.split(",")} for name, extras, _ in rows}
    assert told == _dependencies()
    assert all(reason for _, _, reason in rows)


def test_the_changelog_has_the_version_of_the_package():
    """The newest section of CHANGELOG.md is the version that setup.py builds."""
    version = re.search(r'^    version="([^"]+)"', _page("setup.py"), re.MULTILINE).group(1)
    assert re.search(r"^## (\S+)", _page("CHANGELOG.md"), re.MULTILINE).group(1) == version


def test_every_guarantee_names_tests_that_exist():
    """docs/guarantees.md: each line of a promise has at least one test, and each test that it names is there."""
    promises, _, _ = _page("docs/guarantees.md").partition("## Not proven yet")
    lines = re.split(r"\n(?=- |\*\*)", promises)[1:]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line) for line in lines]
    headings = [line for line, tests in zip(lines, named, strict=True) if not tests]
    assert all(line.startswith("**") for line in headings), headings
    missing = [f"{file}::{test}" for tests in named for file, test in tests if f"def {test}(" not in _page(file)]
    assert missing == []


def test_make_targets_exist():
    """Every `make target` of a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", _page("Makefile"), re.MULTILINE))
    spans = [span for page in PAGES for span in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8"))]
    lines = [
        target for page in PAGES for target in re.findall(r"^make ([a-z-]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert {"test", "demo"} <= set(lines)
    assert {*spans, *lines} <= targets


# Commands.


def _find(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the arguments name, and those left for it; options of groups are checked on the way."""
    command: click.Command = main
    while isinstance(command, click.Group):
        with click.Context(command) as context:
            _, arguments, _ = command.make_parser(context).parse_args(arguments)
            if not arguments:
                break
            _, command, arguments = command.resolve_command(context, arguments)
    return command, arguments


def _command_lines() -> Iterator[str]:
    """The ``spark-fs`` commands in shell blocks."""
    for page in PAGES:
        for block in _blocks(page.read_text(encoding="utf-8"), "bash"):
            for line in block.splitlines():
                yield from (part.strip() for part in line.split("&&") if part.strip().startswith("spark-fs "))


@pytest.mark.parametrize("line", sorted(set(_command_lines())))
def test_commands_in_shell_blocks_parse(line, tmp_path, monkeypatch):
    """A command to copy is accepted as it stands: command, options, values and required arguments."""
    monkeypatch.chdir(tmp_path)
    for file in ("plan.json", "my_job.py"):
        (tmp_path / file).touch()
    command, arguments = _find(shlex.split(line, comments=True)[1:])
    assert command.make_context(command.name, arguments) is not None


def test_commands_in_the_text_exist():
    """A command named in a sentence exists, and so do the options named with it."""
    spans = {span for page in PAGES for span in re.findall(r"`spark-fs ([a-z][^`]*)`", _FENCE.sub("", page.read_text("utf-8")))}
    assert spans
    for span in spans:
        command, arguments = _find(span.split())
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known, span


def test_every_command_is_documented():
    """The table of commands in operations.md names every command there is."""
    told = re.findall(r"`spark-fs ([a-z][a-z -]*)`", _page("docs/operations.md"))
    commands = {
        f"{name} {sub}" if sub else name
        for name, command in main.commands.items()
        for sub in (command.commands if isinstance(command, click.Group) else [""])
    }
    assert commands <= set(told)


# Python.


def test_the_readme_definitions_are_a_valid_repository(tmp_path):
    """The definitions in the README pass every check."""
    definitions, _ = _blocks(_page("README.md"), "python")
    folder = tmp_path / "feature_repo"
    folder.mkdir()
    (folder / "features.py").write_text(definitions, encoding="utf-8")
    loaded = repo.load(folder, "readme")
    assert (list(loaded.entities), list(loaded.views), list(loaded.services)) == (["user"], ["spending"], ["churn_v1"])


@pytest.mark.parametrize("name", ["README.md", "docs/operations.md"])
def test_calls_of_the_store_have_its_arguments(name):
    """Every call ``store.method(…)`` in a Python block fits the method's signature."""
    calls = [
        node
        for block in _blocks(_page(name), "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "store"
    ]
    assert calls
    for call in calls:
        signature = inspect.signature(getattr(FeatureStore, call.func.attr))
        signature.bind(None, *call.args, **{keyword.arg: keyword.value for keyword in call.keywords})

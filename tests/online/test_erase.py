"""Entities that must not be online: in which versions of a view, by which digests, and how it is undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from spark_fs import FeatureStore
from spark_fs.cli import main
from spark_fs.errors import InvalidError
from spark_fs.online import codec
from spark_fs.online.compare import stored_keys
from spark_fs.online.redis_store import OnlineTarget, write_batches
from spark_fs.spec import Column, ViewSpec
from spark_fs.types import Int64, String
from tests.online.servers import batch, view_of
from tests.project import open_project

PAYMENTS = """
    user = Entity("user", [Field("{key}", {type})])
    payments = FileSource("payments", path="data/payments", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("{feature}", Int64)], payments)
"""
OTHER = """
    shop = Entity("shop", [Field("shop", String)])
    rows = FileSource("rows", path="data/rows", timestamp_field="at")
    sales = FeatureView("sales", shop, [Field("amount", Int64)], rows)
"""


@pytest.fixture
def fs(tmp_path: Path, url: str) -> FeatureStore:
    """A project whose view ``spend`` has three versions: two by user_id, the current one by customer_id."""
    for key, feature in (("user_id", "n"), ("user_id", "m"), ("customer_id", "n")):
        store = opened(tmp_path, url, PAYMENTS.format(key=key, type="Int64", feature=feature))
    return store


def opened(folder: Path, url: str, definitions: str) -> FeatureStore:
    store = open_project(folder, definitions, settings=f"online:\n  url: {url}\n")
    store.apply()
    return store


def version(fs: FeatureStore, number: int) -> ViewSpec:
    return fs.registry.state().require_view("spend", number)


def write_all(fs: FeatureStore, keys: Sequence[int] = (1, 2)) -> list[int]:
    """Write rows of these keys in each version, as a run does; how many of each were written."""
    counts = []
    for number in (1, 2, 3):
        view = version(fs, number)
        target = replace(OnlineTarget.of(fs.online_url(), view), erased=fs.registry.erased(view))
        rows = batch([b"%d" % key for key in keys], features=view.features, **{view.feature_names[0]: list(keys)})
        counts.append(write_batches(iter([rows]), target).applied)
    return counts


def online(fs: FeatureStore) -> dict[int, list[bytes]]:
    """The keys of rows online, by version."""
    found = {}
    for number in (1, 2, 3):
        target = OnlineTarget.of(fs.online_url(), version(fs, number))
        found[number] = sorted(key for rows in stored_keys(iter([]), target) for key in rows.column("_key").to_pylist())
    return found


def test_equal_values_of_other_join_keys_stay(fs: FeatureStore) -> None:
    """User 1 and customer 1 are two: of each only the versions by its own key lose it, now and later."""
    assert write_all(fs) == [2, 2, 2]
    assert fs.erase("spend@1", {"user_id": [1]}) == {"view": "spend", "entities": 1, "online_keys": 2}
    assert online(fs) == {1: [b"2"], 2: [b"2"], 3: [b"1", b"2"]}
    fs.erase("spend", {"customer_id": [2]})
    assert online(fs) == {1: [b"2"], 2: [b"2"], 3: [b"1"]}
    with redis.Redis.from_url(fs.online_url()) as client:
        client.flushall()  # also without the tombstones
    assert write_all(fs) == [1, 1, 1]
    assert online(fs) == {1: [b"2"], 2: [b"2"], 3: [b"1"]}
    fs.erase("spend@2", {"user_id": [1]}, undo=True)
    assert write_all(fs) == [1, 1, 0]
    assert online(fs) == {1: [b"1", b"2"], 2: [b"1", b"2"], 3: [b"1"]}


def test_a_view_that_is_no_longer_declared_is_erased_from(fs: FeatureStore, tmp_path: Path, url: str) -> None:
    """By its name alone, which means its newest version, or by a version."""
    write_all(fs)
    gone = opened(tmp_path, url, OTHER)
    assert "spend" not in gone.registry.state().views
    assert gone.erase("spend", [{"customer_id": 1}])["online_keys"] == 1
    assert gone.erase("spend@2", [{"user_id": 1}, {"user_id": 2}, {"user_id": 2}])["online_keys"] == 4
    assert online(gone) == {1: [], 2: [], 3: [b"2"]}


@pytest.mark.parametrize("reference", ["spen", "spend@4", "spend@x"])
def test_an_unknown_view_is_told(fs: FeatureStore, reference: str) -> None:
    """Nothing is noted then."""
    with pytest.raises(InvalidError, match=r"SFS-303|SFS-511"):
        fs.erase(reference, [{"user_id": 1}])
    assert fs.registry.erased(version(fs, 1)) == frozenset()


def test_the_keys_of_the_named_version_are_asked_for(fs: FeatureStore) -> None:
    """Those of another one are a mistake."""
    with pytest.raises(InvalidError, match=r"SFS-607.*customer_id"):
        fs.erase("spend", [{"user_id": 1}])


def test_erasures_of_before_are_kept_to(fs: FeatureStore) -> None:
    """Their digests did not hold the join keys: they leave out equal values in all versions, until they are undone."""
    view = version(fs, 1)
    fs.registry.erase(view, [codec.first_key_digest(codec.key_prefix(view), b"1")])
    assert write_all(fs) == [1, 1, 1]
    assert online(fs) == {1: [b"2"], 2: [b"2"], 3: [b"2"]}
    fs.erase("spend@1", [{"user_id": 1}], undo=True)
    assert fs.registry.erased(view) == frozenset()
    assert write_all(fs) == [1, 1, 1]


def test_the_digest_of_before_is_what_it_was() -> None:
    """Registries hold such: it must never change."""
    digest = codec.first_key_digest(b"shop:spend@3:", b"4711")
    assert digest.hex() == "83e1d4990787d407b2c13032cfe973c5"
    assert digest == codec.first_key_digest(b"shop:spend@1:", b"4711")


def test_a_digest_stands_for_one_entity_of_one_view() -> None:
    """It changes with project, view, names and types of join keys and their values, and with nothing else of a version."""
    base = view_of(keys=[Column("a", Int64), Column("b", String)])
    alike = [replace(base, version=7, features=(Column("x", Int64),), entities=("e",)), base]
    others = [
        replace(base, project="trains"),
        replace(base, name="weathers"),
        replace(base, keys=(Column("a", Int64), Column("c", String))),
        replace(base, keys=(Column("a", String), Column("b", String))),
        replace(base, keys=(Column("b", String), Column("a", Int64))),
        replace(base, keys=(Column("a", Int64),)),
    ]
    digests: list[Any] = [codec.key_digest(codec.key_space(view), b"1:11:x") for view in (*alike, *others)]
    digests += [codec.key_digest(codec.key_space(base), b"1:11:y")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1
    assert {len(digest) for digest in digests} == {20}


def test_the_command_erases_from_any_version(fs: FeatureStore, tmp_path: Path, url: str) -> None:
    """Values are read in the types of that version's keys; versions with other keys are named."""
    write_all(fs)
    opened(tmp_path, url, OTHER)

    def erase(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["--repo", str(tmp_path), "--env", "test", "erase", *arguments, "--output", "json"])

    shown = erase("spend@1", "user_id=1")
    assert '"online_keys": 2' in shown.stdout
    assert shown.stderr == "Left as they are, for they have other join keys: spend@3.\n"
    assert '"online_keys": 1' in erase("spend", "customer_id=1").stdout
    assert online(fs) == {1: [b"2"], 2: [b"2"], 3: [b"2"]}
    assert '"online_keys": 2' in erase("spend@1", "user_id=1", "--undo").stdout
    assert "[SFS-606]" in erase("spend@1", "user_id=one").stderr

"""A server with access control: what administrators run, what the two users may do with it, and what they may not."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from spark_fs import doctor
from spark_fs.cli import main
from spark_fs.errors import InvalidError, UnavailableError, translate
from spark_fs.online import acl, codec, redis_store, script
from spark_fs.online.capacity import bytes_per_key, free_bytes
from spark_fs.online.compare import compare_rows, stored_keys
from spark_fs.online.connect import (
    check_server,
    delete_prefix,
    erase_keys,
    has_token,
    leave_token,
    masters,
    open_client,
    reopen_keys,
)
from spark_fs.online.read import PRESENT, OnlineReader
from spark_fs.online.redis_store import bury_batches, write_batches
from spark_fs.spec import select
from tests.online import test_write
from tests.online.servers import NOON, UTC, batch, redis_process, target_of, view_of
from tests.online.topologies import PASSWORD, cluster

WRITER, READER = acl.User("w", acl.password_digest("one")), acl.User("r", acl.password_digest("two"))
#: What anybody may send before a login, and so always.
WITHOUT_LOGIN = {"auth", "hello", "quit", "reset"}


def piped(url: str, lines: str) -> list[str]:
    """What redis-cli answers to lines on its standard input, as an administrator gives them to it."""
    program = shutil.which("redis-cli")
    assert program is not None, "redis-cli comes with redis-server"
    login = url.replace("://:", "://default:")  # redis-cli 7.0 takes no password without a user
    done = subprocess.run([program, "-u", login, "--no-auth-warning"], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def as_user(url: str, name: str, password: str) -> str:
    """The same server, by another login."""
    return f"redis://{name}:{password}@{url.partition('://')[2].rpartition('@')[2]}"


def release_of(client: redis.Redis) -> str:
    info: Any = client.info("server")
    return "7.2" if "valkey_version" in info or float(info["redis_version"][:3]) >= 7.2 else "7"


@pytest.fixture
def administered(url: str, client: redis.Redis) -> Iterator[str]:
    """A server on which an administrator has piped the statements of project flights into redis-cli."""
    made = acl.statements("flights", WRITER, READER, release=release_of(client))
    answers = piped(url, "".join(f"{statement}\n" for statement in made))
    assert answers == [script.FUNCTION.decode().replace("_write", ""), "OK", "OK"]
    client.config_resetstat()
    client.acl_log_reset()
    yield url
    client.function_flush()
    client.acl_deluser("w", "r")


@pytest.fixture
def writer(administered: str) -> str:
    return as_user(administered, "w", "one")


@pytest.fixture
def reader(administered: str) -> str:
    return as_user(administered, "r", "two")


def used(client: redis.Redis) -> set[str]:
    """The commands that were carried out since the count began, those inside of scripts and functions too."""
    counts: Any = client.info("commandstats")
    return {name.removeprefix("cmdstat_") for name, count in counts.items() if count["calls"] > count["failed_calls"]}


# ---- the guarded write as a function


def test_the_function_is_the_script() -> None:
    """One text for both manners, and a name that changes with it."""
    assert script.SCRIPT.decode() in script.library()
    assert script.library().count(script.FUNCTION.decode()) == 1
    assert script.DIGEST[:8] in script.FUNCTION


AGES = timedelta(days=365_000)
RULES: dict[str, Callable[..., None]] = {
    "newer, equal, stale": test_write.test_newer_equal_and_stale_rows_are_told_apart,
    "builds": lambda url, client: test_write.test_the_greater_version_stays_in_either_order(
        url, client, {"builds": 9}, {"builds": 10}
    ),
    "event times": lambda url, client: test_write.test_the_greater_version_stays_in_either_order(
        url, client, {"events": datetime(1900, 1, 1, tzinfo=UTC)}, {"events": datetime(9999, 12, 31, tzinfo=UTC)}
    ),
    "created times": lambda url, client: test_write.test_the_greater_version_stays_in_either_order(
        url, client, {"created": None}, {"created": NOON}
    ),
    "restating": test_write.test_a_restatement_replaces_newer_rows,
    "restating twice": test_write.test_an_older_restatement_does_not_replace_a_later_one,
    "tombstones": lambda url, client: test_write.test_a_tombstone_keeps_out_what_began_before_it(url, client, None),
    "tombstones with a ttl": lambda url, client: test_write.test_a_tombstone_keeps_out_what_began_before_it(url, client, AGES),
    "erased": test_write.test_what_is_erased_stays_so,
    "graves": test_write.test_a_row_past_its_ttl_opens_no_grave,
    "a key many times": lambda url, client: test_write.test_a_key_many_times_in_one_call_ends_with_its_greatest_version(
        url, client, None
    ),
    "expiry": test_write.test_expiry_is_event_time_plus_ttl,
    "no expiry": test_write.test_a_row_without_ttl_never_expires,
    "past the ttl": test_write.test_rows_past_their_ttl_are_counted_and_not_kept,
    "foreign keys": test_write.test_a_key_of_another_program_is_left_alone,
    "odd keys": test_write.test_odd_keys_are_kept_apart,
    "writers at once": test_write.test_four_writers_at_once_end_with_the_newest,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_function_keeps_the_rules_of_the_script(writer: str, client: redis.Redis, rule: str) -> None:
    """A writer who may not run scripts is told apart by the server only: every rule of the write holds by FCALL."""
    RULES[rule](writer, client)
    done = used(client)
    assert "fcall" in done
    assert not done & {"eval", "evalsha"}


def test_many_calls_go_over_to_the_function(writer: str, client: redis.Redis) -> None:
    """What was in flight when scripts were refused is sent again, by the function, and so is all that follows."""
    keys = [b"%d" % i for i in range(20 * redis_store.CALL_ROWS)]
    counts = write_batches(iter([batch(keys, n=range(len(keys)))]), target_of(writer))
    assert (counts.applied, counts.rows) == (len(keys), len(keys))
    assert client.dbsize() == len(keys)
    stats: Any = client.info("commandstats")
    assert stats["cmdstat_fcall"]["calls"] == 20
    assert 1 <= stats["cmdstat_evalsha"]["rejected_calls"] <= redis_store.CALLS_IN_FLIGHT


def test_rows_that_a_look_finds_different_go_to_the_function(writer: str, client: redis.Redis) -> None:
    """Equal rows are looked up by MGET, and only those that differ are written, by FCALL."""
    keys, target = [b"%d" % i for i in range(5_000)], target_of(writer)
    write_batches(iter([batch(keys, n=range(5_000))]), target, distinct=True)
    client.config_resetstat()
    events = [NOON + timedelta(hours=number >= 4_990) for number in range(5_000)]
    counts = write_batches(iter([batch(keys, events, n=range(5_000))]), target, distinct=True)
    assert (counts.applied, counts.equal, counts.rows) == (10, 4_990, 5_000)
    stats: Any = client.info("commandstats")
    assert (stats["cmdstat_evalsha"]["calls"], stats["cmdstat_evalsha"]["rejected_calls"]) == (0, 2)
    assert stats["cmdstat_fcall"]["calls"] <= 4
    assert stats["cmdstat_mget"]["calls"] >= 8


def test_new_rows_by_msetnx_need_no_function(writer: str, client: redis.Redis) -> None:
    """A first publication needs none; the second one of the same rows goes over to the function."""
    rows = batch([b"a", b"b"], n=[1, 2])
    counts = [write_batches(iter([rows]), target_of(writer), distinct=True) for _ in range(2)]
    assert [(c.applied, c.equal) for c in counts] == [(2, 0), (0, 2)]
    assert {"msetnx", "fcall"} <= used(client)


def test_a_missing_function_is_told(writer: str, client: redis.Redis) -> None:
    """Neither scripts nor the function: the error names it and what an administrator has to run, at once."""
    client.function_flush()
    began = time.monotonic()
    with pytest.raises(InvalidError, match=r"SFS-630.*spark_fs_write_\w{8}.*not found.*spark-fs online acl"):
        write_batches(iter([batch([b"a"], n=[1])]), target_of(writer))
    client.acl_setuser("w", enabled=True, commands=["-fcall"])
    with pytest.raises(InvalidError, match=r"SFS-630.*'fcall'.*spark-fs online acl"):
        write_batches(iter([batch([b"a"], n=[1])]), target_of(writer))
    assert time.monotonic() - began < 4
    assert client.dbsize() == 0


@pytest.mark.parametrize(
    ("told", "forbids", "lacks"),
    [
        ("this user has no permissions to run the 'evalsha' command or its subcommand", True, False),  # 6.2
        ("User w has no permissions to run the 'evalsha' command", True, False),  # 7.0 and newer, Valkey
        ("User w has no permissions to run the 'eval' command", True, False),
        ("User w has no permissions to run the 'set' command", False, False),
        ("No permissions to access a key", False, False),
        ("User w has no permissions to run the 'fcall' command", False, True),
        ("Function not found", False, True),
        ("unknown command `FCALL`, with args beginning with: `f`, `1`, ", False, True),  # 6.2
        ("unknown command 'FCALL', with args beginning with: 'f' '1' ", False, True),
    ],
)
def test_what_servers_say_of_scripts_and_functions(told: str, forbids: bool, lacks: bool) -> None:
    """Texts of servers of several releases: only a refusal of the script leads to the function."""
    kind = redis.exceptions.NoPermissionError if "permissions" in told else redis.ResponseError
    assert script.forbids_scripts(kind(told)) is forbids
    assert script.lacks_function(kind(told)) is lacks


def test_a_writer_of_before_7_0_writes_by_the_script(url: str, client: redis.Redis) -> None:
    """What is printed for 6.2 has no functions and no marks that it does not know; the script may then be run."""
    made = acl.statements("flights", WRITER, READER, release="6.2")
    text = "".join(f"{statement}\n" for statement in made)
    assert not [word for word in ("FUNCTION", "fcall", "%R", "selectors", "shards", "setinfo") if word in text]
    try:
        assert piped(url, text) == ["OK", "OK"]
        client.config_resetstat()
        for rule in ("newer, equal, stale", "tombstones with a ttl", "foreign keys"):
            client.flushall()
            RULES[rule](as_user(url, "w", "one"), client)
        assert used(client) & {"eval", "evalsha"}
        with OnlineReader(as_user(url, "r", "two")) as low:
            low.read([select(view_of())], [{"origin": "JFK"}])
    finally:
        client.acl_deluser("w", "r")


# ---- what the users may do


def everything_a_writer_does(url: str, client: redis.Redis) -> None:
    """What materialize, audit, repair, erase, destroy and doctor ask of the server."""
    target, soon = target_of(url), target_of(url, view_of(ttl=timedelta(hours=1)))
    rows, now = batch([b"a", b"b"], n=[1, 2]), datetime.now(UTC)
    assert check_server(url).used_bytes > 0
    assert doctor.clock(url).ok
    with open_client(url) as own:
        assert bytes_per_key(rows, target, masters(own)) > 0
        assert free_bytes(masters(own)) is not None
    assert write_batches(iter([rows]), target, distinct=True).applied == 2
    assert write_batches(iter([batch([b"a", b"c"], NOON + timedelta(hours=1), n=[3, 4])]), target).applied == 2
    waiting = replace(soon, wait_replicas=1, socket_timeout_seconds=0.5)
    assert write_batches(iter([batch([b"d"], now, n=[5])]), waiting).replicas == 0
    overtaken = write_batches(iter([batch([b"b"], NOON + timedelta(hours=2), n=[6])]), soon)
    assert overtaken.expired == 1
    assert bury_batches(iter([batch([b"c"])]), replace(target, generation=2, restating=True)).applied == 1
    client.hset(codec.redis_key(target.prefix, b"x"), "foreign", "1")
    with pytest.raises(InvalidError, match="SFS-610"):
        write_batches(iter([batch([b"x"], n=[1])]), target)
    client.delete(codec.redis_key(target.prefix, b"x"))
    leave_token(url, target.prefix, "token")
    assert has_token(url, target.prefix, "token")
    found = [row for part in compare_rows(iter([rows]), target, frozenset()) for row in part.to_pylist()]
    assert {row["status"] for row in found} == {"ahead", "missing"}
    names = [row["_key"] for part in stored_keys(iter([]), target) for row in part.to_pylist()]
    assert sorted(names) == [b"a", b"d"]
    erased = [codec.redis_key(target.prefix, b"a")]
    erase_keys(url, erased)
    reopen_keys(url, erased)
    assert delete_prefix(url, target.prefix) == 2
    assert client.dbsize() == 0


def test_the_writer_can_do_all_its_work_and_needs_all_it_may(writer: str, client: redis.Redis) -> None:
    """No permission is missing, and none is there that nothing needs."""
    everything_a_writer_does(writer, client)
    assert set(acl.WRITER) <= used(client)
    refused: Any = client.acl_log()
    assert {entry["object"] for entry in refused} == {"evalsha"}


def allowed(client: redis.Redis, user: str) -> set[str]:
    """All commands of the server that the user may run with some arguments, subcommands as ``cluster|slots``."""
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("COMMAND")
        known: Any = connection.read_response()  # as it comes: the client would leave out subcommands
    finally:
        client.connection_pool.release(connection)
    found = set()
    for name, arity, *_, subcommands in (entry[:10] for entry in known):
        for full, least, *_ in subcommands or [(name, arity)]:
            words = full.decode().split("|")
            words += ["flights:1"] * (abs(least) - len(words))
            said: Any = client.execute_command("ACL", "DRYRUN", user, *words)
            if b"no permissions to run" not in said:
                found.add(full.decode())
    return found


@pytest.mark.parametrize(("user", "commands"), [("w", acl.WRITER), ("r", acl.READER)])
def test_a_user_may_run_what_is_listed_and_nothing_else(
    administered: str, client: redis.Redis, user: str, commands: Sequence[str]
) -> None:
    """Of all commands that the server has, one by one; so none that writes is left to the reader."""
    listed = {*acl.CONNECTION, *acl.RELEASES[release_of(client)], *commands}
    # By COMMAND its subcommands are allowed, which tell of commands; FCALL is allowed for one function.
    found = {name.partition("|")[0] if name.startswith("command|") else name for name in allowed(client, user)}
    assert found - WITHOUT_LOGIN == listed


DENIED: list[tuple[Any, ...]] = [
    ("EVAL", "return 1", 0),
    ("EVALSHA", "0" * 40, 0),
    ("EVAL_RO", "return 1", 0),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "FLUSH"),
    ("FUNCTION", "LIST"),
    ("FCALL", "another_function", 0),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "*"),
    ("KEYS", "*"),
    ("ACL", "LIST"),
    ("SHUTDOWN",),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("REPLICAOF", "NO", "ONE"),
    ("RENAME", "flights:a", "flights:b"),
    ("PUBLISH", "channel", "x"),
    ("GET", "trains:a"),
    ("MGET", "flights:a", "trains:a"),
    ("SET", "trains:a", "x"),
    ("SET", "flight", "x"),
    ("UNLINK", "trains:a"),
    ("LPUSH", "trains:runs", "x"),
    ("FCALL", script.FUNCTION.decode(), 1, "trains:a", "x", "", "0"),
]


@pytest.mark.parametrize("who", ["writer", "reader"])
@pytest.mark.parametrize("command", DENIED, ids=lambda command: " ".join(map(str, command))[:30])
def test_what_neither_may_do(request: pytest.FixtureRequest, client: redis.Redis, who: str, command: tuple[Any, ...]) -> None:
    """Scripts of their own, functions, settings, whole databases, and keys of other projects."""
    url = request.getfixturevalue(who)
    client.set("trains:a", "theirs")
    with redis.Redis.from_url(url) as user, pytest.raises(redis.exceptions.NoPermissionError) as caught:
        user.execute_command(*command)
    assert "SFS-602" in str(translate(caught.value))
    assert client.get("trains:a") == b"theirs"


@pytest.mark.parametrize(
    "command",
    [("SET", "flights:a", "x"), ("DEL", "flights:a"), ("LPUSH", "flights:a", "x"), ("GETDEL", "flights:a"),
     ("PEXPIRE", "flights:a", 1), ("FCALL", script.FUNCTION.decode(), 1, "flights:a", "x", "", "0"), ("SCAN", 0),
     ("INFO",)],
    ids=lambda command: command[0],
)  # fmt: skip
def test_the_reader_can_change_nothing(reader: str, client: redis.Redis, command: tuple[Any, ...]) -> None:
    """Not even rows of its own project."""
    client.set("flights:a", "there")
    with redis.Redis.from_url(reader) as user, pytest.raises(redis.exceptions.NoPermissionError):
        user.execute_command(*command)
    assert client.get("flights:a") == b"there"


def test_keys_of_the_reader_are_for_reading_only(reader: str, client: redis.Redis) -> None:
    """A command that writes, granted by mistake, finds no key that it may write."""
    client.set("flights:a", "there")
    client.acl_setuser("r", enabled=True, commands=["+set", "+get"])
    with redis.Redis.from_url(reader) as user:
        assert user.get("flights:a") == b"there"
        with pytest.raises(redis.exceptions.NoPermissionError):
            user.set("flights:a", "x")


def test_the_reader_reads(writer: str, reader: str) -> None:
    """Serving needs the reader's permissions only, also for more keys than one command takes."""
    view = view_of()
    write_batches(iter([batch([b"JFK"], n=[1], s=["x"])]), target_of(writer, view))
    with OnlineReader(reader) as low:
        assert low.read([select(view)], [{"origin": "JFK"}]).statuses == {"n": [PRESENT], "s": [PRESENT]}
        assert len(low.read([select(view)], [{"origin": f"{i}"} for i in range(2_500)])) == 2_500
    with pytest.raises(InvalidError, match="SFS-602"):
        leave_token(reader, b"flights:weather@1:", "token")


def test_a_user_of_another_project_sees_nothing_of_this_one(administered: str, client: redis.Redis, writer: str) -> None:
    """One server, several projects: a login of one cannot reach the other's keys."""
    others = acl.statements("trains", acl.User("w2", acl.password_digest("x")), acl.User("r2", acl.password_digest("y")),
                            release=release_of(client))  # fmt: skip
    try:
        assert piped(administered, "".join(f"{statement}\n" for statement in others))[1:] == ["OK", "OK"]
        with pytest.raises(redis.exceptions.NoPermissionError):
            write_batches(iter([batch([b"a"], n=[1])]), target_of(as_user(administered, "w2", "x")))
        with OnlineReader(as_user(administered, "r2", "y")) as low, pytest.raises(InvalidError, match="SFS-602"):
            low.read([select(view_of())], [{"origin": "JFK"}])
        assert client.dbsize() == 0
    finally:
        client.acl_deluser("w2", "r2")


def test_statements_may_be_repeated(administered: str, client: redis.Redis) -> None:
    """A second time they take away what was granted meanwhile, and add the new password to those that are there."""
    client.acl_setuser("w", enabled=True, commands=["+flushall"], keys=["everything:*"])
    again = acl.statements("flights", acl.User("w", acl.password_digest("new")), acl.User("r"), release=release_of(client))
    assert len(piped(administered, "".join(f"{statement}\n" for statement in again))) == 3
    for password in ("one", "new"):
        with redis.Redis.from_url(as_user(administered, "w", password)) as user:
            assert user.mget(["flights:a"]) == [None]
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.flushall()
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.get("everything:a")
    assert len(client.acl_getuser("r")["passwords"]) == 1  # type: ignore[index]


# ---- restarts and replicas


def test_users_and_the_function_outlive_a_restart(tmp_path: Path) -> None:
    """With ACL SAVE and persistence the writer goes on as before."""
    options = ["--aclfile", str(tmp_path / "users.acl"), "--appendonly", "yes"]
    (tmp_path / "users.acl").touch()
    text = "".join(f"{statement}\n" for statement in acl.statements("flights", WRITER, READER))
    with redis_process(tmp_path, *options) as url:
        assert piped(url, f"{text}ACL SAVE\n")[1:] == ["OK", "OK", "OK"]
        with redis.Redis.from_url(url) as client:
            client.shutdown(save=True)
    with redis_process(tmp_path, *options) as url, redis.Redis.from_url(url) as client:
        assert write_batches(iter([batch([b"a"], n=[1])]), target_of(as_user(url, "w", "one"))).applied == 1
        assert "fcall" in used(client)


def test_a_replica_gets_the_function_and_needs_the_users(tmp_path: Path) -> None:
    """The lines are run on each server: a replica refuses the function, which it has already, and takes the users."""
    for name in ("primary", "replica"):
        (tmp_path / name).mkdir()
    text = "".join(f"{statement}\n" for statement in acl.statements("flights", WRITER, READER))
    with redis_process(tmp_path / "primary") as primary:
        follow = ["--replicaof", "127.0.0.1", primary.rpartition(":")[2].partition("/")[0], "--repl-diskless-sync-delay", "0"]
        with redis_process(tmp_path / "replica", *follow) as url, redis.Redis.from_url(url) as replica:
            assert piped(primary, text)[1:] == ["OK", "OK"]
            write_batches(iter([batch([b"JFK"], n=[1])]), target_of(as_user(primary, "w", "one")))
            deadline = time.monotonic() + 20
            while not replica.dbsize() and time.monotonic() < deadline:
                time.sleep(0.02)
            answers = [line for line in piped(url, text) if line]
            assert answers[0].startswith("READONLY")
            assert answers[1:] == ["OK", "OK"]
            assert len(replica.function_list()) == 1
            with OnlineReader(as_user(url, "r", "two")) as low:
                assert low.read([select(view_of())], [{"origin": "JFK"}]).to_dict()["n"] == [1]


def test_the_users_of_a_cluster(tmp_path: Path) -> None:
    """On each node they do all that there is to do there, and no more: also what its clients ask for by themselves."""
    with cluster(tmp_path, replicas=False) as nodes:
        text = "".join(f"{statement}\n" for statement in acl.statements("flights", WRITER, READER))
        for node in nodes.nodes:
            assert piped(f"redis://:{PASSWORD}@127.0.0.1:{node.port}/0", text)[1:] == ["OK", "OK"]
            node.client.config_resetstat()
        hosts = nodes.url.rpartition("@")[2]
        (tmp_path / "password").write_text("one")
        url, keys = f"redis+cluster://w@{hosts}?password_file={tmp_path / 'password'}", [b"%d" % i for i in range(300)]
        target, rows = target_of(url), batch(keys, n=range(300))
        assert check_server(url).mode == "cluster"
        assert write_batches(iter([rows]), target, distinct=True).applied == 300
        assert write_batches(iter([rows]), target).equal == 300
        with open_client(url) as own:
            assert bytes_per_key(rows, target, masters(own)) > 0
        leave_token(url, target.prefix, "token")
        assert has_token(url, target.prefix, "token")
        found = [row for part in compare_rows(iter([rows]), target, frozenset()) for row in part.to_pylist()]
        assert {row["status"] for row in found} == {"equal"}
        with OnlineReader(f"redis+cluster://r:two@{hosts}") as low:
            wanted = [{"origin": f"{i}"} for i in range(300)]
            assert low.read([select(view_of())], wanted).to_dict()["n"] == list(range(300))
        assert len({row["_key"] for part in stored_keys(iter([]), target) for row in part.to_pylist()}) == 300
        erased = [codec.redis_key(target.prefix, key) for key in keys[:5]]
        erase_keys(url, erased)
        reopen_keys(url, erased)
        assert delete_prefix(url, target.prefix) == 295
        for node in nodes.nodes:
            assert "fcall" in used(node.client)
            assert {entry["object"] for entry in node.client.acl_log()} == {"evalsha"}  # type: ignore[index]
            node.client.function_flush()
        with pytest.raises(InvalidError, match="SFS-630"):
            write_batches(iter([rows]), target)


# ---- the command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project named flights whose online store is nowhere."""
    monkeypatch.delenv("SPARK_FS_ENV", raising=False)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "base.yml").write_text("project: flights\nonline:\n  url: rediss://w@redis.invalid:6379/0\n")
    (tmp_path / "conf" / "local.yml").write_text("{}\n")
    return tmp_path


def online_acl(project: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--repo", str(project), "online", "acl", *options])


def test_the_command_prints_what_redis_cli_reads(
    project: Path, url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its standard output makes both users; a login works with the password that a variable held, which is not printed."""
    monkeypatch.setenv("SECRET_1", "pass word'\"")
    shown = online_acl(project, "--redis", release_of(client), "--writer-password-env", "SECRET_1")
    assert (shown.exit_code, "pass word" in shown.output) == (0, False)
    assert "before 7.0" not in shown.stderr
    assert "to add one: ACL SETUSER flights_reader #" in shown.stderr
    try:
        assert piped(url, shown.stdout)[1:] == ["OK", "OK"]
        login: Any = redis.Redis.from_url(url, username="flights_writer", password="pass word'\"")
        login.connection_pool.connection_kwargs.update(username="flights_writer", password="pass word'\"")
        with login as user:
            assert user.mget(["flights:a"]) == [None]
        for password in ("", "pass word'\""):
            with pytest.raises(InvalidError, match="SFS-602"):
                check_server(as_user(url, "flights_reader", password or "x"))
    finally:
        client.function_flush()
        client.acl_deluser("flights_writer", "flights_reader")


def test_the_command_as_json_and_for_old_servers(project: Path) -> None:
    """The same lines with what each is for; for 6.2 it is said what cannot be had there."""
    lines = online_acl(project, "--writer", "jobs", "--reader", "web").stdout.splitlines()
    told = json.loads(online_acl(project, "--writer", "jobs", "--reader", "web", "--output", "json").stdout)
    assert [statement["command"] for statement in told] == lines
    assert [line.split()[:3] for line in lines[1:]] == [["ACL", "SETUSER", "jobs"], ["ACL", "SETUSER", "web"]]
    old = online_acl(project, "--redis", "6.2")
    assert "before 7.0 there are no functions" in old.stderr
    assert "before 7.0 keys cannot be marked" in old.stderr
    assert len(old.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--writer", "default"], 2, "not 'default'"),
        (["--reader", "a b"], 2, "names no new user"),
        (["--writer", "x", "--reader", "x"], 2, "SFS-633"),
        (["--writer-password-env", "NOT_SET_ANYWHERE"], 2, "SFS-204"),
    ],
)
def test_what_the_command_refuses(project: Path, options: list[str], code: int, told: str) -> None:
    """Names that would lock somebody out or are none, and a password that is not there."""
    shown = online_acl(project, *options)
    assert (shown.exit_code, shown.stdout) == (code, "")
    assert told in shown.stderr


def test_a_reader_of_a_dead_server_is_no_matter_of_permissions() -> None:
    """A server that is away stays SFS-601, whatever the login is."""
    with OnlineReader("redis://r:two@127.0.0.1:1/0") as low, pytest.raises(UnavailableError, match="SFS-601"):
        low.read([select(view_of())], [{"origin": "JFK"}])

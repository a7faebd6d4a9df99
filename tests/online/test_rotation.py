"""A password that changes while readers and writers are at work: it lies in a file that each new connection reads."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from click.testing import CliRunner

from spark_fs import FeatureStore
from spark_fs.cli import main
from spark_fs.config import load_environment
from spark_fs.errors import InvalidError, translate
from spark_fs.online.acl import password_digest
from spark_fs.online.connect import check_server
from spark_fs.online.executor import publish_rows
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import select
from tests.online.servers import batch, redis_process, target_of, view_of

#: A password as people make them; in a file nothing has to be written as in a URL.
OLD, NEW = "öld p@ss/w:rd%41", "new-4711"
VIEW = view_of()
REQUEST: tuple[Any, Any] = ([select(VIEW)], [{"origin": "JFK"}])


def put(file: Path, password: str) -> None:
    """Replace a password as an administrator does: at once, with the end of a line."""
    file.with_suffix(".new").write_text(f"{password}\n", encoding="utf-8")
    os.replace(file.with_suffix(".new"), file)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_process(tmp_path_factory.mktemp("rotation")) as url:
        yield url


@pytest.fixture
def admin(server: str) -> Iterator[redis.Redis]:
    """An administrator of a server with one user, who has the old password."""
    with redis.Redis.from_url(server) as client:
        client.flushall()
        client.acl_setuser("job", enabled=True, passwords=[f"+{OLD}"], keys=["*"], categories=["+@all"], reset=True)
        yield client
        client.acl_deluser("job")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file with the password, in a folder whose name a URL has to quote."""
    folder = tmp_path / "sec rets&#"
    folder.mkdir()
    put(folder / "password", OLD)
    return folder / "password"


def login(server: str, file: Path) -> str:
    """The address with the user and the file, as an environment gives it."""
    from urllib.parse import quote

    return f"{server.replace('://', '://job@')}?password_file={quote(str(file))}"


def rotate(admin: redis.Redis, file: Path) -> None:
    """The steps of docs/operations.md: both passwords are valid until the file is replaced."""
    admin.execute_command("ACL", "SETUSER", "job", f"#{password_digest(NEW)}")
    put(file, NEW)
    admin.execute_command("ACL", "SETUSER", "job", f"!{password_digest(OLD)}")


def cut(admin: redis.Redis) -> int:
    """Cut the connections of the user; returns how many there were."""
    peers: Any = admin.client_list()
    return sum(admin.client_kill_filter(_id=peer["id"]) for peer in peers if peer["user"] == "job")  # type: ignore[misc]


def test_a_reader_lives_through_a_rotation(server: str, admin: redis.Redis, file: Path) -> None:
    """An open connection goes on by the old password, the next one takes the new; nothing is started again."""
    write_batches(iter([batch([b"JFK"], n=[1])]), target_of(server, VIEW))
    with OnlineReader(login(server, file)) as reader:
        assert reader.read(*REQUEST).to_dict()["n"] == [1]
        rotate(admin, file)
        assert reader.read(*REQUEST).to_dict()["n"] == [1]
        assert cut(admin) == 1
        assert reader.read(*REQUEST).to_dict()["n"] == [1]
        admin.acl_setuser("job", enabled=True, passwords=[f"-{NEW}", "+third"])
        cut(admin)
        with pytest.raises(InvalidError, match="SFS-602"):
            reader.read(*REQUEST)
        put(file, "third")
        assert reader.read(*REQUEST).to_dict()["n"] == [1]


def test_a_write_lives_through_a_rotation(server: str, admin: redis.Redis, file: Path) -> None:
    """A job that began with the old password ends with the new one, and loses no row."""
    killed = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal killed
        for number in range(10):
            if number == 5:
                rotate(admin, file)
                killed = cut(admin)
            yield batch([b"%d" % i for i in range(number * 100, number * 100 + 100)], n=range(100))

    counts = write_batches(batches(), target_of(login(server, file)))
    assert killed == 1
    assert counts.rows == counts.applied + counts.equal == 1_000
    assert admin.dbsize() == 1_000


def nothing(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_text("\n")


def no_text(file: Path) -> None:
    file.write_bytes(NEW.encode() + b"\xff\xfe")


def another(file: Path) -> None:
    put(file, NEW)


@pytest.mark.parametrize(
    ("spoil", "told"), [(another, "username-password"), (nothing, "No such file"), (empty, "empty"), (no_text, "UTF-8")]
)
def test_a_password_that_does_not_fit_ends_a_write_at_once(
    server: str, admin: redis.Redis, file: Path, spoil: Any, told: str
) -> None:
    """SFS-602 without tries, for writers and readers; no text, also of what it is chained to, has a password."""
    spoil(file)
    target, began = target_of(login(server, file)), time.monotonic()
    with pytest.raises(redis.AuthenticationError) as raw:
        write_batches(iter([batch([b"a"], n=[1])]), target)
    with pytest.raises(InvalidError, match="SFS-602") as written:
        list(publish_rows(iter([batch([b"a"], n=[1])]), target))
    with OnlineReader(target.url) as reader, pytest.raises(InvalidError, match="SFS-602") as read:
        reader.read(*REQUEST)
    with pytest.raises(InvalidError, match="SFS-602") as checked:
        check_server(target.url)
    assert time.monotonic() - began < 4  # the tries of a write that waits take more than six
    texts = [repr(target), repr(reader), str(translate(raw.value))]
    for caught in (raw, written, read, checked):
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=False).format(chain=True))
        texts += [shown, repr(caught.value)]
        assert told in shown
    assert not [text for text in texts if OLD in text or NEW in text]
    assert admin.dbsize() == 0


def test_a_target_takes_the_path_along_and_no_password(server: str, admin: redis.Redis, file: Path) -> None:
    """What is sent to executors has no password in its bytes, and writes there by what the file has then."""
    sent = pickle.dumps(target_of(login(server, file)))
    assert OLD.encode() not in sent
    rotate(admin, file)
    assert write_batches(iter([batch([b"a"], n=[1])]), pickle.loads(sent)).applied == 1


def test_a_password_beside_the_file_is_refused(file: Path) -> None:
    """Two passwords leave open which one counts."""
    for url in (f"redis://job:s3cret@h:1/0?password_file={file}", f"redis://h:1/0?password=s3cret&password_file={file}"):
        with pytest.raises(InvalidError, match=r"SFS-614.*password file") as caught:
            check_server(url)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("option", ["passwordfile=/x", "ssl_cert_reqs=perhaps", "pasword=s3cret"])
def test_an_option_that_nobody_knows_is_refused(option: str) -> None:
    """Before anything is tried, and without its value, which may be a secret."""
    with pytest.raises(InvalidError, match="SFS-614") as caught:
        check_server(f"rediss://localhost:1/0?{option}")
    assert option.partition("=")[2] not in str(caught.value)


# ---- the setting


def project(folder: Path, online: str) -> Path:
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf" / "base.yml").write_text(f"project: flights\nonline: {online}\n")
    (folder / "conf" / "local.yml").write_text("{}\n")
    return folder


def test_the_setting_names_the_file(server: str, admin: redis.Redis, file: Path, tmp_path: Path) -> None:
    """A path relative to the project is the address that all of spark_fs uses; status asks the server by it."""
    root = project(tmp_path, f"{{url: '{server.replace('://', '://job@')}', password_file: 'sec rets&#/password'}}")
    store = FeatureStore(root, "local")
    assert store.online_url() == login(server, file)
    assert store.environment.config.online.url.count("password") == 0
    shown = CliRunner().invoke(main, ["--repo", str(root), "--env", "local", "online", "status"])
    assert (shown.exit_code, OLD in shown.output) == (0, False)
    put(file, NEW)
    shown = CliRunner().invoke(main, ["--repo", str(root), "--env", "local", "online", "status"])
    assert shown.exit_code == 2
    assert "SFS-602" in shown.stderr
    assert NEW not in shown.output


@pytest.mark.parametrize(
    "online",
    [
        "{password_file: x}",
        "{url: 'redis://u:s3cret@h:1/0', password_file: x}",
        "{url: 'redis://:s3cret@h:1/0', password_file: x}",
        "{url: 'redis://h:1/0?password=s3cret', password_file: x}",
    ],
)
def test_the_setting_is_refused_beside_another_password(tmp_path: Path, online: str) -> None:
    """The embedded store keeps its own, and a URL with a password has one."""
    with pytest.raises(InvalidError, match=r"SFS-206.*base.yml:2") as caught:
        load_environment(project(tmp_path, online), "local")
    assert "s3cret" not in str(caught.value)

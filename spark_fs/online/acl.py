"""The users of a server with access control, and the guarded write as a function: what an administrator runs.

A writer and a reader who may do what spark_fs does, with the keys of one project, and no more. Statements are values; nothing
here connects to a server.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from spark_fs.errors import InvalidError
from spark_fs.online.script import FUNCTION, library

#: Release → commands that it has and those before have not. Functions, and keys for reading only, came with 7.0 as well.
RELEASES: dict[str, tuple[str, ...]] = {"6.2": (), "7": ("cluster|shards",), "7.2": ("cluster|shards", "client|setinfo")}

#: Of all clients: PING for monitors; the others for a database that is not 0, and for Redis Cluster.
CONNECTION = ("select", "ping", "cluster|slots", "cluster|nodes", "asking", "readonly", "readwrite", "command")
#: What the script runs, in whatever manner.
IN_SCRIPT = ("mget", "exists", "type", "time", "pttl", "mset", "set", "del")
WRITER = (
    *("msetnx", *IN_SCRIPT),
    *("wait", "info"),  # before and after rows are written
    *("lpush", "ltrim", "lrange"),  # marks of runs
    *("scan", "strlen"),  # audit and repair
    *("get", "unlink"),  # erase and destroy
    "memory|usage",  # whether rows fit
)
READER = ("mget",)

AFTERWARDS = (
    "Run it on each server, for users are not replicated; the function is, so that replicas refuse it. Users outlive a "
    "restart by ACL SAVE or, where there is no aclfile, CONFIG REWRITE; the function is kept with the data."
)


@dataclass(frozen=True, slots=True)
class User:
    """A login to be: its name, and the SHA-256 of its password as 64 hexadecimal digits."""

    name: str
    digest: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Statement:
    """One command for a server, and what it is for. As text it is a line that redis-cli reads."""

    purpose: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(map(_quoted, self.arguments))


def _quoted(argument: str) -> str:
    """An argument as redis-cli reads it."""
    if re.fullmatch(r"[!#-&(-\[\]-~]+", argument):  # no white space, quotes or backslashes
        return argument
    return '"' + argument.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def password_digest(password: str) -> str:
    """The SHA-256 of a password, as ``ACL SETUSER … #<digest>`` takes it."""
    return hashlib.sha256(password.encode()).hexdigest()


def statements(project: str, writer: User, reader: User, *, release: str = "7") -> list[Statement]:
    """What makes the two users of a project on a server of this release, one of ``RELEASES``; safe to repeat.

    The users get these permissions and lose others; passwords that they have stay valid beside the new one. A writer of 7.0
    and newer may call our function and run no script. Raises SFS-633 for two users of one name.
    """
    if writer.name == reader.name:
        raise InvalidError.of(
            "SFS-633",
            f"The writer and the reader are both '{writer.name}'.",
            why="The second statement would take away what the first has granted.",
            fix="give one of them another name",
        )
    functions = release != "6.2"
    found = []
    if functions:
        purpose = "The guarded write as a function, so that the writer need not be allowed to run scripts"
        found.append(Statement(purpose, ("FUNCTION", "LOAD", "REPLACE", library())))
        scripts: tuple[str, ...] = (f"fcall|{FUNCTION.decode()}",)
        purpose = "The user that runs the jobs"
    else:
        scripts = ("eval", "evalsha")
        purpose = (
            "The user that runs the jobs; before 7.0 there are no functions, so it may run any script, of the commands named"
        )
    found.append(_user(purpose, writer, project, (*scripts, *WRITER), release))
    purpose = (
        "The user that serves" if functions else "The user that serves; before 7.0 keys cannot be marked as for reading only"
    )
    found.append(_user(purpose, reader, project, READER, release, reads_only=functions))
    return found


def _user(
    purpose: str, user: User, project: str, commands: tuple[str, ...], release: str, *, reads_only: bool = False
) -> Statement:
    clean = ["resetkeys", "resetchannels", *([] if release == "6.2" else ["clearselectors"]), "-@all"]
    keys = f"{'%R' if reads_only else ''}~{project}:*"
    if user.digest is None:
        purpose += f". No password is given to it here; to add one: ACL SETUSER {user.name} #<its SHA-256 in hexadecimal>"
    password = [] if user.digest is None else [f"#{user.digest}"]
    allowed = [f"+{command}" for command in (*CONNECTION, *RELEASES[release], *commands)]
    return Statement(purpose, ("ACL", "SETUSER", user.name, "on", *password, *clean, keys, *allowed))

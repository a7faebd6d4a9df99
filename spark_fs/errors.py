"""Every error a user can meet: a code, what happened, why, where, and how to fix it.

Code ranges: 1xx definitions · 2xx configuration and set-up · 3xx registry, plan, apply · 4xx sources and build ·
5xx training sets · 6xx online store · 7xx jobs and submission.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What the command line returns; the same numbers in every command."""

    OK = 0
    FAILED = 1
    INVALID = 2
    CHANGES_PRESENT = 3
    QUALITY_GATE = 4
    DRIFT = 5
    CONFLICT = 6
    PARTLY_DONE = 7
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, complete enough to be mended without reading code."""

    code: str
    what: str
    why: str = ""
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        why = f" {self.why}" if self.why else ""
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"[{self.code}] {self.what}{why}{where}{fix}"


class SparkFSError(Exception):
    """Base of all errors raised by spark_fs; carries one or more problems. Survives pickling between processes."""

    exit_code: ExitCode = ExitCode.FAILED
    retryable: bool = False
    #: What did not finish, of a run over several views: a row with view and state for each.
    unfinished: Sequence[Mapping[str, Any]] = ()

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def of(cls, code: str, what: str, *, why: str = "", where: str = "", fix: str = "") -> SparkFSError:
        """The error with the single problem described."""
        return cls(Problem(code, what, why, where, fix))

    @property
    def code(self) -> str:
        """The code of the first problem."""
        return self.problems[0].code

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n".join([f"{len(self.problems)} problems:", *(f"  {problem}" for problem in self.problems)])


class InvalidError(SparkFSError):
    """The user's definitions, configuration or arguments are wrong; nothing was written."""

    exit_code = ExitCode.INVALID


class ConflictError(SparkFSError):
    """Somebody else was first: a plan went stale or a lock is held; nothing was written."""

    exit_code = ExitCode.CONFLICT
    retryable = True


class UnavailableError(SparkFSError):
    """A service (Redis, the registry's database) did not answer; trying again may help."""

    retryable = True


class PartlyDoneError(SparkFSError):
    """Some views finished (their results are in ``results``) and some did not; running the same command again resumes."""

    exit_code = ExitCode.PARTLY_DONE
    retryable = True

    def __init__(self, *problems: Problem, results: Sequence[object] = ()) -> None:
        super().__init__(*problems)
        self.results = tuple(results)


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C during a run over several views: the results of those that had finished, and a row for each that had not."""

    def __init__(self, results: Sequence[object], unfinished: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.results, self.unfinished = tuple(results), tuple(unfinished)


#: Our errors that a worker may raise and the driver knows by name: whether trying again may help goes by the class.
_KINDS = {kind.__name__: kind for kind in (InvalidError, ConflictError, UnavailableError)}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the known words: the closest first when one is close, else all of them (at most ten)."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:
        folded = {name.lower(): name for name in names}
        close = [folded[word.lower()]] if word.lower() in folded else []
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {listed or 'none'}."


#: One of our own errors inside the text of another, after its class or not: what a Spark executor raised reaches the driver so.
_OURS_IN_TEXT = re.compile(r"(?:spark_fs\.errors\.(\w+): )?\[(SFS-\d{3})\] ([^\n]+)")
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s]*@")
#: A parameter of a URL, such as ``ssl_password=…``; a path in ``password_file=…`` is none.
_SECRET_PARAMETER = re.compile(r"(?i)([?&]\w*(?:password|passwd|pwd|secret|token)=)[^&\s]*")


def without_secrets(text: str) -> str:
    """The text with the user and password part of every URL replaced by ``***@``, and passwords among its parameters too."""
    return _SECRET_PARAMETER.sub(r"\1***", _SECRET_IN_URL.sub("***@", text))


#: The trace of a Python worker in the text of Spark's error; the line after its frames says what happened.
_RAISED_IN_WORKER = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)")


def told_by(error: BaseException) -> str:
    """The text of an error; where it has none any more, the name of its class."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # Spark's errors ask the JVM for their text, and fail in any way once it has ended
        return type(error).__name__


def summary(error: BaseException) -> str:
    """A foreign error in one line without secrets: what a Python worker raised, else the first line of its text."""
    told = told_by(error).strip()
    raised = _RAISED_IN_WORKER.search(told)
    return without_secrets(raised.group(1) if raised else next(iter(told.splitlines()), type(error).__name__))


#: A client as redis-py shows it, with all of its settings; its address is what tells.
_CLIENT = re.compile(r"<redis\.client\.Redis\(.*?host=([^,)]*),port=(\d+).*?\)>\)>\)>")


def _redis_unreachable(error: BaseException) -> SparkFSError:
    return UnavailableError.of(
        "SFS-601",
        "The online store cannot be reached.",
        why=_CLIENT.sub(r"\1:\2", summary(error)),
        fix="check online.url (rediss:// for a port with TLS, redis:// for one without) and that the server runs "
        "(spark-fs doctor; for the embedded one: spark-fs online start)",
    )


def _redis_refused_login(error: BaseException) -> SparkFSError:
    return InvalidError.of(
        "SFS-602",
        "The online store refused the login.",
        why=summary(error),
        fix="check the user and the password that online.url or online.password_file gives, and what the user may do "
        "(spark-fs online acl)",
    )


_NAME_AUTHORITY = "name the authority that signed the server's certificate: ssl_ca_certs=/path/to/ca.pem in online.url"
_OTHER_CERTIFICATE = "give a client certificate that the server takes: ssl_certfile=… and ssl_keyfile=… in online.url"
_OTHER_PORT = "take the server's port for TLS, or redis:// in the place of rediss:// where it has none"
_OTHER_VERSION = "allow both sides a version of TLS in common"
#: What OpenSSL says of TLS that waiting does not mend → what does. The first that is in the text counts.
_TLS_FIXES = {
    "mismatch, certificate is not valid": "address the server by a name that its certificate is made out to",
    "certificate has expired": "renew the server's certificate, or set this machine's clock",
    "CERTIFICATE_VERIFY_FAILED": _NAME_AUTHORITY,
    "ALERT_CERTIFICATE": _OTHER_CERTIFICATE,
    "ALERT_BAD_CERTIFICATE": _OTHER_CERTIFICATE,
    "ALERT_UNKNOWN_CA": _OTHER_CERTIFICATE,
    "ALERT_UNSUPPORTED_CERT": _OTHER_CERTIFICATE,
    "ALERT_HANDSHAKE_FAILURE": _OTHER_CERTIFICATE,
    "WRONG_VERSION_NUMBER": _OTHER_PORT,
    "record layer failure": _OTHER_PORT,
    "ALERT_PROTOCOL_VERSION": _OTHER_VERSION,
    "UNSUPPORTED_PROTOCOL": _OTHER_VERSION,
}


def _redis_without_tls(error: BaseException) -> SparkFSError:
    return InvalidError.of(
        "SFS-631",
        "The online store and we do not trust each other: TLS fails.",
        why=summary(error),
        fix=next(fix for mark, fix in _TLS_FIXES.items() if mark in str(error)),
    )


def _redis_out_of_memory(error: BaseException) -> SparkFSError:
    return SparkFSError.of(
        "SFS-603",
        "The online store is full; the rows of this call were not written.",
        why=summary(error),
        fix="raise maxmemory or materialize fewer views, then run the same command again",
    )


def _disk_full(error: BaseException) -> SparkFSError:
    return SparkFSError.of(
        "SFS-404",
        "The disk is full; the last commit is intact and nothing of this one is visible.",
        why=summary(error),
        fix="free space and run the same command again",
    )


def _unreadable(error: BaseException) -> SparkFSError:
    return InvalidError.of(
        "SFS-401",
        "A source cannot be read.",
        why=summary(error),
        fix="check the path, the table and the permissions",
    )


def _written_meanwhile(error: BaseException) -> SparkFSError:
    return ConflictError.of(
        "SFS-410",
        "Another job has written the same Delta table at the same time; nothing of this one was written.",
        why=summary(error),
        fix="run the same command again",
    )


def _database_unavailable(error: BaseException) -> SparkFSError:
    return UnavailableError.of(
        "SFS-301", "The registry's database does not answer.", why=summary(error), fix="check registry.url"
    )


#: (module prefix, class name or text in the message) → our error. The first match along the cause chain wins.
_FOREIGN: tuple[tuple[str, str, Callable[[BaseException], SparkFSError]], ...] = (
    ("redis", "AuthenticationError", _redis_refused_login),
    ("redis", "WRONGPASS", _redis_refused_login),
    ("redis", "NOAUTH", _redis_refused_login),
    ("redis", "NoPermissionError", _redis_refused_login),
    *(("redis", mark, _redis_without_tls) for mark in _TLS_FIXES),
    ("redis", "OutOfMemoryError", _redis_out_of_memory),
    ("redis", "BusyLoadingError", _redis_unreachable),
    ("redis", "ReadOnlyError", _redis_unreachable),
    ("redis", "BUSY ", _redis_unreachable),
    ("redis", "MasterNotFoundError", _redis_unreachable),
    ("redis", "NOREPLICAS ", _redis_unreachable),
    ("redis", "ClusterDownError", _redis_unreachable),
    ("redis", "MasterDownError", _redis_unreachable),
    ("redis", "MovedError", _redis_unreachable),
    ("redis", "AskError", _redis_unreachable),
    ("redis", "TryAgainError", _redis_unreachable),
    ("redis", "SlotNotCoveredError", _redis_unreachable),
    ("redis", "RedisClusterException", _redis_unreachable),
    ("redis", "ConnectionError", _redis_unreachable),
    ("redis", "TimeoutError", _redis_unreachable),
    ("", "No space left on device", _disk_full),
    ("sqlalchemy", "database or disk is full", _disk_full),
    ("pyspark", "PATH_NOT_FOUND", _unreadable),
    ("pyspark", "DELTA_TABLE_NOT_FOUND", _unreadable),
    ("pyspark", "is not a Delta table", _unreadable),
    ("pyspark", "TABLE_OR_VIEW_NOT_FOUND", _unreadable),
    ("pyspark", "Permission denied", _unreadable),
    ("pyspark", "UNABLE_TO_INFER_SCHEMA", _unreadable),
    ("delta.exceptions", "", _written_meanwhile),  # all of them are conflicts between writers
    ("sqlalchemy", "OperationalError", _database_unavailable),
)


def translate(error: BaseException) -> SparkFSError | None:
    """Our error for a foreign one (Redis, Spark, the disk, the database), or None where we have nothing to add.

    Looks along the chain of causes, and for our own errors in the text of Spark's; imports none of the foreign libraries.
    The caller chains it: ``raise ours from error``, or lets ``translated`` do so.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SparkFSError):
            return seen
        kind, text = type(seen), told_by(seen)
        if (told := _OURS_IN_TEXT.search(text)) is not None:
            return _KINDS.get(told.group(1), SparkFSError).of(told.group(2), told.group(3))
        for module, mark, build in _FOREIGN:
            if kind.__module__.startswith(module) and (mark == kind.__name__ or mark in text):
                return build(seen)
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def translated() -> Iterator[None]:
    """Raise our error in the place of a foreign one that comes out of the block, where there is one (see ``translate``)."""
    try:
        yield
    except Exception as error:
        ours = translate(error)
        if ours is None or ours is error:
            raise
        raise ours from error

"""Calls → servers: connections with queues of unanswered calls, and what is done when one is lost or a call is refused.

Any call may be sent again, and in any order, for writes are guarded. So there is one answer to all trouble that passes:
what has no answer yet is sent once more, to whoever serves it then. How long is bounded, and the last error is raised.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError
from redis.retry import Retry

from spark_fs.online import connect
from spark_fs.online.address import CLUSTER, STANDALONE, Address, parse_address

#: Small calls to one master of a cluster leave together, once they are so many bytes.
_TOGETHER_BYTES = 64 * 1024
#: So often a call follows redirections at once; then only after pauses, for two masters may disagree for a while.
_REDIRECTIONS = 3
#: The longest wait for replicas at the end of a write.
_WAIT_SECONDS = 2.0


class Call(Protocol):
    """What is sent: some rows of one slot, which may be sent again, also row by row."""

    @property
    def slot(self) -> int:
        """The cluster's slot of all of its keys."""

    @property
    def rows(self) -> int:
        """How many rows it carries."""

    @property
    def share(self) -> float:
        """What part of a full call it is, by rows or bytes."""

    def packed(self) -> bytes:
        """The command as it goes to the server."""

    def split(self) -> Sequence[Call]:
        """The same rows, one by one."""

    def touched(self) -> bytes:
        """A command that writes something of no meaning to the same slot."""


#: What takes answers, also refusals that no waiting mends; it may give a call to be sent in the first one's place.
Answered = Callable[[Any, Any], Call | None]


def open_links(url: str, socket_timeout_seconds: float, answered: Answered, *, calls: int, tries: int) -> Links:
    """The connections for a write to this store; nothing is connected before the first call.

    At most ``calls`` calls are unanswered; of a cluster, whose calls are smaller, as many as make so many full ones, on each
    connection. ``tries``: in a row without one answer before a single server is given up; others are given up after
    ``connect.FAILOVER_SECONDS``.
    """
    address = parse_address(url)
    if address.mode == CLUSTER:
        return ClusterLinks(address, socket_timeout_seconds, answered, calls=calls)
    patience = _Patience(tries, None) if address.mode == STANDALONE else _Patience(None, connect.FAILOVER_SECONDS)
    pool = connect.make_pool(url, socket_timeout_seconds, Retry(NoBackoff(), 0))
    return ServerLink(pool, answered, calls=calls, patience=patience)


class _Patience:
    """How often, or for how many seconds, something may fail in a row."""

    def __init__(self, tries: int | None, seconds: float | None) -> None:
        self._tries, self._seconds = tries, seconds
        self._failures, self._since = 0, 0.0

    def pause(self) -> bool:
        """Wait before the next try, longer each time; False where there shall be none."""
        if not self._failures:
            self._since = time.monotonic()
        if self._tries is not None and self._failures >= self._tries:
            return False
        if self._seconds is not None and time.monotonic() - self._since > self._seconds:
            return False
        time.sleep(0.05 * 2**self._failures if self._seconds is None else connect.pause_seconds(self._failures))
        self._failures += 1
        return True

    def renew(self) -> None:
        """There was an answer."""
        self._failures = 0


class ServerLink:
    """One connection, to a single server or to the master that the sentinels name at each new connection."""

    is_cluster = False

    def __init__(self, pool: redis.ConnectionPool, answered: Answered, *, calls: int, patience: _Patience) -> None:
        # A pool of sentinels is kept, for its connections hold on to it weakly.
        self._pool = pool
        self._connection: Any = pool.make_connection()  # Any: redis-py leaves its methods untyped
        self._answered, self._calls, self._patience = answered, calls, patience
        self._unanswered: deque[Call] = deque()
        self._last: Call | None = None

    def send(self, call: Call) -> None:
        """Send a call; waits for the oldest answer while too many are open."""
        while len(self._unanswered) >= self._calls:
            self._receive()
        self._transmit(call)

    def finish(self) -> None:
        """Wait for all answers."""
        while self._unanswered:
            self._receive()

    def replicas(self, wanted: int, socket_timeout_seconds: float) -> int | None:
        """How many replicas have all that was written, after a short wait for ``wanted`` of them; None if nothing was."""
        return _replicas([(self._connection, self._last)], wanted, socket_timeout_seconds)

    def disconnect(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _transmit(self, call: Call) -> None:
        self._unanswered.append(call)
        self._last = call
        try:
            self._connection.send_packed_command([call.packed()])
        except redis.RedisError as error:
            self._start_over(error)

    def _receive(self) -> None:
        try:
            reply = self._connection.read_response()
        except redis.RedisError as error:
            if connect.is_transient(error) or not isinstance(error, redis.ResponseError):
                self._start_over(error)
                return
            reply = error
        call = self._unanswered.popleft()
        self._patience.renew()
        again = self._answered(call, reply)
        if again is not None:
            self._transmit(again)

    def _start_over(self, error: redis.RedisError) -> None:
        """Connect anew and send all unanswered calls again, with growing pauses; raises what waiting cannot mend."""
        while connect.is_transient(error) and self._patience.pause():
            self._connection.disconnect()
            try:
                self._connection.connect()
                for call in self._unanswered:
                    self._connection.send_packed_command([call.packed()])
                return
            except redis.RedisError as again:
                error = again
        raise error


class _Sent:
    """A call on its way: where it was sent by ASK, how often it was refused, since when, and the pause before the next try."""

    __slots__ = ("asked", "call", "pause", "refusals", "since")

    def __init__(self, call: Call, refusals: int = 0, since: float = 0.0) -> None:
        self.call, self.refusals, self.since = call, refusals, since
        self.asked: tuple[str, int] | None = None
        self.pause = 0.0


class _MasterLink:
    """The connection to one master of a cluster."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self.connection: Any = pool.make_connection()  # Any: redis-py leaves its methods untyped
        self.unanswered: deque[_Sent] = deque()
        #: Of how many full calls there is no answer yet.
        self.load = 0.0
        self.last: Call | None = None
        self._leaving: list[bytes] = []
        self._leaving_bytes = 0

    def transmit(self, sent: _Sent) -> None:
        """Send a call, soon."""
        self.unanswered.append(sent)
        self.load += sent.call.share
        self.last = sent.call
        command = sent.call.packed()
        self._leaving += [b"*1\r\n$6\r\nASKING\r\n", command] if sent.asked else [command]
        self._leaving_bytes += len(command)
        if self._leaving_bytes >= _TOGETHER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what waits to leave."""
        if self._leaving:
            leaving, self._leaving, self._leaving_bytes = self._leaving, [], 0
            self.connection.send_packed_command([b"".join(leaving)])

    def receive(self) -> tuple[_Sent, Any]:
        """The oldest call without an answer, and its answer or refusal."""
        self.flush()
        sent = self.unanswered[0]
        reply: Any = None
        for _ in range(2 if sent.asked else 1):  # first that to ASKING
            try:
                reply = self.connection.read_response()
            except redis.ResponseError as error:
                reply = error
        self.unanswered.popleft()
        self.load = self.load - sent.call.share if self.unanswered else 0.0
        return sent, reply

    def drop(self) -> list[_Sent]:
        """Disconnect; gives the calls without an answer."""
        orphans = list(self.unanswered)
        self.unanswered.clear()
        self.load, self._leaving, self._leaving_bytes = 0.0, [], 0
        self.connection.disconnect()
        return orphans


class ClusterLinks:
    """One connection to each master of a cluster, and the map of its slots, which is asked for when it turns out old.

    A call that was refused is sent again for ``connect.FAILOVER_SECONDS``: time for a replica to take over.
    """

    is_cluster = True

    def __init__(self, address: Address, socket_timeout_seconds: float, answered: Answered, *, calls: int) -> None:
        self._address, self._timeout_seconds, self._answered, self._calls = address, socket_timeout_seconds, answered, calls
        self._masters: dict[int, tuple[str, int]] = {}
        #: Who can be asked for the map: masters and replicas as last heard of, and those of the address.
        self._nodes: list[tuple[str, int]] = []
        self._links: dict[tuple[str, int], _MasterLink] = {}
        self._waiting: list[_Sent] = []
        self._refusals = 0
        self._moved: dict[int, tuple[str, int]] = {}
        self._map_is_old = True
        self._trouble: redis.RedisError | None = None

    def send(self, call: Call) -> None:
        """Send a call to the master of its slot; waits for the oldest answers while too many are open there."""
        self._waiting.append(_Sent(call))
        self._settle()

    def finish(self) -> None:
        """Wait for all answers."""
        while any(link.unanswered for link in self._links.values()):
            self._take_all()
            self._settle()

    def replicas(self, wanted: int, socket_timeout_seconds: float) -> int | None:
        """The least number of replicas of any master that have all that was written; None if nothing was."""
        masters = set(self._masters.values())
        links = [(link.connection, link.last) for node, link in self._links.items() if node in masters]
        return _replicas(links, wanted, socket_timeout_seconds)

    def disconnect(self) -> None:
        """Close all connections."""
        for link in self._links.values():
            link.connection.disconnect()

    def _settle(self) -> None:
        """Send all calls that wait, until each of them is on its way to some master."""
        while self._waiting:
            if any(sent.pause for sent in self._waiting):
                self._take_all()  # others are likely to be refused as well, and one pause does for all
                time.sleep(max(sent.pause for sent in self._waiting))
            if self._map_is_old:
                self._ask_for_map()
            waiting, self._waiting = deque(self._waiting), []
            before = self._refusals
            while waiting and self._refusals == before:  # else the map, and perhaps a pause, first
                self._dispatch(waiting.popleft())
            self._waiting += waiting

    def _dispatch(self, sent: _Sent) -> None:
        node = sent.asked or self._masters.get(sent.call.slot)
        if node is None:
            self._refuse(sent, self._trouble or ClusterDownError("Hash slot not served"))
            return
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = _MasterLink(self._pool(node))
        if link.load >= self._calls:
            before = self._refusals
            while link.load > self._calls * 3 / 4:  # some at once, so that the next ones leave together
                self._receive(link)
            if self._refusals != before:
                self._waiting.append(sent)
                return
        try:
            link.transmit(sent)
        except redis.RedisError as error:
            self._lose(link, error)

    def _take_all(self) -> None:
        for link in self._links.values():
            try:
                link.flush()
            except redis.RedisError as error:
                self._lose(link, error)
        for link in self._links.values():
            while link.unanswered:
                self._receive(link)

    def _receive(self, link: _MasterLink) -> None:
        try:
            sent, reply = link.receive()
        except redis.RedisError as error:
            self._lose(link, error)
            return
        asked, sent.asked = sent.asked, None
        if isinstance(reply, AskError):  # MOVED is a kind of it
            node = (reply.host or link.connection.host, reply.port)
            if isinstance(reply, MovedError):
                self._moved[reply.slot_id] = node
                self._map_is_old = True
            else:
                sent.asked = node
            self._refuse(sent, reply, redirected=True)
        elif _wants_single_rows(reply) and sent.call.rows > 1:
            # Of a slot on its way some keys are here and some there; of a single key one of the two knows.
            self._waiting += [_Sent(call, sent.refusals, sent.since) for call in sent.call.split()]
        elif isinstance(reply, redis.ResponseError) and (connect.is_transient(reply) or _wants_single_rows(reply)):
            self._map_is_old = True
            self._refuse(sent, reply)
        else:
            again = self._answered(sent.call, reply)
            if again is not None:
                sent = _Sent(again)
                sent.asked = asked
                self._waiting.append(sent)

    def _lose(self, link: _MasterLink, error: redis.RedisError) -> None:
        orphans = link.drop()
        if not connect.is_transient(error):
            raise error
        self._map_is_old = True
        for sent in orphans:
            sent.asked = None
            self._refuse(sent, error)

    def _refuse(self, sent: _Sent, error: redis.RedisError, *, redirected: bool = False) -> None:
        now = time.monotonic()
        sent.since = sent.since or now
        if now - sent.since > connect.FAILOVER_SECONDS:
            raise error
        self._refusals += 1
        sent.refusals += 1
        sent.pause = 0.0 if redirected and sent.refusals <= _REDIRECTIONS else connect.pause_seconds(sent.refusals - 1)
        self._waiting.append(sent)

    def _ask_for_map(self) -> None:
        """Bring the map of slots up to date, from any node that answers; else it stays, and calls fail by it once more."""
        known = list(dict.fromkeys([*self._nodes, *self._address.hosts]))
        # Not always the same node first: one may be cut off from the others and not know it.
        for node in random.sample(known, len(known)):
            connection: Any = self._pool(node).make_connection()
            try:
                connection.send_command("CLUSTER", "SLOTS")
                ranges = connection.read_response()
            except redis.RedisError as error:
                if "cluster support disabled" in str(error):
                    raise connect.no_cluster() from None
                if not connect.is_transient(error):
                    raise
                self._trouble = error
            else:
                self._read_map(ranges, node)
                return
            finally:
                connection.disconnect()

    def _read_map(self, ranges: Iterable[Any], asked: tuple[str, int]) -> None:
        self._masters, nodes = {}, []
        for first, last, *servers in ranges:
            # No name: the one by which the node itself was found.
            found = [((host or b"").decode() or asked[0], int(port)) for host, port, *_ in servers]
            self._masters.update(dict.fromkeys(range(first, last + 1), found[0]))
            nodes += found
        self._nodes, self._trouble, self._map_is_old = list(dict.fromkeys(nodes)), None, False
        # Who was redirected knows better than a node that has not heard of it yet.
        self._masters.update(self._moved)
        self._moved.clear()

    def _pool(self, node: tuple[str, int]) -> redis.ConnectionPool:
        return connect.node_pool(self._address, *node, self._timeout_seconds, Retry(NoBackoff(), 0))


Links = ServerLink | ClusterLinks


def _wants_single_rows(reply: Any) -> bool:
    """Whether a slot is on its way and the call wants keys of which some are still here."""
    return isinstance(reply, TryAgainError) or (isinstance(reply, redis.ResponseError) and "non local key" in str(reply))


def _replicas(links: Sequence[tuple[Any, Call | None]], wanted: int, socket_timeout_seconds: float) -> int | None:
    timeout_ms = int(1000 * min(_WAIT_SECONDS, socket_timeout_seconds / 2))
    asked = [(connection, last) for connection, last in links if last is not None]
    for connection, last in asked:
        # WAIT is for what this connection has written, and an earlier one may have written before it was lost: so something
        # of no meaning is written first.
        with suppress(redis.RedisError):
            connection.send_packed_command([last.touched()])
            connection.send_command("WAIT", wanted, timeout_ms)
    counts = []
    for connection, _ in asked:
        counts.append(0)
        with suppress(redis.RedisError):
            with suppress(redis.ResponseError):  # the slot may have moved on
                connection.read_response()
            counts[-1] = int(connection.read_response())
    return min(counts, default=None)

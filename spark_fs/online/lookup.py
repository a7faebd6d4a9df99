"""Redis keys → stored values, in one round trip to each server that holds some of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import redis

from spark_fs.online.codec import slot_of, tag_of
from spark_fs.online.connect import Client

#: Keys per MGET: a longer one would hold up other readers of the server.
KEYS_PER_COMMAND = 1_000


def stored_values(client: Client, keys: Sequence[bytes]) -> list[bytes | None]:
    """The values of keys that ``codec.redis_key`` has made, in their order; None where there is none.

    All servers are asked before the first answer is read. In a cluster whose slots move or whose masters change, what was
    refused is asked for once more, as redis-py does it. Raises redis-py's errors; never gives a part of the values.
    """
    if isinstance(client, redis.RedisCluster):
        return _from_cluster(client, keys)
    if len(keys) <= KEYS_PER_COMMAND:
        found: Any = client.mget(keys) if keys else []
        return list(found)
    pipeline = client.pipeline(transaction=False)
    for start in range(0, len(keys), KEYS_PER_COMMAND):
        pipeline.mget(keys[start : start + KEYS_PER_COMMAND])
    return [value for part in pipeline.execute() for value in part]


def _from_cluster(client: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    places: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(tag_of(key), []).append(place)
    by_node: dict[Any, list[list[int]]] = {}
    refused: list[list[int]] = []
    for tag, wanted in places.items():
        parts = [wanted[start : start + KEYS_PER_COMMAND] for start in range(0, len(wanted), KEYS_PER_COMMAND)]
        try:
            by_node.setdefault(client.nodes_manager.get_node_from_slot(slot_of(tag)), []).extend(parts)
        except redis.exceptions.SlotNotCoveredError:
            refused += parts
    values: list[bytes | None] = [None] * len(keys)
    asked = [_Asked(client.get_redis_connection(node), keys, parts) for node, parts in by_node.items()]
    for part in [part for node in asked for part in node.answers(values)] + refused:
        # Key by key: while a slot moves, some of its keys are here and some there.
        for place in part:
            values[place] = client.execute_command("MGET", keys[place])[0]
    return values


def _mget(keys: Sequence[bytes]) -> bytes:
    """The command as it goes to the server; redis-py's packing takes as long as the rest of a small read."""
    return b"".join([b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1), *(b"$%d\r\n%b\r\n" % (len(key), key) for key in keys)])


class _Asked:
    """One server that was asked for the values at some places."""

    def __init__(self, server: redis.Redis, keys: Sequence[bytes], parts: list[list[int]]) -> None:
        self._pool: Any = server.connection_pool
        self._parts = parts
        self._connection: Any = None
        try:
            self._connection = self._pool.get_connection()
            self._connection.send_packed_command([b"".join([_mget([keys[place] for place in part]) for part in parts])])
        except redis.RedisError:
            self._release(lost=True)

    def answers(self, values: list[bytes | None]) -> list[list[int]]:
        """Put the answers at their places; gives the places without one."""
        if self._connection is None:
            return self._parts
        waiting, refused = deque(self._parts), []
        try:
            while waiting:
                try:
                    for place, value in zip(waiting[0], self._connection.read_response(), strict=True):
                        values[place] = value
                except redis.ResponseError:
                    refused.append(waiting[0])
                waiting.popleft()
        except redis.RedisError:
            self._release(lost=True)
            return [*refused, *waiting]
        except BaseException:
            self._release(lost=True)
            raise
        self._release(lost=False)
        return refused

    def _release(self, *, lost: bool) -> None:
        if self._connection is not None:
            if lost:
                self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

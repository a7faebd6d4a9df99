"""A TCP proxy in this process, between a client and a real server: it delays, throttles, cuts, swallows and fragments."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

#: Bytes passed on at a time.
_PIECE = 16 * 1024
#: Bytes that wait before the proxy, as on a narrow link: what is not passed on stays with the client, which so knows it.
_BACKLOG = 64 * 1024


@dataclass
class Proxy:
    """What is done to the bytes that pass; may be changed while connections are open.

    ``url`` leads through the proxy. ``delay_seconds`` is waited before each piece in both directions; ``bytes_per_second``
    bounds what goes to the server; ``piece`` is the most bytes passed on at once. ``cut_replies``: so many bytes of replies
    after which a connection is cut, once for each number, in turn, so that the server has done what the client never hears of.
    ``swallow``: connections are taken and nothing is passed on any more, as behind a dead link.
    """

    url: str
    delay_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    piece: int = _PIECE
    cut_replies: list[int] = field(default_factory=list)
    swallow: bool = False
    connections: int = 0
    cuts: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)

    def cut(self) -> None:
        """Cut all connections that are open now; bytes on their way, in either direction, are lost."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self, listener: socket.socket, upstream: tuple[str, int]) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # the block has ended
            self.connections += 1
            try:
                server = socket.create_connection(upstream)
            except OSError:
                client.close()  # the server is down; it may come back
                continue
            self._sockets += [client, server]
            limit = self.cut_replies.pop(0) if self.cut_replies else None
            for source, sink, most in ((client, server, None), (server, client, limit)):
                threading.Thread(target=self._pass_on, args=(source, sink, most), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, most: int | None) -> None:
        """Bytes one way until an end closes or, of replies, so many have passed."""
        to_server = most is None
        passed = 0
        try:
            while data := source.recv(self.piece):
                while self.swallow:
                    time.sleep(0.01)
                time.sleep(self.delay_seconds)
                if to_server:
                    time.sleep(len(data) / self.bytes_per_second)
                if most is not None and passed + len(data) > most:
                    sink.sendall(data[: most - passed])
                    self.cuts += 1
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass  # the other direction has closed it
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy_to(url: str) -> Iterator[Proxy]:
    """A proxy to the server at this URL for the block."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BACKLOG)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        login, at, _ = parts.netloc.rpartition("@")
        through = urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{listener.getsockname()[1]}"))
        proxy = Proxy(through)
        upstream = (parts.hostname, parts.port)
        threading.Thread(target=proxy._serve, args=(listener, upstream), daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.swallow = False
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            for end in proxy._sockets:
                end.close()

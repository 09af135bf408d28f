"""A TCP proxy that can cut, stall and refuse connections to a server."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import URL
    from typing_extensions import Self


class TCPProxy:
    """Forward a port on 127.0.0.1 to a server, until told otherwise.

    Use it as a context manager around the engine under test::

        with TCPProxy(database.url) as proxy:
            engine = create_engine(proxy.url)
            ...
            proxy.cut()

    :param target: URL of the server; its host and port are where the proxy connects to.
    """

    def __init__(self, target: URL) -> None:
        assert target.host
        assert target.port
        self._target = (target.host, target.port)
        self._flowing = threading.Event()
        self._flowing.set()
        # Guards _pairs. A socket is closed only after its pair was taken out under the lock, so
        # that cut() never shuts a descriptor whose number is by then another's.
        self._lock = threading.Lock()
        self._pairs: dict[threading.Thread, tuple[socket.socket, socket.socket]] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._port = 0
        self.accept()
        self.url = target.set(host="127.0.0.1", port=self._port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Break every connection there is; new ones are forwarded as before."""
        with self._lock:
            for pair in self._pairs.values():
                for end in pair:
                    shut(end)

    def stall(self) -> None:
        """Keep every connection open and forward nothing more, until :meth:`resume`."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, beginning with what was sent meanwhile."""
        self._flowing.set()

    def refuse(self) -> None:
        """Refuse new connections (ECONNREFUSED), until :meth:`accept`; open ones go on."""
        if self._listener is not None and self._acceptor is not None:
            shut(self._listener)  # wakes the thread from its accept()
            self._acceptor.join()
            self._listener.close()
            self._listener = self._acceptor = None

    def accept(self) -> None:
        """Accept new connections again, on the same port."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port))
            self._port = self._listener.getsockname()[1]
            self._acceptor = threading.Thread(
                target=self._accept_from, args=(self._listener,), daemon=True
            )
            self._acceptor.start()

    def close(self) -> None:
        """Break every connection, accept no more, and end the threads."""
        self.refuse()
        with self._lock:
            threads = list(self._pairs)
        self.cut()
        self.resume()
        for thread in threads:
            thread.join()

    def _accept_from(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # refuse() was called
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:  # the server is down: to the client this looks like a cut
                client.close()
                continue
            thread = threading.Thread(target=self._forward, args=(client, server), daemon=True)
            with self._lock:
                self._pairs[thread] = (client, server)
            thread.start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while self._pass_on(selector):
                pass
        with self._lock:
            del self._pairs[threading.current_thread()]
        for end in (client, server):
            shut(end)
            end.close()

    def _pass_on(self, selector: selectors.BaseSelector) -> bool:
        for key, _ in selector.select():
            self._flowing.wait()
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            if not data:
                return False
            key.data.sendall(data)
        return True


def shut(end: socket.socket) -> None:
    """Shut a socket down for every process that holds a copy of it; a dead one is left alone.

    ``close`` alone would not do: a forked child's copy would keep the connection alive.
    """
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

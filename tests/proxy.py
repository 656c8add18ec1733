"""A TCP proxy before a real server that cuts connections, to see how a client takes it."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Passes bytes both ways on a loopback port of its own. `cut_answers` closes each of the next answers after so many bytes."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.answered = 0  #: bytes that went from the server to clients
        self._cuts: list[int] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_answers(self, *after_bytes: int) -> None:
        """Each of the next connections that carries an answer breaks after so many bytes of it; 0: before the first."""
        with self._lock:
            self._cuts.extend(after_bytes)
        self.drop_all()  # kept-alive connections don't ask for their cut

    def drop_all(self) -> None:
        with self._lock:
            connections, self._open = self._open, set()
        for one in connections:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
                allowed = self._cuts.pop(0) if self._cuts else None
            threading.Thread(target=self._pass, args=(client, server, None, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, allowed, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, allowed: int | None, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if allowed is not None:
                    data = data[:allowed]
                    allowed -= len(data)
                target.sendall(data)
                self.answered += len(data) if answers else 0
                if allowed == 0:
                    break
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        with self._lock:
            self._open -= {source, target}

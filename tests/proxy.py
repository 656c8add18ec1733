"""Proxies in front of real servers, for tests of clients. One breaks connections; the other injects answers, delays and wrong bytes."""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Forwards bytes in both directions, on its own loopback port. Breaks connections when a test asks for it."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.answered = 0  #: bytes sent from the server to clients
        self._cuts: list[int] = []
        self._mute = False
        self._mute_on: bytes | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_answers(self, *after_bytes: int) -> None:
        """Break the next new connections, one for each number, after this many bytes from the server. 0: before the first byte."""
        with self._lock:
            self._cuts.extend(after_bytes)
        self.drop_all()  # only a new connection takes a number: close those that are kept alive

    @contextlib.contextmanager
    def mute(self, on: bytes = b"") -> Iterator[None]:
        """From the first request that contains `on`, the server gets each request, but its answer is dropped and the connection broken."""
        self._mute_on = on
        try:
            yield
        finally:
            self._mute, self._mute_on = False, None

    def drop_all(self) -> None:
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

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
                if answers and self._mute:
                    break
                if not answers and self._mute_on is not None and self._mute_on in data:
                    self._mute = True
                if allowed is not None:
                    data = data[:allowed]
                    allowed -= len(data)
                target.sendall(data)
                self.answered += len(data) if answers else 0
                if allowed == 0:
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._open -= {source, target}


#: (method, path) → what to do with the request. An int: answer with this status instead of the server. "alter": change the last byte of
#: the body. "hang": send nothing until `let_go` is set. A float: wait this many seconds, then forward. None: forward.
Fault = Callable[[str, str], int | float | str | None]


class FaultyHttp:
    """An HTTP proxy on its own loopback port. `fault` decides on each request. It forwards Host, so that signatures stay valid."""

    def __init__(self, target_port: int) -> None:
        self.fault: Fault = lambda _method, _path: None
        self.seen: list[tuple[str, str]] = []
        self.let_go = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler(target_port))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self, target_port: int) -> type[http.server.BaseHTTPRequestHandler]:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.1":
                    self.send_response_only(100)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append((self.command, self.path))
                what = proxy.fault(self.command, self.path)
                if isinstance(what, int):
                    code = "AccessDenied" if what == 403 else "InternalError"
                    text = f"<Error><Code>{code}</Code><Message>a fault on purpose</Message></Error>".encode()
                    self._answer(what, [("Content-Type", "application/xml")], text)
                    return
                if what == "hang":
                    proxy.let_go.wait()
                elif isinstance(what, float):
                    time.sleep(what)
                if what == "alter" and body:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                server = http.client.HTTPConnection("127.0.0.1", target_port, timeout=30)
                # A client that waited too long has closed its connection.
                with contextlib.closing(server), contextlib.suppress(ConnectionError):
                    server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in {"expect", "connection"}:
                            server.putheader(name, value)
                    server.endheaders(body)
                    answer = server.getresponse()
                    content = answer.read()
                    if what == "alter" and self.command == "GET" and content:
                        content = content[:-1] + bytes([content[-1] ^ 1])
                    self._answer(answer.status, answer.getheaders(), content)

            def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                        self.send_header(name, value)
                length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 - as the library calls them

            def log_message(self, *_: object) -> None:
                """Log nothing: `seen` has the requests."""

        return Handler

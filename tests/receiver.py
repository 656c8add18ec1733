"""A receiver of webhooks, for tests: a real server on its own loopback port."""

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.certificates import Certificate


class Receiver:
    """A real HTTP server that records requests and answers with `answer`. With a certificate it uses TLS."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        receiver = self
        self.named: list[str | None] = []  #: the server name (SNI) of each TLS handshake
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: reply(handler, 204)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.answer(self)

            def do_GET(self) -> None:
                receiver.got.append(({"method": "GET"}, b""))
                reply(self, 200)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        if certificate is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.sni_callback = lambda _socket, name, _context: self.named.append(name)
            self.show(certificate)
            self.server.socket = self.context.wrap_socket(self.server.socket, server_side=True)
            self.url = f"https://hooks.example:{self.port}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def show(self, certificate: Certificate) -> None:
        """Use this certificate from the next handshake on."""
        self.context.load_cert_chain(certificate.chain, certificate.key)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()

"""A real SMTP server (aiosmtpd) on loopback, for tests. It keeps what it takes, and refuses a recipient named nobody."""

import email
import email.policy
import ssl
from email.message import EmailMessage
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from tests.certificates import Certificate
from tests.servers import free_port


class MailServer:
    """With a certificate it offers STARTTLS, and takes mail only after the login `nightpress`, `s3cret/:@%`."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.got: list[EmailMessage] = []
        self.recipients: list[str] = []
        self.port = free_port()
        more: dict[str, Any] = {}
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.chain, certificate.key)
            more = {
                "tls_context": context,
                "require_starttls": True,
                "auth_required": True,
                "authenticator": _authenticate,
            }
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port, **more)
        self._controller.start()

    async def handle_RCPT(self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _: Any) -> str:  # noqa: N802 - as the library calls it
        if address.startswith("nobody@"):
            return "550 5.1.1 no such mailbox"
        if address.startswith("full@"):
            return "452 4.2.2 the mailbox is full"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        assert isinstance(envelope.content, bytes)
        found = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(found, EmailMessage)
        self.got.append(found)
        self.recipients += envelope.rcpt_tos
        return "250 OK"

    def close(self) -> None:
        self._controller.stop()


def _authenticate(_server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any) -> AuthResult:
    assert isinstance(data, LoginPassword)
    right = (data.login, data.password) == (b"nightpress", b"s3cret/:@%")
    return AuthResult(success=right, handled=False)  # the server still has to answer

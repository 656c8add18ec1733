"""E-mail by SMTP, through the server that the operator names."""

import contextlib
import datetime as dt
import re
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import format_datetime
from urllib.parse import unquote, urlsplit

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.notifications.messages import Message
from nightpress.core.settings import Settings

SCHEME = "mailto:"
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?P<domain>[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*)")
_TIMEOUT_S = 10.0
_TLS_PORT, _PLAIN_PORT = 465, 587


def check_recipient(url: str, settings: Settings) -> str:
    """The address of `mailto:…`. Raises url_not_allowed if it is none, or the operator does not allow its domain."""
    address = url.removeprefix(SCHEME)
    found = _ADDRESS.fullmatch(address) if url.startswith(SCHEME) else None
    if found is None:
        raise _refused("it is not an e-mail address", "Give mailto:name@example.com, without further fields.")
    if not settings.smtp_url:
        raise _refused("this service sends no e-mail", "Its operator can set NIGHTPRESS_SMTP_URL.")
    domains = {domain.lower() for domain in settings.mail_domains}
    if found["domain"].lower() not in domains:
        raise _refused(
            f"no e-mail is sent to {found['domain'][:100]}",
            f"Allowed: {', '.join(sorted(domains)) or 'no domain'}. The operator sets NIGHTPRESS_MAIL_DOMAINS.",
        )
    return address


def send_mail(
    recipient: str,
    message: Message,
    settings: Settings,
    *,
    message_id: str,
    at: dt.datetime,
    context: ssl.SSLContext | None = None,
) -> tuple[int, str]:
    """Send one message. Returns SMTP's code and text of the answer about this message: 250 if the server took it.

    message_id: the same at every attempt, so that a mailbox can drop a repetition. A password is sent only over TLS.
    Raises ConnectionError or TimeoutError, also if the server refuses the password or the sender: the operator can mend that.
    """
    server = urlsplit(settings.smtp_url.get_secret_value() if settings.smtp_url else "")
    host, encrypted = server.hostname or "", server.scheme == "smtps"
    tls = context or ssl.create_default_context()
    mail = EmailMessage()
    mail["From"] = settings.mail_from or f"nightpress@{host}"
    mail["To"] = recipient
    mail["Subject"] = message.subject
    mail["Date"] = format_datetime(at)
    mail["Message-ID"] = f"<{message_id}@{mail['From'].addresses[0].domain}>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text)
    try:
        with contextlib.closing(
            smtplib.SMTP_SSL(host, server.port or _TLS_PORT, timeout=_TIMEOUT_S, context=tls)
            if encrypted
            else smtplib.SMTP(host, server.port or _PLAIN_PORT, timeout=_TIMEOUT_S)
        ) as smtp:
            smtp.ehlo()
            if not encrypted and smtp.has_extn("starttls"):
                smtp.starttls(context=tls)
                smtp.ehlo()
                encrypted = True
            if server.username and server.password:
                if not encrypted:
                    raise ConnectionError("the mail server offers no TLS, so it was not sent the password")
                smtp.login(unquote(server.username), unquote(server.password))
            smtp.send_message(mail)
            with contextlib.suppress(smtplib.SMTPException, OSError):
                smtp.quit()  # the message was taken, whatever the server says now
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        return code, text.decode(errors="replace")
    except smtplib.SMTPDataError as error:
        raw = error.smtp_error
        return error.smtp_code, raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    except TimeoutError:
        raise
    except (smtplib.SMTPException, OSError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    return 250, ""


def _refused(why: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.URL_NOT_ALLOWED, f"The address can't be used: {why}.", hint=hint)

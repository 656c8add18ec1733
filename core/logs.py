"""Logging for every Nightpress process: one line per event, secrets removed, as text for people or JSON for machines."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

_SECRETS = re.compile(
    r"(?i)(authorization:\s*\S+\s+|x-amz-(?:signature|credential|security-token)=|np_[a-z0-9]{4,12}_|whsec_)[^\s&\"'@]+"
    r"|(://[^/\s:@]*:)[^\s/@]+(?=@)"
)


def redact(text: str) -> str:
    """Replace keys, webhooks' secrets, presigned signatures and passwords in URLs by `***`."""
    return _SECRETS.sub(lambda match: f"{match.group(1) or match.group(2)}***", text)


_context: ContextVar[dict[str, object]] = ContextVar("log_context", default={})  # noqa: B039 - replaced, never changed


@contextmanager
def log_context(**ids: object) -> Iterator[None]:
    """Add these fields (e.g. request_id, job_id, attempt) to every JSON line that this thread or task logs within the block."""
    token = _context.set(_context.get() | ids)
    try:
        yield
    finally:
        _context.reset(token)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, object] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= _context.get()
        body |= {key: record.__dict__[key] for key in ("job_id", "attempt", "request_id") if key in record.__dict__}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(body, ensure_ascii=False, default=str))


def configure_logging(level: str, style: Literal["text", "json"]) -> None:
    """Send the root logger to standard error. Called once by each entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Json() if style == "json" else _Redacting("%(asctime)s %(levelname)-7s %(name)s  %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""Following the events or the log of a job or a study over SSE: the parser, and the position that is kept from connection to connection."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from nightpress.client.calls import Call, list_events, list_logs
from nightpress.client.errors import ApiError
from nightpress.client.study_calls import list_study_events
from nightpress.client.transport import Options, not_reachable
from nightpress.core.wire.jobs import EventView, LogView


class Numbered(Protocol):
    """An item with a number; numbers grow by 1 without gaps."""

    @property
    def seq(self) -> int: ...


Item = TypeVar("Item", bound=Numbered)


@dataclass(frozen=True)
class Stream(Generic[Item]):
    """A list that grows while a job or a study runs: its events or its log lines."""

    root: str  #: what has the list: "jobs" or "studies"
    path: str
    kind: TypeAdapter[Item]
    page: Callable[..., Call[list[Item]]]


EVENTS: Stream[EventView] = Stream("jobs", "events", TypeAdapter(EventView), list_events)
LOGS: Stream[LogView] = Stream("jobs", "logs", TypeAdapter(LogView), list_logs)
STUDY_EVENTS: Stream[EventView] = Stream("studies", "events", TypeAdapter(EventView), list_study_events)


class StreamPosition(Generic[Item]):
    """The position in a stream: the number of the last item, and since when the server has been silent.

    Feed it the lines of each connection. Items that were seen before are dropped.
    """

    def __init__(self, options: Options, stream: Stream[Item], subject_id: str, after: int, patience_s: float) -> None:
        self.after = after
        self._options = options
        self._stream = stream
        self._subject_id = subject_id
        self._patience_s = patience_s
        self._silent_since: float | None = None
        self._failures = 0
        self._data: list[str] = []

    def request(self) -> dict[str, Any]:
        """Arguments for `stream()` of either httpx client. The server pings every few seconds: 60 s of silence is a dead connection."""
        headers = {**self._options.headers(), "Accept": "text/event-stream", "Last-Event-ID": str(self.after)}
        return {
            "method": "GET",
            "url": f"/v1/{self._stream.root}/{self._subject_id}/{self._stream.path}",
            "headers": headers,
            "timeout": httpx.Timeout(60.0, connect=5.0),
        }

    def rest(self) -> Call[list[Item]]:
        """A call for the items after the last, as a plain list. Send it when the subject is over and the stream has ended."""
        return self._stream.page(self._subject_id, after=self.after)

    def feed(self, line: str) -> Item | None:
        """Take a line of the stream, without its line end. Returns a new item where the line completes it, else None."""
        self._silent_since, self._failures = None, 0
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            return None
        data, self._data = "\n".join(self._data), []
        if not data:
            return None
        try:
            item = self._stream.kind.validate_json(data)
        except ValidationError:
            return None  # a kind of message that a newer server sends
        return self.seen(item)

    def seen(self, item: Item) -> Item | None:
        """Move the position to an item and return it. Returns None for an item that was seen before."""
        if item.seq <= self.after:
            return None
        self.after = item.seq
        return item

    def pause_after(self, error: httpx.TransportError | ApiError) -> float:
        """Seconds to wait before connecting again.

        Raises ApiError where a new connection would be refused too. Raises ApiError or UnreachableError where the server
        has been silent for more than `patience_s`.
        """
        if isinstance(error, ApiError) and error.status not in {502, 503, 504}:
            raise error
        now = time.monotonic()
        self._data = []
        self._silent_since = self._silent_since or now
        if now - self._silent_since > self._patience_s:
            raise error if isinstance(error, ApiError) else not_reachable(self._options.api_url, error)
        self._failures += 1
        asked = error.retry_after if isinstance(error, ApiError) else None
        return max(asked or 0.0, min(0.2 * 2.0**self._failures, 5.0))

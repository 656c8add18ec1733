"""The synchronous client."""

from types import TracebackType
from typing import Self, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.drivers import Blocking
from nightpress.client.resources import BaseClient

Answer = TypeVar("Answer")


class Client(BaseClient[Blocking]):
    """A connection to a Nightpress API. Use it with `with`, or close it. Threads may share it.

    `profile` names a server that `nightpress servers add` has stored. Without address and profile the server is found as the
    command line finds it: in the environment, in the stored servers, or in the folder of the embedded stack. `timeout_s` bounds
    the wait for an answer, `retries` the number of further tries. Raises ClientError for a profile that is not known.

    >>> from nightpress import Client
    >>> with Client() as nightpress:
    ...     model = nightpress.models.upload(Path("all-minilm-l6-v2"))
    ...     job = nightpress.jobs.wait(nightpress.jobs.submit(model.id, "int8-encoder").id)
    ...     nightpress.jobs.download(job.id, Path("pressed"))
    """

    _open = Blocking

    @property
    def http(self) -> httpx.Client:
        return self._driver.http

    def send(self, call: Call[Answer]) -> Answer:
        """Send a call of `client.calls` or `client.access`, with retries. Raises ApiError or UnreachableError."""
        return self._driver.send(call)

    def close(self) -> None:
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The errors that the client raises. Each says what happened (`message`) and what to do about it (`hint`)."""

from typing import Any

import httpx
from pydantic import ValidationError

from nightpress.core.numbers import whole_number
from nightpress.core.wire.base import Problem


class ClientError(Exception):
    """The base of everything the client raises."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UnreachableError(ClientError):
    """No answer came after all retries: nothing listens, the connection broke, or the answer took too long."""


class TransferError(ClientError):
    """A file was not transferred: its bytes differ from what was announced, or its name is not safe to write."""


class ApiError(ClientError):
    """The server answered with a problem (RFC 9457). `code` is from core.errors.ErrorCode, or newer than this client."""

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        super().__init__(problem.detail or problem.title, hint=problem.hint)
        self.problem = problem
        self.code = problem.code
        self.status = problem.status
        self.request_id = problem.request_id  #: quote it when asking for help
        self.errors: list[dict[str, Any]] = problem.errors  #: the invalid fields of a refused request
        self.retry_after = retry_after

    @classmethod
    def from_response(cls, response: httpx.Response) -> "ApiError":
        """The error for a response with a status ≥ 400 whose body has been read.

        A response without a problem, e.g. from a proxy, is described by its status.
        """
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            problem = Problem(
                type="about:blank",
                title=response.reason_phrase,
                status=response.status_code,
                detail=f"{response.request.url.copy_with(query=None)} answered {response.status_code} {response.reason_phrase}.",
                code="not_found" if response.status_code == 404 else "internal",
                hint="This answer is not from a Nightpress API. Check the address, and whether a proxy is in between.",
                request_id=response.headers.get("x-request-id", ""),
            )
        return cls(problem, retry_after=retry_after_of(response))


def retry_after_of(response: httpx.Response) -> float | None:
    """Seconds from a Retry-After header; None where there is none or it is a date."""
    return whole_number(response.headers.get("retry-after", ""))

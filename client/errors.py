"""What a caller of the client can catch. Each says what happened (`message`) and what to do about it (`hint`)."""

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
    """No answer came: nothing listens, the connection broke, or it took too long. The retries are used up."""


class TransferError(ClientError):
    """A file could not be brought over whole: its bytes differ from what was announced, or its name is not safe to write."""


class ApiError(ClientError):
    """The server answered with a problem (RFC 9457). `code` is from core.errors.ErrorCode; a newer server may know more."""

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        super().__init__(problem.detail or problem.title, hint=problem.hint)
        self.problem = problem
        self.code = problem.code
        self.status = problem.status
        self.request_id = problem.request_id  #: quote it when asking for help
        self.errors: list[dict[str, Any]] = problem.errors  #: the faulty fields, where the request was refused
        self.retry_after = retry_after

    @classmethod
    def from_response(cls, response: httpx.Response) -> "ApiError":
        """Read the problem of an answer ≥ 400 whose body has been read; one without a problem (a proxy's, say) is described by its status."""
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            problem = Problem(
                type="about:blank",
                title=response.reason_phrase,
                status=response.status_code,
                detail=f"{response.request.url.copy_with(query=None)} answered {response.status_code} {response.reason_phrase}.",
                code="not_found" if response.status_code == 404 else "internal",
                hint="The answer is not from a Nightpress API: is the address right, and is a proxy in between?",
                request_id=response.headers.get("x-request-id", ""),
            )
        return cls(problem, retry_after=retry_after_of(response))


def retry_after_of(response: httpx.Response) -> float | None:
    """Seconds from a Retry-After header; None where there is none or it is a date."""
    return whole_number(response.headers.get("retry-after", ""))

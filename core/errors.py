"""The closed set of error codes, shared by HTTP problems, failed jobs and the command line."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every way a request or a job can fail. A code never changes its meaning once released."""

    # What the caller sent
    INVALID_REQUEST = "invalid_request"
    INVALID_RECIPE = "invalid_recipe"
    UNSUPPORTED_FORMAT = "unsupported_format"
    MALFORMED_MODEL = "malformed_model"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    INVALID_DATA = "invalid_data"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    PATH_NOT_ALLOWED = "path_not_allowed"
    CANNOT_FIT = "cannot_fit"
    INVALID_SCHEDULE = "invalid_schedule"
    URL_NOT_ALLOWED = "url_not_allowed"
    SOURCE_UNAVAILABLE = "source_unavailable"
    SOURCE_REFUSED = "source_refused"
    DESTINATION_UNAVAILABLE = "destination_unavailable"
    DESTINATION_REFUSED = "destination_refused"
    NOT_AUTHENTIC = "not_authentic"
    # Who called
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PRECONDITION_FAILED = "precondition_failed"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    QUOTA_EXCEEDED = "quota_exceeded"
    RATE_LIMITED = "rate_limited"
    # What the service depends on
    DATABASE_UNAVAILABLE = "database_unavailable"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    # What happened to the job
    OUT_OF_MEMORY = "out_of_memory"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    DISK_FULL = "disk_full"
    WORKER_LOST = "worker_lost"
    STALLED = "stalled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    QUEUE_DEADLINE_EXCEEDED = "queue_deadline_exceeded"
    NUMERICAL_FAILURE = "numerical_failure"
    VERIFICATION_FAILED = "verification_failed"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclass(frozen=True)
class ErrorKind:
    """How the service treats an error code: its title, its HTTP status, and whether a job that failed with it is retried."""

    title: str
    status: int
    retryable: bool = False


ERROR_KINDS: dict[ErrorCode, ErrorKind] = {
    ErrorCode.INVALID_REQUEST: ErrorKind("The request is not valid", 422),
    ErrorCode.INVALID_RECIPE: ErrorKind("The recipe is not valid", 422),
    ErrorCode.UNSUPPORTED_FORMAT: ErrorKind("The file format is not accepted", 422),
    ErrorCode.MALFORMED_MODEL: ErrorKind("The model's files are damaged or inconsistent", 422),
    ErrorCode.UNSUPPORTED_ARCHITECTURE: ErrorKind("The model's architecture is not supported here", 422),
    ErrorCode.INVALID_DATA: ErrorKind("The data set is not usable", 422),
    ErrorCode.CHECKSUM_MISMATCH: ErrorKind("The bytes received are not the bytes announced", 422),
    ErrorCode.PATH_NOT_ALLOWED: ErrorKind("The server path is not in an allowed folder", 403),
    ErrorCode.CANNOT_FIT: ErrorKind("No worker is large enough for this job", 422),
    ErrorCode.INVALID_SCHEDULE: ErrorKind("The schedule is not valid", 422),
    ErrorCode.URL_NOT_ALLOWED: ErrorKind("The address is not one that may be reached from here", 422),
    ErrorCode.SOURCE_UNAVAILABLE: ErrorKind("The place a model comes from does not answer", 503, retryable=True),
    ErrorCode.SOURCE_REFUSED: ErrorKind("The place a model comes from refuses access", 422),
    ErrorCode.DESTINATION_UNAVAILABLE: ErrorKind("The place a result goes to does not answer", 503, retryable=True),
    ErrorCode.DESTINATION_REFUSED: ErrorKind("The place a result goes to refuses it", 422),
    ErrorCode.NOT_AUTHENTIC: ErrorKind("A signature, a file or a figure does not fit its statement", 422),
    ErrorCode.UNAUTHENTICATED: ErrorKind("No valid API key was given", 401),
    ErrorCode.FORBIDDEN: ErrorKind("The API key does not allow this", 403),
    ErrorCode.NOT_FOUND: ErrorKind("There is no such thing", 404),
    ErrorCode.CONFLICT: ErrorKind("The state does not allow this", 409),
    ErrorCode.PRECONDITION_FAILED: ErrorKind("It was changed by somebody else", 412),
    ErrorCode.IDEMPOTENCY_MISMATCH: ErrorKind("The idempotency key was used with another body", 422),
    ErrorCode.PAYLOAD_TOO_LARGE: ErrorKind("The request is too large", 413),
    ErrorCode.QUOTA_EXCEEDED: ErrorKind("A quota is used up", 429),
    ErrorCode.RATE_LIMITED: ErrorKind("Too many requests", 429),
    ErrorCode.DATABASE_UNAVAILABLE: ErrorKind("The database does not answer", 503, retryable=True),
    ErrorCode.STORAGE_UNAVAILABLE: ErrorKind("The object storage does not answer", 503, retryable=True),
    ErrorCode.OUT_OF_MEMORY: ErrorKind("The worker ran out of memory", 500, retryable=True),
    ErrorCode.GPU_OUT_OF_MEMORY: ErrorKind("The GPU ran out of memory", 500, retryable=True),
    ErrorCode.DISK_FULL: ErrorKind("The worker's disk is full", 500, retryable=True),
    ErrorCode.WORKER_LOST: ErrorKind("The worker or its child process was lost", 500, retryable=True),
    ErrorCode.STALLED: ErrorKind("The job made no progress", 500, retryable=True),
    ErrorCode.DEADLINE_EXCEEDED: ErrorKind("The job ran longer than its limit", 500),
    ErrorCode.QUEUE_DEADLINE_EXCEEDED: ErrorKind("The job waited longer than its limit", 500),
    ErrorCode.NUMERICAL_FAILURE: ErrorKind("A computation left the finite numbers", 500),
    ErrorCode.VERIFICATION_FAILED: ErrorKind("An artifact did not pass its verification", 500),
    ErrorCode.CANCELLED: ErrorKind("The job was cancelled", 409),
    ErrorCode.INTERNAL: ErrorKind("An unexpected error", 500, retryable=True),
}


class NightpressError(Exception):
    """An error with a code from the closed set, what happened (`message`) and what to do about it (`hint`)."""

    def __init__(self, code: ErrorCode, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details: dict[str, Any] = details  #: JSON-serialisable facts, e.g. the offending file or field

    @property
    def kind(self) -> ErrorKind:
        return ERROR_KINDS[self.code]

    def as_dict(self) -> dict[str, Any]:
        """The form that is stored in a job's row and sent in frames."""
        return {"code": self.code.value, "message": self.message, "hint": self.hint, "details": self.details}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "NightpressError":
        return cls(
            ErrorCode(raw["code"]), str(raw["message"]), hint=str(raw.get("hint", "")), **dict(raw.get("details", {}))
        )

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

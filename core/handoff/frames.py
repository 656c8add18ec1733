"""Frames: JSON that a child writes to file descriptor 3, one frame per line, at most 64 KiB each."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_FRAME_BYTES = 64 * 1024

Phase = Literal["fetching", "validating", "baseline", "pressing", "exporting", "verifying", "evaluating", "uploading"]


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Progress(_Frame):
    """The child's progress. `fraction` is the finished part of the whole job, 0 to 1, and never decreases."""

    frame: Literal["progress"] = "progress"
    phase: Phase
    fraction: float = Field(ge=0, le=1)
    pass_index: int | None = None
    message: str = ""
    eta_s: float | None = None


class Metric(_Frame):
    """A point of a curve, e.g. a layer's error or a training loss."""

    frame: Literal["metric"] = "metric"
    name: str
    value: float
    step: int | None = None


class Log(_Frame):
    frame: Literal["log"] = "log"
    level: Literal["debug", "info", "warning", "error"] = "info"
    text: str


class Checkpoint(_Frame):
    """A file below work/ is complete: every later attempt, on any worker, gets it at the same path. A second frame for a path replaces it.

    Of files that belong together, the file that marks the others as complete comes last.
    """

    frame: Literal["checkpoint"] = "checkpoint"
    path: str = Field(max_length=512)
    step: int
    pass_index: int = Field(0, ge=0, description="the pass it belongs to")


class Span(_Frame):
    """A finished phase or pass, for tracing."""

    frame: Literal["span"] = "span"
    name: str = Field(max_length=200)
    started_ns: int = Field(ge=0, lt=2**63, description="Unix nanoseconds")
    ended_ns: int = Field(ge=0, lt=2**63)


class Result(_Frame):
    """The last frame. Either `error` is None and out/manifest.json is complete, or `error` is NightpressError.as_dict()."""

    frame: Literal["result"] = "result"
    error: dict[str, Any] | None = None


Frame = Annotated[Progress | Metric | Log | Checkpoint | Span | Result, Field(discriminator="frame")]
_ADAPTER: TypeAdapter[Frame] = TypeAdapter(Frame)


def parse_frame(line: bytes) -> Frame:
    """Parse one line. Raises pydantic.ValidationError if it is not a valid frame."""
    return _ADAPTER.validate_json(line)

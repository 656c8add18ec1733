"""Frames: the lines of JSON a child writes to file descriptor 3, one a line, at most 64 KiB each."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_FRAME_BYTES = 64 * 1024

Phase = Literal["fetching", "validating", "baseline", "pressing", "exporting", "verifying", "evaluating", "uploading"]


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Progress(_Frame):
    """Where the child is. `fraction` is of the whole job, 0 to 1, and never falls."""

    frame: Literal["progress"] = "progress"
    phase: Phase
    fraction: float = Field(ge=0, le=1)
    pass_index: int | None = None
    message: str = ""
    eta_s: float | None = None


class Metric(_Frame):
    """A figure worth a curve, e.g. a layer's error or a training loss."""

    frame: Literal["metric"] = "metric"
    name: str
    value: float
    step: int | None = None


class Log(_Frame):
    frame: Literal["log"] = "log"
    level: Literal["debug", "info", "warning", "error"] = "info"
    text: str


class Checkpoint(_Frame):
    """A file below work/ is whole: another attempt, here or elsewhere, finds it there again. The same path again replaces it.

    Where several files belong together, the one that vouches for the others comes last.
    """

    frame: Literal["checkpoint"] = "checkpoint"
    path: str = Field(max_length=512)
    step: int
    pass_index: int = Field(0, ge=0, description="the pass it belongs to")


class Span(_Frame):
    """A step that is over: a phase or a pass, for who traces jobs."""

    frame: Literal["span"] = "span"
    name: str = Field(max_length=200)
    started_ns: int = Field(ge=0, lt=2**63, description="Unix nanoseconds")
    ended_ns: int = Field(ge=0, lt=2**63)


class Result(_Frame):
    """The last frame. Either `error` is None and out/manifest.json is whole, or `error` is NightpressError.as_dict()."""

    frame: Literal["result"] = "result"
    error: dict[str, Any] | None = None


Frame = Annotated[Progress | Metric | Log | Checkpoint | Span | Result, Field(discriminator="frame")]
_ADAPTER: TypeAdapter[Frame] = TypeAdapter(Frame)


def parse_frame(line: bytes) -> Frame:
    """Read one line. Raises pydantic.ValidationError on anything else."""
    return _ADAPTER.validate_json(line)

"""What an embedded stack leaves in its data folder about itself: where it answers, and which processes it runs."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, HttpUrl, TypeAdapter, ValidationError, field_validator

STATE_FILE = "devstack.json"

_Pid = Annotated[int, Field(gt=0, lt=2**31)]
_ADDRESS: TypeAdapter[HttpUrl] = TypeAdapter(HttpUrl)


class StackState(BaseModel):
    """Empty where no stack has left anything."""

    api_url: str = ""
    pids: dict[str, _Pid] = {}
    started: dict[_Pid, float] = {}  #: process → its time of birth: a number alone may be another process's by now

    @field_validator("api_url")
    @classmethod
    def _is_address(cls, text: str) -> str:
        if text:
            _ADDRESS.validate_python(text)
        return text

    @classmethod
    def load(cls, folder: Path) -> "StackState":
        """What `save` wrote there. A file that is anything else says nothing: it is not an error, and the next stack replaces it."""
        try:
            return cls.model_validate_json((folder / STATE_FILE).read_bytes())
        except (OSError, ValidationError):
            return cls()

    def save(self, folder: Path) -> None:
        partial = folder / f"{STATE_FILE}.partial"
        partial.write_text(self.model_dump_json())
        partial.replace(folder / STATE_FILE)

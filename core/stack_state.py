"""The state file that an embedded stack writes to its data folder: the API's address and the processes that it runs."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, HttpUrl, TypeAdapter, ValidationError, field_validator

STATE_FILE = "devstack.json"

_Pid = Annotated[int, Field(gt=0, lt=2**31)]
_ADDRESS: TypeAdapter[HttpUrl] = TypeAdapter(HttpUrl)


class StackState(BaseModel):
    """All fields are empty if no stack has written the file."""

    api_url: str = ""
    pids: dict[str, _Pid] = {}
    #: PID → start time of the process: the system may have given the PID to another process since
    started: dict[_Pid, float] = {}

    @field_validator("api_url")
    @classmethod
    def _is_address(cls, text: str) -> str:
        if text:
            _ADDRESS.validate_python(text)
        return text

    @classmethod
    def load(cls, folder: Path) -> "StackState":
        """Read what `save` wrote. A missing or invalid file is no error: the state is then empty, and the next stack replaces the file."""
        try:
            return cls.model_validate_json((folder / STATE_FILE).read_bytes())
        except (OSError, ValidationError):
            return cls()

    def save(self, folder: Path) -> None:
        partial = folder / f"{STATE_FILE}.partial"
        partial.write_text(self.model_dump_json())
        partial.replace(folder / STATE_FILE)

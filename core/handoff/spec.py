"""`spec.json`: everything a child needs to know. It names no host, no credential and no path outside its folder."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.models import Recipe

SPEC_FILE = "spec.json"
SOURCE_DIR = "source"
DATA_DIR = "data"
WORK_DIR = "work"
OUT_DIR = "out"


class JobSpec(BaseModel):
    """One attempt of one job, as the child sees it. All paths are relative to the job's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    attempt: int = Field(ge=1)
    model_name: str
    model_digest: str = Field(description="`sha256:…` over the model's file list; see core/service/registry")
    recipe: Recipe
    data: dict[str, str] = Field(default_factory=dict, description="data set id → file below data/")
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, description="CPU threads of the child")
    memory_limit: int = Field(0, ge=0, description="bytes the job may use; 0: no limit")
    file_limit: int = Field(0, ge=0, description="bytes one file may have (RLIMIT_FSIZE); 0: no limit")

    def save(self, job_dir: Path) -> None:
        (job_dir / SPEC_FILE).write_text(self.model_dump_json(indent=1))

    @classmethod
    def load(cls, job_dir: Path) -> "JobSpec":
        return cls.model_validate_json((job_dir / SPEC_FILE).read_bytes())

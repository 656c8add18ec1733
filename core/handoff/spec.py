"""`spec.json`: everything that a child needs for its job. It contains no host, no credential and no path outside the job's folder."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.passes.catalog import Provider

SPEC_FILE = "spec.json"
SOURCE_DIR = "source"
DATA_DIR = "data"
WORK_DIR = "work"
OUT_DIR = "out"
MEASURED_DIR = "work/measured"  #: the folder for the consumers' outputs


class JobSpec(BaseModel):
    """One attempt of one job, as the child sees it. All paths are relative to the job's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    attempt: int = Field(ge=1)
    model_name: str
    model_digest: str = Field(description="`sha256:…` over the model's file list; see core/service/registry")
    recipe: Recipe
    packages: dict[str, Provider] = Field(
        default_factory=dict, description="pass → the package that it comes from, for those that are not built in"
    )
    data: dict[str, str] = Field(default_factory=dict, description="data set id → file below data/")
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[str, ...] | None = Field(
        None, description="UUIDs of the GPUs that the job may use; null: those that the child's environment shows"
    )
    threads: int = Field(1, ge=1, description="CPU threads of the child")
    processes: int = Field(1, ge=1, description="processes that compute one model together, each on a GPU of its own")
    memory_limit: int = Field(0, ge=0, description="bytes the job may use; 0: no limit")
    source_measured_by: str = Field(
        "", description="the job that measured the source's outputs in work/kept-source.npz; empty: there are none"
    )
    keep_source: bool = Field(False, description="whether the source's outputs are kept for later jobs")
    file_limit: int = Field(0, ge=0, description="bytes one file may have (RLIMIT_FSIZE); 0: no limit")

    def save(self, job_dir: Path) -> None:
        (job_dir / SPEC_FILE).write_text(self.model_dump_json(indent=1))

    @classmethod
    def load(cls, job_dir: Path) -> "JobSpec":
        """Read a job's spec, and allow exactly the passes of the packages that it names in this process.

        Raises NightpressError(internal) if a package is not installed in the version that the spec names, or can't be used.
        """
        raw = (job_dir / SPEC_FILE).read_bytes()
        catalog.allow_exactly(_Packages.model_validate_json(raw).packages)
        return cls.model_validate_json(raw)


class _Packages(BaseModel):
    """The part of a spec that must be read before its recipe, because the packages define passes of the recipe."""

    packages: dict[str, Provider] = Field(default_factory=dict)

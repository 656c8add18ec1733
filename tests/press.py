"""Jobs for the pipeline's tests: a job folder as a worker prepares it, pressed in this process."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nightpress.core.compress import pipeline
from nightpress.core.compress.export.task import Task, TimedShape
from nightpress.core.handoff.frames import Frame
from nightpress.core.handoff.manifest import Manifest
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import DATA_DIR, SOURCE_DIR, WORK_DIR, JobSpec
from nightpress.core.recipes.models import parse_recipe
from tests.models import shared_folder


def lay_out(
    job_dir: Path, model: Path, recipe: dict[str, Any], data: dict[str, str] | None = None, *, threads: int = 1
) -> Path:
    """Prepare a job's folder and return it. `data`: the recipe's name of a data set → its JSONL text."""
    shutil.copytree(model, job_dir / SOURCE_DIR)
    (job_dir / DATA_DIR).mkdir()
    for name, text in (data or {}).items():
        (job_dir / DATA_DIR / f"{name}.jsonl").write_text(text)
    JobSpec(
        job_id="job_test",
        attempt=1,
        model_name="a model",
        model_digest="sha256:" + "0" * 64,
        recipe=parse_recipe({"name": "test", **recipe}),
        data={name: f"{name}.jsonl" for name in data or {}},
        threads=threads,
    ).save(job_dir)
    return job_dir


def share_traces(work_dir: Path) -> Path:
    """Let a job find the traces that earlier tests of this process have left, as it finds those of its own attempts. Returns its work folder.

    A trace takes seconds, and its name is a digest of all that it depends on.
    """
    shared = shared_folder() / "graph"
    for folder in (work_dir, shared):
        folder.mkdir(parents=True, exist_ok=True)
    if not (work_dir / "graph").exists():
        (work_dir / "graph").symlink_to(shared)
    return work_dir


def press(job_dir: Path) -> tuple[Manifest, Report, list[Frame]]:
    """Run the job's pipeline. Returns its manifest, the report that it wrote, and its frames."""
    frames: list[Frame] = []
    share_traces(job_dir / WORK_DIR)
    manifest = pipeline.run(job_dir, frames.append)
    return manifest, Report.model_validate_json((job_dir / "out" / "report.json").read_bytes()), frames


def graph_bytes(artifact: Path) -> int:
    """The size of the files with the graph and its weights, without tokenizer and configs. A plan estimates this size."""
    return sum(file.stat().st_size for file in artifact.iterdir() if file.suffix in {".onnx", ".data", ".xml", ".bin"})


def runner_request(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What the runner of a causal language model is asked, without examples. Its working folder is the folder's parent."""
    shapes = (TimedShape(batch=1, length=4, repeats=1),)
    task = Task("causal-lm", "AutoModelForCausalLM", (), shapes, np.zeros(4, np.int64), "mean", 1, threads=1)
    return {**task.request(), "folder": folder.name, "device": device}

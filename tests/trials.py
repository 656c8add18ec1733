"""Made-up results of jobs: reports, and figures as a function of the recipe."""

from typing import Any

from nightpress.core.handoff.report import Report, Subject
from nightpress.core.handoff.spec import JobSpec


def bits_of(recipe: dict[str, Any]) -> tuple[float, float]:
    """Fewer bits and larger groups are smaller and worse: 4 bits in groups of 32 keep the gate, and 3 bits nearly do."""
    rounding = recipe["passes"][0]
    bits = rounding["bits"] + 16 / rounding["group_size"] + 0.01 * (not rounding["symmetric"])
    return bits / 32, 1 - 0.6 / 2 ** rounding["bits"] - 0.0001 * rounding["group_size"]


def report_of(job_id: str, recipe: dict[str, Any], size: float, cosine: float) -> Report:
    """The report of a job with a single artifact."""

    def subject(name: str, size_bytes: float, value: float) -> dict[str, Any]:
        figure = {"name": "cosine", "value": value, "n": 64, "better": "higher", "data": "builtin:prose"}
        return {"name": name, "format": name, "size_bytes": round(size_bytes), "measurements": [figure]}

    bound = float(recipe["gates"]["cosine"].split()[-1])
    gate = {
        "gate": f"cosine >= {bound:g}",
        "artifact": "compressed-tensors",
        "observed": cosine,
        "passed": cosine >= bound,
        "explanation": f"{cosine:.4f} on builtin:prose",
    }
    return Report.model_validate(
        {
            "job_id": job_id,
            "model": {"name": "tiny", "digest": "sha256:0"},
            "recipe": recipe,
            "data": [],
            "environment": {},
            "source": subject("source", 1_000_000, 1.0),
            "artifacts": [subject("compressed-tensors", 1_000_000 * size, cosine)],
            "passes": [],
            "gates": [gate],
            "verdict": "accepted" if cosine >= bound else "rejected",
            "phases": {},
        }
    )


def plain_report(spec: JobSpec, folder: str, source: Subject | None = None) -> Report:
    """The report of a job that measured nothing. It names the job's folder and the number of its threads."""
    return Report(
        job_id=spec.job_id,
        model={},
        recipe={},
        data=(),
        environment={"folder": folder, "threads": spec.threads},
        source=source or Subject(name="source", format="safetensors", size_bytes=1),
        artifacts=(),
        passes=(),
        gates=(),
        verdict="accepted",
        phases={},
    )

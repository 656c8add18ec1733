"""all-MiniLM-L6-v2 in the forms that only embedders have: a table of token vectors, truncated and small vectors, a cut vocabulary.

    python -m bench.encoders [--threads 2] [--only vocabulary]

Retrieval and neighbours are measured on built-in prose, beside the source. The vocabulary is cut to the built-in prose. Times are the
median of a pass over 32 × 128 tokens, taken by turns with the source in torch.
"""

import sys
import tempfile
from pathlib import Path

from bench.pressing import folder_mb, press
from bench.record import Figure, finish, make_parser
from nightpress.core.handoff.report import Report, Subject
from nightpress.core.recipes.models import parse_recipe
from tests.models import minilm_dir

_VECTORS = {"dimensions": [192, 128, 64], "types": ["float32", "int8", "binary"]}
_EVALUATE = [
    {"metric": "retrieval", "data": "builtin:prose", "samples": 256, "length": 96},
    {"metric": "neighbours", "data": "builtin:prose", "samples": 300, "length": 64, **_VECTORS},
    {"metric": "latency", "batch": [32], "length": [128], "repeats": 5},
]
_FORMS = {
    "static-embeddings": {"pass": "static-embeddings"},
    "vocabulary": {"pass": "vocabulary", "data": "builtin:prose"},
}


def main() -> int:
    parser = make_parser("encoders", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(_FORMS), default=list(_FORMS))
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        model = minilm_dir(Path(folder))
        for name, chosen in ((name, _FORMS[name]) for name in options.only):
            recipe = parse_recipe({"name": name, "passes": [chosen], "exports": ["safetensors"], "evaluate": _EVALUATE})
            job = Path(folder) / name
            report = press(job, model, recipe, options.threads)
            figures += _of_form(name, report, job)
    return finish("encoders", figures, parser, options, choices=("only",))


def _of_form(name: str, report: Report, job: Path) -> list[Figure]:
    artifact = report.artifacts[0]
    found = [
        Figure(f"forms/{name}/size", round(folder_mb(job / "out" / "safetensors"), 1), "MB"),
        Figure(f"forms/{name}/source_size", round(folder_mb(job / "source"), 1), "MB"),
        *_quality(f"forms/{name}", artifact),
        *_quality(f"source of {name}", report.source),
    ]
    timing = artifact.timings[0]
    if timing.speedup is not None:
        spread = timing.speedup.low, timing.speedup.high
        found.append(Figure(f"forms/{name}/faster", round(timing.speedup.value, 2), "×", spread))
    told = report.passes[0].summary
    shown = ("tokens", "kept", "prose_tokens", "prose_tokens_after", "kept_variance")
    found += [Figure(f"forms/{name}/{key}", float(told[key])) for key in shown if key in told]
    return found


def _quality(group: str, subject: Subject) -> list[Figure]:
    return [
        Figure(
            f"{group}/{figure.name}{f' {figure.of}' if figure.of else ''}",
            round(figure.value, 4),
            "",
            (figure.low, figure.high),
        )
        for figure in subject.measurements
    ]


if __name__ == "__main__":
    sys.exit(main())

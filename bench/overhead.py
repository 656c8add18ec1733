"""The cost of verification: seconds of each phase of real jobs, and the share of the job that verification takes.

    python -m bench.overhead [--threads 2]

Built-in recipes on the real encoder and the real small language model, through the pipeline in one process. Verification loads each
artifact in a new process and compares its outputs on the check texts. It may take 20% of the job. Evaluation is done by the same
processes after that. The baseline is the source, loaded and measured in its own process.
"""

import sys
import tempfile
from pathlib import Path

from bench.pressing import press
from bench.record import Figure, finish, make_parser
from nightpress.core.recipes.builtins import get_recipe
from tests.models import minilm_dir, smollm_dir

JOBS = (
    ("all-MiniLM-L6-v2", "cpu-encoder"),
    ("all-MiniLM-L6-v2", "int8-encoder"),
    ("SmolLM2-135M", "int8-weights"),
    ("SmolLM2-135M", "gguf-lm"),
)


def measure(model: str, recipe: str, threads: int) -> list[Figure]:
    """Run the job once, and read the phases from its report."""
    source = smollm_dir() if model.startswith("SmolLM2") else minilm_dir()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        phases = press(Path(folder), source, get_recipe(recipe), threads).phases
    row = f"{model}, {recipe}"
    share = phases.get("verifying", 0.0) / sum(phases.values())
    return [
        *(Figure(f"{row}/{name}", round(seconds, 2), "s") for name, seconds in phases.items()),
        Figure(f"{row}/verifying_share", round(share, 4), "of the job", bar="<= 0.2"),
    ]


def main() -> int:
    parser = make_parser("overhead", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    figures = [figure for model, recipe in JOBS for figure in measure(model, recipe, options.threads)]
    return finish("overhead", figures, parser, options)


if __name__ == "__main__":
    sys.exit(main())

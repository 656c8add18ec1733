"""What the plan estimates of memory, time and size, beside what is then measured, for several models and recipes.

    python -m bench.estimates [--threads 2] [--json]

Each pair is one pass on one real model, in a process of its own. Bars: memory within 20%, size within 2%, time within a factor of 2.
Time depends on the machine: the plan's rates are those of two cores. What the evaluations and exports take beside the pass is not run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Model, pass, and calibration: samples and length.
PAIRS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "minilm-weight-only": ("minilm", {"pass": "weight-only", "bits": 8}, (8, 16)),
    "minilm-gptq": ("minilm", {"pass": "gptq", "group_size": 64}, (32, 128)),
    "minilm-wanda": ("minilm", {"pass": "wanda"}, (64, 256)),
    "smollm-weight-only": ("smollm", {"pass": "weight-only", "bits": 4, "group_size": 64}, (8, 16)),
    "smollm-gptq": ("smollm", {"pass": "gptq", "group_size": 64}, (32, 512)),
    "smollm-sparsegpt": ("smollm", {"pass": "sparsegpt"}, (16, 256)),
}


def press(name: str, source: Path, work: Path, threads: int) -> dict[str, Any]:
    """One pair in this process."""
    import torch

    from core.compress.passes import MODEL_PASSES, PassContext
    from core.recipes.costs import FORWARD_RATE, RUNTIME_BYTES
    from core.recipes.inspect import FolderFiles, inspect_model
    from core.recipes.models import parse_recipe
    from core.recipes.plan import make_plan

    torch.set_num_threads(threads)
    _, pass_, (samples, length) = PAIRS[name]
    export = "safetensors" if pass_["pass"] in {"wanda", "sparsegpt"} else "compressed-tensors"
    calibration = {"samples": samples, "length": length}
    recipe = parse_recipe({"name": "bench", "passes": [pass_], "exports": [export], "calibration": calibration})
    header = inspect_model(FolderFiles(source))
    plan = make_plan(recipe, header)
    assert plan.estimate is not None
    cost = recipe.passes[0].cost(header, recipe.calibration)
    context = PassContext(header=header, work_dir=work, calibration=recipe.calibration, threads=threads)
    start = time.perf_counter()
    MODEL_PASSES[pass_["pass"]](source, work / "out", recipe.passes[0], context)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    measured = {
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": seconds,
        "size": size,
    }
    estimated = {
        "memory": RUNTIME_BYTES + cost.memory_bytes,
        "seconds": cost.seconds + cost.work / FORWARD_RATE,
        "size": plan.estimate.output_bytes[export],
    }
    return {
        key: {"estimated": estimated[key], "measured": measured[key], "ratio": estimated[key] / measured[key]}
        for key in measured
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(PAIRS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "MODEL", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, model, work = given.child
        print(json.dumps(press(name, Path(model), Path(work), given.threads)))
        return 0
    from tests.models import minilm_dir, smollm_dir

    out: dict[str, Any] = {}
    for name in given.only or PAIRS:
        with tempfile.TemporaryDirectory() as work:
            source = str(minilm_dir() if PAIRS[name][0] == "minilm" else smollm_dir())
            command = [sys.executable, "-m", "bench.estimates", "--threads", str(given.threads)]
            command += ["--child", name, source, work]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        out[name] = json.loads(run.stdout.strip().splitlines()[-1])
        if not given.json:
            print(name, {key: f"{one['ratio']:.2f}" for key, one in out[name].items()}, flush=True)
    if given.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

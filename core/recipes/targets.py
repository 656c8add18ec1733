"""Targets: where a model will run, and the passes and exports that were measured to be fastest there.

A recipe with a target may leave out its passes, its exports, or both. They are filled in when the recipe is read. The recipe is stored,
fingerprinted and shown with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nightpress.core.recipes.classes import reads_both_ways
from nightpress.core.recipes.exports import Export, runs_in_llama_cpp
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat

Target = Literal["cpu-encoder", "cpu-llm", "gpu-vllm", "browser", "auto"]

#: Number of parameters above which `auto` chooses a GPU for a language model. A CPU reads all weights for each token, so its decoding
#: speed is memory bandwidth divided by the weights' bytes. With the 4.5 GB of 8 billion weights in 4 bits it is a few tokens per second.
_LARGEST_ON_CPU = 8_100_000_000


@dataclass(frozen=True)
class Aim:
    """The passes, calibration and exports that a target fills into a recipe that leaves them out."""

    passes: tuple[Mapping[str, Any], ...]
    calibration: Mapping[str, Any] | None  #: used with these passes
    exports: tuple[str | Mapping[str, str], ...]  #: in the notation of recipes
    reads: frozenset[ExportFormat]  #: the formats that the target's runtimes load
    decoders: bool | None  #: True: for language models; False: for other models, encoder-decoders too; None: for both
    because: str  #: the reason for the choice, and the command that prints its figures


AIMS: Mapping[str, Aim] = {
    "cpu-encoder": Aim(
        passes=({"pass": "static-int8", "min_cosine": 0.997},),
        calibration={"samples": 64, "length": 128},
        exports=("openvino", "onnx"),
        reads=frozenset({"onnx", "openvino"}),
        decoders=False,
        because="With VNNI (AVX-512 or AVX), OpenVINO ran calibrated int8 faster than anything else that was timed, and ONNX Runtime ran it next (`bench.targets`). On a CPU without VNNI it was not timed there; ONNX Runtime was the faster of the two in dynamic int8 (`bench.encoder`). So both are made, and the report says which was faster on the worker. `weight_bits: auto` goes by the processor that presses: name `weight_bits: 7` where the result is to run on an x86 processor without VNNI. What was timed are text encoders; image classifiers and encoder-decoders get the same form.",
    ),
    "cpu-llm": Aim(
        passes=({"pass": "gptq", "bits": 4, "group_size": 32},),
        calibration={"samples": 32, "length": 512},
        exports=({"format": "gguf", "type": "q8_0"},),
        reads=frozenset({"gguf"}),
        decoders=True,
        because="llama.cpp decoded Q4_0 faster than its other types that were timed, and at 4 bits codes that GPTQ chose lose a fraction of what rounding loses (`bench.quality`); `bench.targets` measures both together.",
    ),
    "gpu-vllm": Aim(
        passes=({"pass": "gptq", "bits": 4, "group_size": 128},),
        calibration={"samples": 128, "length": 512},
        exports=("compressed-tensors",),
        reads=frozenset({"compressed-tensors", "safetensors"}),
        decoders=True,
        because="GPTQ at 4 bits in groups of 128 is what vLLM has its fastest kernels for; its quality was measured (`bench.quality`), its speed in vLLM was not.",
    ),
    "browser": Aim(
        passes=({"pass": "dynamic-int8"},),
        calibration=None,
        exports=("transformers.js",),
        reads=frozenset({"transformers.js"}),
        decoders=None,
        because="A page loads what it must first download: int8 halves half precision and runs in transformers.js for every kind of model here. Its speed in a page was not measured.",
    ),
}


def fill_in(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with the target's passes, calibration and exports filled in; unchanged without a target, or with `auto`."""
    filled = dict(raw)
    aim = AIMS.get(str(raw.get("target")))
    if aim is None:
        return filled
    if "passes" not in raw:
        filled["passes"] = [dict(options) for options in aim.passes]
        if aim.calibration is not None:
            filled.setdefault("calibration", dict(aim.calibration))
    filled.setdefault("exports", list(aim.exports))
    return filled


def misfit(target: str, exports: tuple[Export, ...]) -> str | None:
    """Return why a target's runtimes can't load these exports; None: they can."""
    aim = AIMS.get(target)
    wrong = [] if aim is None else [export.name for export in exports if export.format not in aim.reads]
    if aim is None or not wrong:
        return None
    return (
        f"`target: {target}` runs {' and '.join(sorted(aim.reads))}, not {', '.join(wrong)}. {aim.because} "
        "Leave out `exports`, or leave out `target` to choose freely"
    )


def check_target(target: str | None, header: ModelHeader) -> None:
    """Raise NightpressError(invalid_recipe) if the target is for another kind of model."""
    aim = AIMS.get(target or "")
    if aim is not None and aim.decoders not in {None, header.is_decoder}:
        kind = "language models" if aim.decoders else "encoders and encoder-decoders"
        raise invalid(
            f"`target: {target}` is for {kind}, and this is a {header.architecture}.",
            f"Use `target: {target_for(header)}`, or `target: auto`.",
        )


def target_for(header: ModelHeader) -> str:
    """Return the target that `auto` stands for. Raises NightpressError(invalid_recipe) if there is no target for the model."""
    if header.is_decoder:
        small = header.parameters <= _LARGEST_ON_CPU
        return "cpu-llm" if small and runs_in_llama_cpp(header) else "gpu-vllm"
    reads_text = reads_both_ways(header.model_type) and header.task != "other"
    sees = header.sees_images and header.task == "classification"
    if reads_text or sees or header.task == "seq2seq":
        return "cpu-encoder"
    raise invalid(
        f"`target: auto` knows no target for a {header.architecture}: they are for language models, encoders, image classifiers and encoder-decoders.",
        "Name `passes` and `exports`.",
    )

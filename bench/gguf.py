"""GGUF files of ours and of llama.cpp's quantizer with its importance matrix: same model, same calibration tokens, by turns.

    python -m bench.gguf [--only NAME …] [--methods NAME …] [--seeds 1] [--calibration FILE] [--text FILE]

The model is that of bench.offgrid. llama.cpp's quantizer gets the importance matrix that its own tool would make of the calibration tokens:
the mean square of each linear layer's inputs. It writes the file type that its users take for the class, e.g. Q4_K_M. Ours is `k-quants`
with the type of the class for all layers, and with `bits_per_weight` at the bytes of llama.cpp's matrices. No file of ours is larger than
llama.cpp's. The files are read back by the package `gguf`, and run in float32.

Each figure is the divergence from the float model in nats a token (KL), on text that calibrated nothing: in domain (a novel; the
calibration text is novels) and out of domain (the reference of the Python language). Mean over the seeds, and their range. A seed chooses
the calibration text. `seconds` are those of making the file, for llama.cpp with the importance matrix.
"""

import ctypes
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.low_bits import DOMAINS, NOVELS, SHARED, Texts, compare, held_out
from bench.offgrid import offgrid_dir
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.convert.gguf_file import GgufSource
from nightpress.core.compress.export.gguf import save
from nightpress.core.compress.export.gguf.families import GgufFamily
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import KQuants

#: Class → llama.cpp's file type
CLASSES = {
    "Q5_K": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "Q3_K": gguf.LlamaFileType.MOSTLY_Q3_K_M,
    "Q2_K": gguf.LlamaFileType.MOSTLY_Q2_K,
}
PEER, OURS, MIXED = "llama.cpp", "ours", "ours by error"
METHODS = (PEER, OURS, MIXED)
CANDIDATES = ("q2_k", "q3_k", "q4_k", "q4_1", "q5_k", "q6_k")


@dataclass(frozen=True)
class Made:
    """A file that was measured."""

    megabytes: float
    divergence: tuple[float, ...]  #: nats, by domain
    seconds: float


def main() -> int:
    parser = make_parser("gguf", __doc__)
    parser.add_argument("--only", nargs="*", choices=sorted(CLASSES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens of calibration text")
    parser.add_argument("--held-out", type=int, default=4, help="samples of 512 tokens of each domain")
    parser.add_argument("--calibration", type=Path, default=NOVELS)
    parser.add_argument("--text", type=Path, default=SHARED / "lm_eval_persuasion.txt.gz", help="held out, in domain")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = offgrid_dir("bfloat16")
    texts = held_out(source, options.held_out, options.device, options.text)
    made: dict[tuple[str, str], list[Made]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as work:
            for name, method, file in measure(source, Path(work), seed, texts, options):
                print(name, method, "seed", seed, file, file=sys.stderr, flush=True)
                made.setdefault((name, method), []).append(file)
    figures = [figure for name in options.only or CLASSES for figure in figures_of(name, made)]
    return finish("gguf", figures, parser, options, choices=("only", "methods", "device", "calibration", "text"))


def measure(source: Path, work: Path, seed: int, texts: Texts, options: Any) -> Iterator[tuple[str, str, Made]]:
    """Yield each class's files, with one calibration text."""
    header = inspect_model(FolderFiles(source))
    known = options.calibration.exists()
    calibration = Calibration(data="text" if known else "builtin:prose", samples=options.samples, length=512, seed=seed)
    context = PassContext(
        header=header,
        work_dir=work / "work",
        device=options.device,
        threads=torch.get_num_threads(),
        calibration=calibration,
        data_files={"text": options.calibration} if known else {},
    )
    context.work_dir.mkdir()
    start = time.perf_counter()
    importance = mean_squares(source, calibration_samples(source, context)["input_ids"], options.device)
    matrix_seconds = time.perf_counter() - start
    save(source, work / "plain", header, weights="f32", pooling="")
    for name in options.only or CLASSES:
        start = time.perf_counter()
        theirs = work / f"{name}.gguf"
        matrix = {GgufFamily(header).name(layer) or layer: values for layer, values in importance.items()}
        quantize(work / "plain" / "model.gguf", theirs, CLASSES[name], matrix)
        seconds = time.perf_counter() - start + matrix_seconds
        if PEER in options.methods:
            yield name, PEER, judged(theirs, work / f"{name}-read", seconds, texts, options.device)
        for method in set(options.methods) - {PEER}:
            start, folder = time.perf_counter(), work / f"{name}-{method}"
            means = {"bits_per_weight": bits_of(theirs), "candidates": CANDIDATES}
            chosen = KQuants.model_validate({"type": name.lower()} if method == OURS else means)
            MODEL_PASSES["k-quants"](source, folder, chosen, context)
            save(folder, folder / "file", header, weights="f16", pooling="")
            seconds, ours = time.perf_counter() - start, folder / "file" / "model.gguf"
            if ours.stat().st_size > theirs.stat().st_size:
                raise RuntimeError(f"{name}: ours has {ours.stat().st_size} bytes, llama.cpp's {theirs.stat().st_size}")
            yield name, method, judged(ours, folder / "read", seconds, texts, options.device)


@torch.inference_mode()
def mean_squares(source: Path, ids: Tensor, device: str) -> dict[str, NDArray[np.float32]]:
    """Weight → the mean square of its linear layer's inputs, by input. ids [samples, length]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, 1).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            layer.register_forward_pre_hook(watch(f"{name}.weight"))
    for batch in ids.split(4):
        model.model(batch.to(device))
    return {name: (total / ids.numel()).cpu().numpy() for name, total in sums.items()}


def quantize(plain: Path, target: Path, kind: int, importance: Mapping[str, NDArray[np.float32]]) -> None:
    """Run llama.cpp's quantizer with an importance matrix."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last is empty
    names = [name.encode() for name in importance]
    for entry, name, values in zip(entries, names, importance.values(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = int(kind), torch.get_num_threads(), entries
    status = llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama.cpp's quantizer failed with status {status}")


def bits_of(file: Path) -> float:
    """The mean bits of a matrix's weight."""
    matrices = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    return 8 * sum(int(tensor.n_bytes) for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)


def judged(file: Path, folder: Path, seconds: float, texts: Texts, device: str) -> Made:
    """Read a file back, and compare it with the float model."""
    folder.mkdir()
    GgufSource(file).write(folder)
    _, divergence = compare(folder, texts, device)
    return Made(file.stat().st_size / 1e6, divergence, seconds)


def figures_of(name: str, made: Mapping[tuple[str, str], list[Made]]) -> list[Figure]:
    figures = []
    for method in METHODS:
        files, row = made.get((name, method), []), f"files/{name}, {method}"
        if not files:
            continue
        figures.append(Figure(f"{row}/size", round(statistics.mean(file.megabytes for file in files), 2), "MB"))
        for at, domain in enumerate(DOMAINS):
            values = [file.divergence[at] for file in files]
            spread = (min(values), max(values)) if len(values) > 1 else None
            figures.append(Figure(f"{row}/{domain}", round(statistics.mean(values), 5), "nats", spread))
            if method != PEER and (name, PEER) in made:
                theirs = statistics.mean(file.divergence[at] for file in made[name, PEER])
                ratio = round(statistics.mean(values) / theirs, 3)
                figures.append(Figure(f"ratios/{name}, {method}, {domain}/value", ratio, bar="<= 0.9"))
        figures.append(Figure(f"{row}/seconds", round(statistics.mean(file.seconds for file in files), 1), "s"))
    return figures


if __name__ == "__main__":
    sys.exit(main())

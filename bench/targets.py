"""The gains of the target `cpu-encoder` on encoders, beside quantization by hand, with PASS or MISS for each bar.

    python -m bench.targets [encoder] [encoder-base] [--threads 2] [--rounds 5]

`encoder` is all-MiniLM-L6-v2; `encoder-base` has BERT-base's shape and random weights, so that only its speed is meaningful. By hand
means ONNX Runtime's `quantize_dynamic` and NNCF's `quantize`, as their documentation introduces them. Times of separate processes differ
by more than the bar of 2%, so graphs for OpenVINO are also timed in turns in one process. A form whose package is missing is left out.
"""

import importlib.util
import json
import logging
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.pressing import Form, Timed, folder_mb, form_figures, press, save_float_graphs, time_by_turns, where
from bench.processes import run_python
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.recipes.builtins import get_recipe
from tests.models import minilm_dir

PARTS = ("encoder", "encoder-base")
FLOATS = ("torch fp32", "ONNX Runtime fp32", "OpenVINO fp32")
SHAPE = "1x128"
_RUNNERS = {"onnx": onnx.CONSUMER, "openvino": openvino.CONSUMER}
#: Runs two graphs in OpenVINO in turns. Each is loaded three times, because the memory addresses of its weights change its speed by a
#: percent. Prints the speed of the first graph relative to the second, for each round.
_TURNS = """
import json, sys, time, numpy, openvino
threads, *files = int(sys.argv[1]), *sys.argv[2:]
ids = numpy.random.default_rng(0).integers(1000, 20000, (1, 128))
given = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": 0 * ids}
core, settings = openvino.Core(), {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
def load(file):
    model = core.compile_model(file, "CPU", settings)
    names = {name for port in model.inputs for name in port.names}
    return model.create_infer_request(), {name: value for name, value in given.items() if name in names}
def wait(request, feeds):
    request.infer(feeds)
    waits = []
    for _ in range(5):
        start = time.perf_counter()
        request.infer(feeds)
        waits.append(time.perf_counter() - start)
    return numpy.median(waits)
copies = [[load(file) for file in files] for _ in range(3)]
ratios = []
for turn in range(300):
    pair, ahead = copies[turn % 3], turn // 3 % 2
    waits = {at: wait(*pair[at]) for at in (ahead, 1 - ahead)}
    ratios.append(waits[1] / waits[0])
print(json.dumps(ratios))
"""


def main() -> int:
    parser = make_parser("targets", __doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="all, if none is named")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: list[Figure] = []
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
            figures += measure(part, Path(folder), options.threads, options.rounds)
    return finish("targets", figures, parser, options, choices=("parts",))


def measure(part: str, folder: Path, threads: int, rounds: int) -> list[Figure]:
    source = minilm_dir(folder) if part == "encoder" else random_bert_base(folder)
    group = part + where()
    forms, timed, faster = compare(folder, source, threads, rounds)
    ours = max(
        (name for name in forms if name.startswith("ours")), key=lambda name: timed.speedup(name, FLOATS[:1], SHAPE)
    )
    bars = [
        _bar(
            group,
            "times as fast as eager torch in fp32",
            timed.speedup(ours, FLOATS[:1], SHAPE),
            ">= 2.5" if part == "encoder" else ">= 4",
        )
    ]
    if part == "encoder":
        share = folder_mb(forms[ours].folder) / folder_mb(source)
        bars.append(_bar(group, "cosine of its embeddings", timed.cosines[ours], ">= 0.997"))
        bars.append(_bar(group, "share of the source's size", share, "<= 0.27"))
    # Forms by hand whose cosine is more than 2% lower are not comparable.
    for name in forms:
        if name.startswith("by hand") and timed.cosines[name] >= 0.98 * timed.cosines[ours]:
            speed = faster.get((ours, name)) or timed.speedup(ours, (name,), SHAPE)
            bars.append(_bar(group, f"speed, {ours} beside {name}", speed, ">= 0.98"))
            cosine = timed.cosines[ours] / timed.cosines[name]
            bars.append(_bar(group, f"cosine, {ours} beside {name}", cosine, ">= 0.98"))
    return [*form_figures(group, forms, timed, FLOATS), *bars]


def _bar(group: str, what: str, value: float, bar: str) -> Figure:
    return Figure(f"{group} bars/{what}/value", round(value, 4), bar=bar)


def random_bert_base(folder: Path) -> Path:
    """A model with BERT-base's shape, random weights and MiniLM's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    source = minilm_dir(folder).rename(folder / "bert-base-shape")
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(source)
    return source


def compare(
    folder: Path, source: Path, threads: int, rounds: int
) -> tuple[dict[str, Form], Timed, dict[tuple[str, str], float]]:
    """Make and time all forms.

    Returns the forms, their times, and the relative speed of ours for pairs of OpenVINO graphs (ours, by hand) that ran in turns in one
    process.
    """
    recipe, job = get_recipe("cpu-encoder"), folder / "job"
    press(job, source, recipe, threads)
    floats = folder / "onnx-fp32", folder / "openvino-fp32"
    trial, _, _ = save_float_graphs(source, recipe, threads, job / "work", *floats)
    forms = {
        "torch fp32": Form(safetensors.CONSUMER, source),
        "ONNX Runtime fp32": Form(onnx.CONSUMER, floats[0]),
        "OpenVINO fp32": Form(openvino.CONSUMER, floats[1]),
        **{
            f"ours: cpu-encoder, {export.name}": Form(_RUNNERS[export.format], job / "out" / export.name)
            for export in recipe.exports
        },
        "by hand: quantize_dynamic": Form(onnx.CONSUMER, _quantize_dynamic(floats[0], folder / "by-hand")),
    }
    if importlib.util.find_spec("nncf"):
        quantized = _nncf(floats[1], folder / "nncf", trial.task.sets[1].sequences)
        forms["by hand: OpenVINO + NNCF"] = Form(openvino.CONSUMER, quantized)
    timed = time_by_turns(forms, trial, rounds, folder / "scratch")
    graphs = {name: form.folder for name, form in forms.items() if form.runner == openvino.CONSUMER}
    pairs = [
        (ours, hand) for ours in graphs if ours.startswith("ours") for hand in graphs if hand.startswith("by hand")
    ]
    return forms, timed, {(ours, hand): _by_turns(graphs[ours], graphs[hand], threads) for ours, hand in pairs}


def _by_turns(ours: Path, theirs: Path, threads: int) -> float:
    """The speed of our graph relative to their graph."""
    files = [str(folder / openvino.GRAPH_FILE) for folder in (ours, theirs)]
    return float(statistics.median(json.loads(run_python("-c", _TURNS, str(threads), *files))))


def _quantize_dynamic(floats: Path, target: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(floats, target)
    logging.disable(logging.WARNING)  # it advises to optimise the graph first, which the exporter has done
    quantize_dynamic(floats / onnx.GRAPH_FILE, target / onnx.GRAPH_FILE, weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    return target


def _nncf(floats: Path, target: Path, sequences: Any) -> Path:
    """Post-training quantization as NNCF's documentation shows it for transformers, on texts like those of the evaluation."""
    import nncf
    import openvino as library

    model = library.Core().read_model(floats / openvino.GRAPH_FILE)
    names = {name for port in model.inputs for name in port.names}
    rows = [
        {"input_ids": ids[None], "attention_mask": mask[None]}
        | ({"token_type_ids": 0 * ids[None]} if "token_type_ids" in names else {})
        for ids, mask in zip(sequences.ids[:32], sequences.mask[:32], strict=True)
    ]
    quantized = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)
    shutil.copytree(floats, target)
    library.save_model(quantized, str(target / openvino.GRAPH_FILE), compress_to_fp16=False)
    return target


if __name__ == "__main__":
    sys.exit(main())

"""Static int8: ranges that cover the calibration's activations, a graph that runtimes compute in int8, and layers left in float.

As many layers stay in float as the accuracy budget needs.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from nightpress.core.compress.data.tokenized import builtin_digest
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export.openvino_graph import divide_in_norms
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.graph.attention_scores import Operand, Scores, score_products
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.static_int8 import _Order, _reaching, static_int8
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from nightpress.core.recipes.plan import make_plan
from tests.headers import encoder
from tests.models import bert_tiny_dir
from tests.press import graph_bytes, lay_out, press, share_traces

RECIPE = {
    "passes": [{"pass": "static-int8"}],
    "exports": ["onnx", "openvino"],
    "calibration": {"samples": 16, "length": 48},
    "evaluate": [{"metric": "auto", "samples": 8, "length": 48}],
}


class Made(NamedTuple):
    """A quantized graph."""

    model: onnx.ModelProto
    record: PassRecord
    file: Path
    steps: int  #: how often its progress was told


class Bench:
    """BERT-tiny traced once."""

    def __init__(self, folder: Path) -> None:
        self.model = bert_tiny_dir(folder)
        header = inspect_model(FolderFiles(self.model))
        trial = quality.prepare(parse_recipe({"name": "t", **RECIPE}), header, self.model, {}, threads=1)
        work = share_traces(folder / "work")
        self.context = PassContext(header=header, work_dir=work, calibration=Calibration(samples=16, length=48))
        self.traced = tracing.trace(self.model, header, trial.task.sets[0].sequences, self.context)

        self._folder = folder
        self._made: dict[str, Made] = {}

    def made(self, **options: object) -> Made:
        """The graph with these options. Tests share it, and change nothing of it."""
        key = StaticInt8.model_validate(options).model_dump_json()
        if key not in self._made:
            work, told = self._folder / f"made-{len(self._made)}", list[str]()
            model, record = self.quantize(work, lambda _done, text: told.append(text), **options)
            (file,) = work.glob("static/*/model.onnx")
            self._made[key] = Made(model, record, file, len(told))
        return self._made[key]

    def quantize(
        self, work: Path, progress: Callable[[float, str], None] = lambda _done, _text: None, **options: object
    ) -> tuple[onnx.ModelProto, PassRecord]:
        context = replace(self.context, work_dir=work, progress=progress)
        traced, record = static_int8(self.model, self.traced, StaticInt8.model_validate(options), context)
        return onnx.load(traced.path), record


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    return Bench(tmp_path_factory.mktemp("bench"))


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Name → the int8 weights of a product."""
    found = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
    return {
        node.input[0]: found[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in found
    }


@pytest.mark.parametrize(("bits", "top"), [(7, 64), (8, 127)])
@pytest.mark.slow
def test_codes_stay_within_what_the_processor_can_sum(bench: Bench, bits: int, top: int):
    model, record, *_ = bench.made(weight_bits=bits)
    weights = _weights(model)
    assert len(weights) == record.summary["matrices"]
    assert all(codes.dtype == np.int8 and np.abs(codes).max() == top for codes in weights.values())
    assert record.summary["weight_bits"] == bits
    assert record.summary["cosine_held_apart"] >= 0.995


@pytest.mark.slow
def test_the_runtime_multiplies_in_int8(bench: Bench, tmp_path: Path):
    _, record, written, _ = bench.made()
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    settings.log_severity_level = 3
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(written, settings, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert record.summary["attention_scores"] == 2  # one a layer
    assert kinds.count("MatMulIntegerToFloat") == record.summary["matrices"] + record.summary["attention_scores"]


@pytest.mark.slow
def test_queries_and_keys_are_rounded_before_they_are_split_into_heads(bench: Bench):
    scales = {}
    for bits, top in ((7, 64), (8, 127)):
        model = bench.made(weight_bits=bits).model
        made_by = {out: node for node in model.graph.node for out in node.output}
        constants = {
            initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer
        }
        rounding = [node for node in model.graph.node if node.name.endswith(("_query_quantize", "_key_quantize"))]
        assert len(rounding) == 4  # two layers
        for node in rounding:
            linear = next(made_by[name] for name in made_by[node.input[0]].input if name in made_by)
            kind = linear.name.rpartition(".")[2]
            assert node.name.endswith(f"_{kind}_quantize")
            assert constants[node.input[2]] == np.int8(0)
            scales[node.name, bits] = kind, float(constants[node.input[1]]) * (top if kind == "key" else 127)
    # Keys are limited, like weights, to values that the processor can sum without overflow: fewer steps over the same range.
    for (name, _), found in scales.items():
        assert found == (scales[name, 8][0], pytest.approx(scales[name, 8][1]))


@pytest.mark.slow
def test_scores_that_are_ignored_stay_in_float(bench: Bench, tmp_path: Path):
    model, record = bench.quantize(tmp_path, ignore=["bert.encoder.layer.0.attention.self.matmul"])
    assert record.summary["attention_scores"] == 1
    assert len([node for node in model.graph.node if node.name.endswith(("_query_quantize", "_key_quantize"))]) == 2


@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_what_something_else_reads_too_is_rounded_for_the_scores_alone(read_elsewhere: bool):
    node = onnx.helper.make_node
    nodes = [
        node("Add", ["x", "b"], ["q"], "add"),
        node("Transpose", ["q"], ["turned"], "turn"),
        node("Relu", ["x"], ["k"], "relu"),
        node("MatMul", ["turned", "k"], ["scores"], "product"),
        node("Mul", ["scores", "s"], ["scaled"], "scale"),
        node("Softmax", ["scaled"], ["weights"], "softmax"),
        node("MatMul", ["weights", "k"], ["out"], "values"),
    ]
    if read_elsewhere:
        nodes.append(node("Identity", ["turned"], ["kept"], "keep"))
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    query = Operand("turned", "product") if read_elsewhere else Operand("q", "turn")
    assert score_products(graph) == {"product": Scores(query, Operand("k", "product"))}


@pytest.mark.slow
def test_openvino_divides_in_its_norms_and_answers_as_before(bench: Bench):
    written = bench.made(min_cosine=None).file
    core = openvino.Core()
    ids = np.random.default_rng(0).integers(1000, 2000, (2, 16))
    answers, divisions = [], []
    for changed in (False, True):
        model = core.read_model(written)
        if changed:
            assert divide_in_norms(model) == 6  # two per layer, and two of the head
        divisions.append(
            sum(
                get_op.get_type_name() == "Multiply" and get_op.get_friendly_name().endswith("_smoothing")
                for get_op in model.get_ops()
            )
        )
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = {name for port in compiled.inputs for name in port.names}
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        answers.append(compiled({name: feed for name, feed in feeds.items() if name in names})[0])
    assert divisions[0] - divisions[1] == 6
    # A code may round differently.
    assert np.abs(answers[0] - answers[1]).max() < 0.02 * np.abs(answers[0]).max()


@pytest.mark.parametrize("ranges", ["min-max", "percentile", "entropy"])
@pytest.mark.slow
def test_every_way_to_find_ranges_gives_a_graph_that_answers_alike(bench: Bench, ranges: str):
    record = bench.made(ranges=ranges, min_cosine=None).record
    assert record.summary["ranges"] == ranges
    assert record.summary["left_in_float"] == []
    assert record.summary["cosine_held_apart"] > 0.9


@pytest.mark.slow
def test_the_same_bytes_come_out_again_and_are_found_again(bench: Bench, tmp_path: Path):
    first = bench.made().model
    again, record = bench.quantize(tmp_path / "b")
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    (written,) = (tmp_path / "b").glob("static/*/model.onnx")
    stamp = written.stat().st_mtime_ns
    assert bench.quantize(tmp_path / "b")[1] == record
    assert written.stat().st_mtime_ns == stamp


def _budget(bench: Bench) -> float:
    """A cosine that some layers in float reach. Embedding tables are always in int8, so not every budget can be reached."""
    reached = [bench.made(min_cosine=cosine).record.summary["cosine_held_apart"] for cosine in (None, 0.9999999)]
    return float(sum(reached) / 2)


@pytest.mark.slow
def test_broken_off_and_begun_again_it_ends_with_the_same_bytes(bench: Bench, tmp_path: Path):
    budget = _budget(bench)
    whole, record, _, steps = bench.made(min_cosine=budget)
    assert record.summary["left_in_float"]
    for at in (steps // 2, steps - 1):
        left = iter(range(at))

        def dying(_done: float, _text: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        work = tmp_path / f"killed-{at}"
        with pytest.raises(KeyboardInterrupt):
            bench.quantize(work, dying, min_cosine=budget)
        assert not list(work.glob("static/*/record.json"))
        again, resumed = bench.quantize(work, min_cosine=budget)
        assert again.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)
        assert resumed.summary == record.summary


@pytest.mark.slow
def test_layers_that_cost_most_stay_in_float_until_the_budget_holds(bench: Bench):
    free = bench.made(min_cosine=None).record
    budget = _budget(bench)
    model, record, *_ = bench.made(min_cosine=budget)
    left = record.summary["left_in_float"]
    assert left
    assert record.summary["cosine_held_apart"] >= budget
    assert record.summary["matrices"] == free.summary["matrices"] - len(left)
    inputs = {node.name: node.input for node in model.graph.node if node.op_type == "MatMul"}
    assert all(not inputs[name][0].endswith("_seen") for name in left)
    # Their weights are in int8 nevertheless, and the report gives the error of that.
    floats = {
        initializer.name for initializer in model.graph.initializer if initializer.data_type == onnx.TensorProto.FLOAT
    }
    assert not floats & {inputs[name][1] for name in left}
    assert set(left) <= {layer.name for layer in record.layers}


@pytest.mark.slow
def test_where_no_number_of_layers_holds_the_budget_half_stay_in_float_and_the_record_says_so(
    bench: Bench,
):
    free = bench.made(min_cosine=None).record
    model, record, *_ = bench.made(min_cosine=0.9999999)
    layers = free.summary["matrices"] + free.summary["attention_scores"]
    assert len(record.summary["left_in_float"]) == layers // 2
    assert record.summary["min_cosine_held"] is False
    assert free.summary["cosine_held_apart"] < record.summary["cosine_held_apart"] < 0.9999999
    assert model.ByteSize() < bench.traced.path.stat().st_size / 2


class Additive:
    """A score of graphs whose loss is the sum of their layers' losses, as is nearly true of real graphs. Counts its calls."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses, self.asked = losses, 0

    def __call__(self, left: Collection[str], _texts: int | None = None) -> float:
        self.asked += 1
        return 1 - sum(loss for name, loss in self.losses.items() if name not in left)


@pytest.mark.parametrize("blocks", [6, 96])
@pytest.mark.slow
def test_the_search_finds_the_fewest_layers_by_a_logarithm_of_graphs(bench: Bench, blocks: int):
    kinds = {"query": 1e-6, "up": 1e-4, "down": 3e-4}
    losses = {f"layer.{at}.{kind}": loss * (1 + at / blocks) for at in range(blocks) for kind, loss in kinds.items()}
    score = Additive(losses)
    # Among layers of one kind, costs are proportional to losses. Between kinds, they can't be compared.
    costs = {name: loss * {"query": 1e3, "up": 1, "down": 1e-2}[name.split(".")[-1]] for name, loss in losses.items()}
    least = 1 - sum(losses.values()) / 2
    order = _Order(costs, dict.fromkeys(costs, 1), score, 2, bench.context)
    left, cosine = _reaching(least, order, score, bench.context)
    worst = sorted(losses, key=lambda name: -losses[name])
    assert left == frozenset(worst[: len(left)])
    assert cosine >= least > 1 - sum(losses[name] for name in worst[len(left) - 1 :])
    assert score.asked <= 2 + len(kinds) + 1 + math.ceil(math.log2(len(losses)))


def test_layers_go_back_to_float_by_what_they_cost_for_the_time_that_int8_saves():
    losses = {"layer.0.up": 4e-4, "layer.0.query": 3e-4}
    context = PassContext(header=encoder(64, 4, 1), work_dir=Path())
    for work, first in (
        ({"layer.0.up": 4, "layer.0.query": 1}, "layer.0.query"),
        (dict.fromkeys(losses, 1), "layer.0.up"),
    ):
        order = _Order(losses, work, Additive(losses), 1, context)
        assert not order.gained  # nothing is measured before the order is needed
        assert order.first(0) == frozenset()
        assert order.first(1) == {first}
        assert set(order.gained) == {"layer.#.up", "layer.#.query"}


@pytest.mark.slow
def test_what_is_rounded_without_vnni_does_not_overflow_without_it(bench: Bench, tmp_path: Path):
    """OpenVINO follows ONEDNN_MAX_CPU_ISA. Without VNNI it sums in 16 bits, which overflow if weights are too large."""
    written = bench.made(weight_bits=7, min_cosine=None).file
    program = (
        "import sys, numpy, openvino\n"
        "ids = numpy.random.default_rng(0).integers(1000, 2000, (2, 16))\n"
        "compiled = openvino.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "names = {name for port in compiled.inputs for name in port.names}\n"
        "feeds = {'input_ids': ids, 'attention_mask': numpy.ones_like(ids), 'token_type_ids': numpy.zeros_like(ids)}\n"
        "numpy.save(sys.argv[2], compiled({name: one for name, one in feeds.items() if name in names})[0])\n"
    )
    answers = []
    for isa in ("DEFAULT", "AVX2"):
        target = tmp_path / f"{isa}.npy"
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
        subprocess.run([sys.executable, "-c", program, str(written), str(target)], check=True, env=environment)
        answers.append(np.load(target).astype(np.float64).ravel())
    first, second = answers
    assert first @ second / (np.linalg.norm(first) * np.linalg.norm(second)) > 0.9999


@pytest.mark.slow
def test_ignored_layers_stay_in_float_and_nothing_left_is_refused(bench: Bench, tmp_path: Path):
    _, record = bench.quantize(tmp_path, ignore=["re:.*query", "bert.embeddings.*"])
    names = {layer.name for layer in record.layers}
    assert "bert.encoder.layer.0.attention.self.key" in names
    assert not [name for name in names if "query" in name or "embeddings" in name]
    with pytest.raises(NightpressError) as caught:
        bench.quantize(tmp_path, ignore=["*"])
    assert caught.value.code == ErrorCode.INVALID_RECIPE


@pytest.mark.slow
def test_both_runtimes_load_it_and_answer_as_the_model_does_at_the_size_that_was_planned(bench: Bench, tmp_path: Path):
    _, report, _ = press(lay_out(tmp_path / "job", bert_tiny_dir(), RECIPE))
    estimate = make_plan(parse_recipe({"name": "t", **RECIPE}), bench.context.header).estimate
    assert estimate is not None
    assert {artifact.name for artifact in report.artifacts} == {"onnx", "openvino"}
    for artifact in report.artifacts:
        assert artifact.verification is not None
        assert artifact.verification.value > 0.98
        written = graph_bytes(tmp_path / "job" / "out" / artifact.name)
        assert written == pytest.approx(estimate.output_bytes[artifact.name], rel=0.02)
    (record,) = report.passes
    assert record.index == 0
    text = {item.purpose: item for item in report.data}
    assert (text["calibration"].ref, text["calibration"].license) == ("builtin:prose", "public domain")
    assert text["calibration"].sha256 == builtin_digest("builtin:prose", "calibration")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exports": ["safetensors"]}, "can't carry"),
        ({"device": "gpu"}, "CPU only"),
        ({"passes": [{"pass": "static-int8"}, {"pass": "dynamic-int8"}]}, "nothing can follow"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(change: dict[str, object], reason: str):
    with pytest.raises(NightpressError, match=reason) as caught:
        make_plan(parse_recipe({"name": "t", **RECIPE, **change}))
    assert caught.value.code == ErrorCode.INVALID_RECIPE


@pytest.mark.slow
def test_a_decoder_is_refused(bench: Bench):
    recipe = parse_recipe({"name": "t", **RECIPE})
    decoder = bench.context.header.model_copy(update={"model_type": "llama", "architecture": "LlamaForCausalLM"})
    with pytest.raises(NightpressError, match="no language model alone"):
        make_plan(recipe, decoder)

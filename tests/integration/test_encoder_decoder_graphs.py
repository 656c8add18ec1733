"""Encoder-decoders as graphs: an encoder and a decoder with a cache, which runtimes run as transformers runs the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.export import onnx as to_onnx
from nightpress.core.compress.export import openvino as to_openvino
from nightpress.core.compress.graph.modules import EncoderDecoder
from nightpress.core.compress.graph.tracing import Traced, trace
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.usage import run_usage
from tests.zoo.models import save_tiny

IDS = np.random.default_rng(0).integers(5, 40, (2, 12))
MASK = np.where(np.arange(12) < [[12], [7]], 1, 0)
READ = np.random.default_rng(1).integers(5, 40, (2, 6))


class Exported:
    """A tiny BART, traced and exported in float."""

    def __init__(self, folder: Path) -> None:
        self.source = save_tiny("bart", "BartForConditionalGeneration", folder / "source")
        self.header = inspect_model(FolderFiles(self.source))
        self.work = folder
        (folder / "work").mkdir()
        self.context = PassContext(
            header=self.header, work_dir=folder / "work", calibration=Calibration(samples=8, length=32)
        )
        self.traced: Traced = trace(self.source, self.header, Sequences(IDS, MASK, decoder=READ), self.context)
        to_onnx.save(self.source, folder / "onnx", self.traced, [])
        to_openvino.save(self.source, folder / "openvino", self.traced, [])

    def expected(self) -> np.ndarray:
        """The logits [B, T, V] that transformers gives for the texts."""
        model = AutoModelForSeq2SeqLM.from_pretrained(self.source, dtype=torch.float32).eval()
        ids, mask, read = (torch.from_numpy(part) for part in (IDS, MASK, READ))
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask, decoder_input_ids=read).logits.numpy()


def test_a_decoder_that_takes_no_tuple_is_divided_from_its_encoder(tmp_path: Path):
    source = save_tiny("t5gemma", "T5GemmaForConditionalGeneration", tmp_path / "source")
    header = inspect_model(FolderFiles(source))
    whole = EncoderDecoder(load_model(source, header, attention="eager").eval(), header)
    _, signature = whole.parts(header, Sequences(IDS, MASK, decoder=READ))["decoder_model_merged"]
    assert signature.inputs[:3] == ("input_ids", "encoder_attention_mask", "encoder_hidden_states")
    assert "past_key_values.1.encoder.value" in signature.inputs


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("bart"))


def _in_onnxruntime(folder: Path) -> np.ndarray:
    """The logits of each token by a step of its own, as optimum and transformers.js feed the graphs: empty caches first, then those returned."""
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged")
    )
    hidden = encoder.run(None, {"input_ids": IDS, "attention_mask": MASK})[0]
    feeds: dict[str, Any] = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in decoder.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    kept = {value.name: at for at, value in enumerate(decoder.get_outputs())}
    found = []
    for at in range(READ.shape[1]):
        step = {"input_ids": READ[:, at : at + 1], "encoder_hidden_states": hidden, "encoder_attention_mask": MASK}
        out = decoder.run(None, feeds | step)
        found.append(out[0])
        feeds = {name: out[kept[name.replace("past_key_values", "present")]] for name in feeds}
    return np.concatenate(found, axis=1)


@pytest.mark.slow
def test_a_decoders_graph_writes_token_by_token_what_the_model_says_of_the_whole(bart: Exported):
    np.testing.assert_allclose(_in_onnxruntime(bart.work / "onnx"), bart.expected(), atol=1e-4)


@pytest.mark.slow
def test_the_decoders_weights_lie_in_one_graph_once(bart: Exported):
    graph = onnx.load(bart.work / "onnx" / "decoder_model_merged.onnx").graph
    weights = [tensor.name for tensor in graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == len(set(weights))
    products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert sum("encoder_attn.k_proj" in name for name in products) == 2  # one for each block
    assert not any(node.op_type == "If" for node in graph.node)


@pytest.mark.slow
def test_openvino_keeps_both_caches_and_forgets_them_at_a_reset(bart: Exported):
    core, plain = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    folder = bart.work / "openvino"
    encoder, decoder = (
        core.compile_model(folder / f"openvino_{part}_model.xml", "CPU", plain) for part in ("encoder", "decoder")
    )
    assert {port.get_any_name() for port in decoder.inputs} == {
        "input_ids",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "beam_idx",
    }
    request = decoder.create_infer_request()
    for rows in (np.array([1, 0]), np.array([0, 1])):  # the second text must not be read with the first one's caches
        hidden = encoder({"input_ids": IDS[rows], "attention_mask": MASK[rows]})[0]
        request.reset_state()
        found = []
        for at in range(READ.shape[1]):
            feeds = {"input_ids": READ[rows, at : at + 1], "encoder_attention_mask": MASK[rows]}
            feeds |= {"encoder_hidden_states": hidden, "beam_idx": np.arange(2, dtype=np.int32)}
            found.append(np.array(request.infer(feeds)[0]))
        np.testing.assert_allclose(np.concatenate(found, axis=1), bart.expected()[rows], atol=1e-4)


@pytest.mark.slow
def test_static_int8_rounds_both_graphs_and_leaves_in_float_what_costs_most(bart: Exported):
    traced, record = static_int8(bart.source, bart.traced, StaticInt8(min_cosine=0.99), bart.context)
    for graph in traced.graphs.values():
        assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(graph).graph.node) > 4
    assert record.summary["cosine_held_apart"] >= 0.99
    layers = {layer.name for layer in record.layers}
    assert {"model.encoder.layers.0.fc1", "model.decoder.layers.1.encoder_attn.k_proj", "lm_head"} <= layers
    # What rounding all layers reaches is the least that is asked: a little more, and some of them must stay in float.
    free, reached = StaticInt8(min_cosine=None), record.summary["cosine_held_apart"]
    if not record.summary["left_in_float"]:
        stricter = StaticInt8(min_cosine=reached + (1 - reached) / 4)
        _, record = static_int8(bart.source, bart.traced, stricter, bart.context)
    assert record.summary["left_in_float"]
    _, whole = static_int8(bart.source, bart.traced, free, bart.context)
    assert whole.summary["cosine_held_apart"] < record.summary["cosine_held_apart"]
    assert whole.summary["left_in_float"] == []


@pytest.mark.slow
def test_a_whole_job_measures_what_an_encoder_decoder_writes(tmp_path: Path):
    one_block = {"num_layers": 1, "num_decoder_layers": 1}
    source = save_tiny("t5", "T5ForConditionalGeneration", tmp_path / "source", **one_block)
    config = source / "tokenizer_config.json"  # its tokenizer is of no kind that T5's own class reads
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    recipe = {
        "passes": [{"pass": "dynamic-int8"}],
        "exports": ["openvino"],
        "evaluate": [
            {"metric": "auto", "samples": 8, "length": 32},
            {"metric": "generation", "samples": 4, "length": 24, "new_tokens": 6},
            {"metric": "generation-speed", "batch": 1, "prompt": 16, "tokens": 4, "repeats": 3},
        ],
    }
    job = lay_out(tmp_path / "job", source, recipe)
    _, report, _ = press(job)
    for artifact in report.artifacts:
        assert artifact.verification is not None
        assert artifact.verification.value > 0.99
        found = {figure.name: figure.value for figure in artifact.measurements}
        assert found["centred_cosine"] > 0.99
        assert found["prefix_match"] > 0.8
        assert found["generation_match"] >= 0.5
        (speed,) = artifact.generation
        assert speed.decode_tokens_per_s > 0
        assert speed.decode_speedup is not None
        assert run_usage(artifact, job / "out").endswith("\n")


def test_a_page_gets_no_encoder_decoder(tmp_path: Path):
    header = inspect_model(FolderFiles(save_tiny("t5", "T5ForConditionalGeneration", tmp_path / "source")))
    with pytest.raises(NightpressError, match="in a single graph"):
        make_plan(parse_recipe({"name": "r", "passes": [], "exports": ["transformers.js"]}), header)
    plan = make_plan(parse_recipe({"name": "r", "passes": [{"pass": "dynamic-int8"}], "exports": ["onnx"]}), header)
    assert plan.estimate is not None

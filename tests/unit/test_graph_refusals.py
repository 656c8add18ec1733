"""Plans refuse graphs of decoders whose cache is not keys and values alone, by the config and the tensors' names."""

from typing import Any

import pytest

from nightpress.core.recipes.exceptions import OTHER_STATES
from nightpress.core.recipes.graphs import why_no_graph
from nightpress.core.recipes.header import ModelHeader, TensorInfo


def _header(model_type: str, architecture: str, *tensors: str, **config: Any) -> ModelHeader:
    found = tuple(TensorInfo(name=name, dtype="F32", shape=(4, 1, 4), size=64) for name in tensors)
    return ModelHeader(
        model_type=model_type, architecture=architecture, config=config, tensors=found, has_tokenizer=True
    )


@pytest.mark.parametrize(
    "header",
    [
        _header("mamba", "MambaForCausalLM", "backbone.layers.0.mixer.conv1d.weight"),
        _header("recurrent_gemma", "RecurrentGemmaForCausalLM", "model.layers.0.temporal_block.conv_1d.weight"),
        _header("kimi_linear", "KimiLinearForCausalLM", "model.layers.0.self_attn.k_conv1d.weight"),
        _header("lfm2", "Lfm2ForCausalLM", "model.layers.0.conv.conv.weight"),
        _header("minimax", "MiniMaxForCausalLM", layer_types=["linear_attention", "full_attention"]),
        _header("glm_moe_dsa", "GlmMoeDsaForCausalLM", layer_types=["indexed_attention"]),
    ],
    ids=lambda header: header.model_type,
)
def test_a_decoder_that_caches_a_state_has_no_graph(header: ModelHeader) -> None:
    assert why_no_graph(header) == OTHER_STATES


def test_layers_with_a_window_and_other_weights_do_not_count_as_a_state() -> None:
    kinds = ["sliding_attention", "full_attention", "chunked_attention"]
    names = ("model.layers.0.self_attn.q_proj.weight", "model.convert.weight", "model.layers.0.conv_norm.weight")
    assert why_no_graph(_header("gemma2", "Gemma2ForCausalLM", *names, layer_types=kinds)) is None
    encoder = _header("convbert", "ConvBertForMaskedLM", "convbert.encoder.layer.0.conv1d.weight")
    assert why_no_graph(encoder) is None


def test_an_encoder_with_a_decoders_head_caches_nothing_unless_its_config_says_so() -> None:
    for said in ({}, {"is_decoder": False}):
        assert "is_decoder: true" in (why_no_graph(_header("bert", "BertLMHeadModel", **said)) or "")
    assert "is_decoder: true" in (why_no_graph(_header("bert-generation", "BertGenerationDecoder")) or "")
    assert why_no_graph(_header("bert", "BertLMHeadModel", is_decoder=True)) is None
    assert why_no_graph(_header("gpt_neox", "GPTNeoXForCausalLM", is_decoder=False)) is None

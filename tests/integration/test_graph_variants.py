"""Graphs of a family's config variants: a runtime loads each and gives the model's outputs, or the plan refuses it."""

from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.every_family import save_family
from tests.press import lay_out, press

_BASE = {"rope_theta": 10000.0, "factor": 2.0}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16} | _BASE
#: A variant changes all keys at a time that don't exclude each other: a trace takes ten seconds.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"alibi": True, "multi_query": False}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"} | _BASE}),
    (
        "llama",
        {
            "rope_parameters": {"rope_type": "yarn"} | _BASE,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    ("mistral", {"rope_parameters": {"rope_type": "linear"} | _BASE, "sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        "phi",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25} | _BASE, "qk_layernorm": True},
    ),
    (
        "phi3",
        {
            "rope_parameters": _LONG | {"original_max_position_embeddings": 16},
            "max_position_embeddings": 32,
            "sliding_window": 4,
        },
    ),
    ("gemma2", {"sliding_window": 4}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 64}),
    ("modernbert", {"local_attention": 4}),
]
#: Their blocks differ by turns: one attends to all tokens, the next to its neighbours.
_ALTERNATING = {"gemma2", "modernbert", "qwen2"}


def _recipe(*exports: str) -> dict[str, Any]:
    return {"passes": [], "exports": list(exports), "evaluate": []}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_a_variant_loads_and_answers_alike_or_is_refused_when_planned(
    family: str, changes: dict[str, Any], tmp_path: Path
):
    """One job exports to both runtimes and verifies them, so the trace and the source's outputs are made once."""
    blocks = "n_layer" if family == "gpt_bigcode" else "num_hidden_layers"
    folder = save_family(family, tmp_path / "model", **{blocks: 2 if family in _ALTERNATING else 1} | changes)
    exports = [export for export in ("onnx", "openvino") if _refused(folder, export) is None]
    if exports:
        _, report, _ = press(lay_out(tmp_path / "job", folder, _recipe(*exports)))
        assert [artifact.format for artifact in report.artifacts] == exports
        assert all(artifact.verification is not None for artifact in report.artifacts)


def _refused(folder: Path, export: str) -> NightpressError | None:
    try:
        make_plan(parse_recipe({"name": "r", **_recipe(export)}), inspect_model(FolderFiles(folder)))
    except NightpressError as error:
        return error
    return None


@pytest.mark.parametrize("export", ["onnx", "transformers.js"])
def test_a_falcon_with_alibi_is_refused_for_onnx_runtime(export: str, tmp_path: Path):
    folder = save_family("falcon", tmp_path / "model", alibi=True)
    refused = _refused(folder, export)
    assert refused is not None
    assert refused.code == ErrorCode.INVALID_RECIPE
    assert "alibi" in refused.message
    assert "openvino" in refused.hint
    assert _refused(save_family("falcon", tmp_path / "other"), export) is None

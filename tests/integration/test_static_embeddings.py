"""Embedders in other forms: a table of token vectors, and vectors that are truncated or stored in fewer bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.evaluate.neighbours import stored_similarities
from nightpress.core.compress.solvers.components import principal_components, zipf_weights
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import Measurement, Report
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.sentence import EmbedderUse
from tests.press import lay_out, press
from tests.training import embedder

TEXTS = ["a cat sat on the mat", "stocks fell in London today", "the garden lamp", "snow and ice on a winter road"]
EVALUATE = [
    {"metric": "neighbours", "samples": 40, "length": 32, "dimensions": [8], "types": ["float32", "int8", "binary"]}
]


@pytest.fixture(scope="module")
def source(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder with random weights, and one with a vocabulary of 400 tokens: asking for 30,522 would take long."""
    from tokenizers import Tokenizer

    folder = embedder(bert_tiny, tmp_path_factory.mktemp("embedder") / "model")
    words = {word for text in TEXTS for word in text.lower().split()}
    _shorten(folder, words, Tokenizer.from_file(str(folder / "tokenizer.json")))
    return folder


def _shorten(folder: Path, words: set[str], tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel

    state = json.loads(tokenizer.to_str())
    whole = state["model"]["vocab"]
    special = [token["content"] for token in state["added_tokens"]]
    letters = [token for token in whole if len(token.removeprefix("##")) == 1 and token.isascii()]
    kept = list(dict.fromkeys([*special, "[unused0]", *letters, *sorted(words & whole.keys())]))
    state["model"]["vocab"] = {token: at for at, token in enumerate(kept)}
    for token in state["added_tokens"]:
        token["id"] = kept.index(token["content"])
    for name, entry in state["post_processor"].get("special_tokens", {}).items():
        entry["ids"] = [kept.index(name)]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(kept),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def pressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    recipe = {
        "passes": [{"pass": "static-embeddings", "dimensions": 16}],
        "exports": ["safetensors"],
        "evaluate": [*EVALUATE, {"metric": "latency", "batch": 2, "length": 16, "repeats": 3}],
    }
    job = lay_out(tmp_path_factory.mktemp("press") / "job", source, recipe)
    _, report, _ = press(job)
    return job / "out" / "safetensors", report


def _named(found: tuple[Measurement, ...]) -> dict[tuple[str, str], Measurement]:
    return {(figure.name, figure.of): figure for figure in found}


@pytest.mark.slow
def test_both_libraries_load_the_table_and_agree(source: Path, pressed: tuple[Path, Report]) -> None:
    """A text's vector by hand: the model's vectors of single tokens, their principal components, weighted, summed, normalized."""
    from model2vec import StaticModel
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder, _ = pressed
    ours = StaticModel.from_pretrained(folder).encode(TEXTS)
    np.testing.assert_allclose(SentenceTransformer(str(folder), device="cpu").encode(TEXTS), ours, atol=2e-3)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    model, count = BertModel.from_pretrained(source).eval(), tokenizer.get_vocab_size()
    around = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    with torch.inference_mode():
        ids = torch.tensor([[around[0], token, around[1]] for token in range(count)])
        vectors = model(ids).last_hidden_state.mean(1).double().numpy()
    spoken = [
        at
        for at in range(count)
        if len(tokenizer.id_to_token(at).strip("[]")) < 3 or tokenizer.id_to_token(at)[0] != "["
    ]
    centred = vectors - vectors[spoken].mean(axis=0)
    _, _, directions = np.linalg.svd(centred[spoken], full_matrices=False)
    inverse = 1 / np.arange(2, count + 2)
    weights = 1e-4 / (1e-4 + inverse / inverse.sum())
    rows = [[at for at in tokenizer.encode(text, add_special_tokens=False).ids if at in set(spoken)] for text in TEXTS]
    expected = np.stack([(centred[row] @ directions[:16].T * weights[row, None]).sum(axis=0) for row in rows])
    cosines = (expected @ expected.T) / np.outer(*[np.linalg.norm(expected, axis=1)] * 2)
    np.testing.assert_allclose(ours.astype(float) @ ours.T.astype(float), cosines, atol=5e-3)


@pytest.mark.slow
def test_the_report_says_what_the_table_loses_and_gains(pressed: tuple[Path, Report]) -> None:
    folder, report = pressed
    artifact = report.artifacts[0]
    assert artifact.verification is not None
    assert artifact.verification.consumer.startswith("model2vec ")
    rows, width = 16, json.loads((folder / "config.json").read_bytes())["hidden_dim"]
    assert width == rows
    assert artifact.parameters == report.passes[0].summary["tokens"] * width
    figures, theirs = _named(artifact.measurements), _named(report.source.measurements)
    assert theirs["neighbour_recall", "float32"].value == 1
    assert 0 < figures["neighbour_recall", "float32"].value < 1
    assert ("rank_correlation", "") in figures
    assert ("cosine", "") not in figures, "vectors of different widths have no cosine"
    assert artifact.timings[0].speedup is not None
    assert artifact.timings[0].speedup.value > 2
    assert "StaticModel" in artifact.usage


@pytest.mark.slow
def test_truncated_vectors_are_measured_and_the_folder_says_how_many_are_kept(source: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    recipe = {
        "passes": [{"pass": "truncate-embeddings", "dimensions": 8}],
        "exports": ["safetensors"],
        "evaluate": EVALUATE,
        "gates": {"neighbour_recall": ">= 0.05", "centred_cosine": ">= 0.999"},
    }
    job = lay_out(tmp_path / "job", source, recipe)
    _, report, _ = press(job)
    folder = job / "out" / "safetensors"
    whole, cut = (SentenceTransformer(str(path), device="cpu").encode(TEXTS) for path in (source, folder))
    np.testing.assert_allclose(cut, whole[:, :8], atol=1e-6)
    figures, theirs = _named(report.artifacts[0].measurements), _named(report.source.measurements)
    # What the source loses at 8 dimensions is what the artifact, which always has 8, loses.
    for kind in ("float32", "int8", "binary"):
        lost = theirs["neighbour_recall", f"8 × {kind}"].value
        assert figures["neighbour_recall", kind].value == pytest.approx(lost)
        assert lost < theirs["neighbour_recall", kind].value
    ranked = [theirs["neighbour_recall", kind].value for kind in ("float32", "int8", "binary")]
    assert ranked == sorted(ranked, reverse=True)
    assert report.verdict == "accepted"
    assert inspect_model(FolderFiles(folder)).use.truncate_dim == 8


def test_int8_and_binary_are_stored_as_the_library_stores_them() -> None:
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).standard_normal((50, 16))
    codes = quantize_embeddings(vectors.astype(np.float32), precision="int8").astype(int)
    low, step = vectors.min(axis=0), (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    restored = low + step * (codes + 128)  # the library cuts where we round
    theirs = restored @ restored.T
    assert np.abs(stored_similarities(vectors, "int8", EmbedderUse(similarity="dot")) - theirs).max() < 0.6
    bits = np.unpackbits(quantize_embeddings(vectors.astype(np.float32), precision="ubinary"), axis=1)
    equal = (bits[:, None] == bits[None]).sum(axis=2)
    np.testing.assert_array_equal(stored_similarities(vectors, "binary", EmbedderUse()), 2 * equal - 16)


def test_components_hold_the_variance_and_have_one_sign() -> None:
    vectors = torch.randn(100, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 7)
    found, kept = principal_components(vectors, 6)
    assert kept == pytest.approx(1)
    centred = vectors - vectors.mean(0)
    torch.testing.assert_close(found @ found.T, centred @ centred.T)
    variances = found.var(0)
    assert bool((variances[:-1] >= variances[1:]).all())
    torch.testing.assert_close(principal_components(vectors.flip(0), 6)[0].flip(0), found)


def test_a_frequent_token_weighs_less() -> None:
    found = zipf_weights(3, 0.1).tolist()
    harmonic = 1 / 2 + 1 / 3 + 1 / 4
    assert found == pytest.approx([0.1 / (0.1 + 1 / (rank * harmonic)) for rank in (2, 3, 4)])
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pass": "truncate-embeddings", "dimensions": 32}, "not fewer than the model's 32"),
        ({"pass": "static-embeddings"}, "for embedders of texts"),
    ],
)
@pytest.mark.slow
def test_models_that_have_no_such_form_are_refused(
    options: dict[str, Any], said: str, source: Path, bert_tiny: Path
) -> None:
    recipe = parse_recipe({"name": "t", "passes": [options], "exports": ["safetensors"]})
    with pytest.raises(NightpressError, match=said):
        make_plan(recipe, inspect_model(FolderFiles(source if "dimensions" in options else bert_tiny)))

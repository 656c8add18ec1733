"""Rerankers: pairs are read, calibrated on and measured as the library CrossEncoder scores them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.pairs import pair_rows, read_queries
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.data.tokenized import DataSource, encode_row, open_tokenizer, pad_typed
from nightpress.core.compress.graph import tracing
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import Measurement, Report
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.press import lay_out, press

WORDS = ("lamp", "river", "stone", "window", "garden", "letter", "horse", "winter", "road", "bread")
QUERIES = [
    {
        "query": f"where is the {word}",
        "documents": [f"the {word} and the {other} by the house" for other in WORDS[:5]],
        "labels": [(at + place) % 3 for place in range(5)],
    }
    for at, word in enumerate(WORDS[:8])
]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def cross_encoder(bert_tiny: Path, folder: Path) -> Path:
    """A cross-encoder with random weights, as sentence-transformers saves it. Its type embeddings are large: a model that gets none differs."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.3,
    )
    bare = folder.with_name("bare")
    BertForSequenceClassification(config).save_pretrained(bare)
    AutoTokenizer.from_pretrained(bert_tiny).save_pretrained(bare)
    CrossEncoder(str(bare), device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def source(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cross_encoder(bert_tiny, tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def pressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    recipe = {
        "passes": [{"pass": "wanda", "sparsity": 0.05}],
        "exports": ["safetensors", "onnx"],
        "calibration": {"data": "pairs", "samples": 16, "length": 32},
        "evaluate": [{"metric": "auto", "data": "pairs"}],
        "gates": {"ndcg": ">= 1%", "mrr": ">= 1%", "kendall_tau": ">= -1"},
    }
    job = lay_out(tmp_path_factory.mktemp("press") / "job", source, recipe, {"pairs": _lines(QUERIES)})
    _, report, _ = press(job)
    return job / "out", report


def _figures(found: tuple[Measurement, ...]) -> dict[str, Measurement]:
    return {figure.name: figure for figure in found}


def _rank(scores: np.ndarray, labels: list[int]) -> tuple[float, float]:
    """nDCG@10 and the reciprocal rank of one query, by another way than the library's: from sorted lists."""
    order = sorted(range(len(labels)), key=lambda at: -scores[at])
    gained = sum(labels[at] / np.log2(2 + rank) for rank, at in enumerate(order))
    best = sum(label / np.log2(2 + rank) for rank, label in enumerate(sorted(labels, reverse=True)))
    return gained / best, 1 / (1 + next(rank for rank, at in enumerate(order) if labels[at]))


@pytest.mark.slow
def test_the_source_is_measured_as_its_library_ranks(source: Path, pressed: tuple[Path, Report]) -> None:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(source), device="cpu")
    found = [
        _rank(model.predict([(row["query"], text) for text in row["documents"]]), row["labels"]) for row in QUERIES
    ]
    figures = _figures(pressed[1].source.measurements)
    assert figures["ndcg"].value == pytest.approx(np.mean([gain for gain, _ in found]), abs=1e-6)
    assert figures["mrr"].value == pytest.approx(np.mean([rank for _, rank in found]), abs=1e-6)
    assert figures["ndcg"].n == len(QUERIES)


@pytest.mark.slow
def test_each_artifact_is_compared_with_the_source_query_by_query(pressed: tuple[Path, Report]) -> None:
    for artifact in pressed[1].artifacts:
        figures = _figures(artifact.measurements)
        assert {"ndcg", "mrr", "kendall_tau", "top1_agreement", "rank_correlation", "largest_error"} <= figures.keys()
        assert 0.5 < figures["kendall_tau"].value <= 1
        assert figures["ndcg"].change is not None
    assert {gate.gate.split()[0] for gate in pressed[1].gates} == {"ndcg", "mrr", "kendall_tau"}
    assert all(gate.passed for gate in pressed[1].gates)


@pytest.mark.slow
def test_the_library_loads_the_artifact_and_the_graph_gives_its_scores(
    source: Path, pressed: tuple[Path, Report]
) -> None:
    import onnxruntime
    from sentence_transformers import CrossEncoder
    from sentence_transformers.backend.utils import backend_should_export
    from transformers import AutoTokenizer

    folder = pressed[0] / "onnx"
    assert backend_should_export(folder, True, {}, "model.onnx", "*.onnx", "ONNX")[0] is False
    pairs = [(row["query"], text) for row in QUERIES for text in row["documents"]]
    ours, theirs = (CrossEncoder(str(path), device="cpu") for path in (pressed[0] / "safetensors", source))
    assert type(ours.activation_fn) is type(theirs.activation_fn)
    scores = ours.predict(pairs)
    assert np.corrcoef(scores, theirs.predict(pairs))[0, 1] > 0.95
    inputs = dict(AutoTokenizer.from_pretrained(folder)(pairs, padding=True, return_tensors="np"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {port.name for port in session.get_inputs()} == inputs.keys()
    np.testing.assert_allclose(1 / (1 + np.exp(-session.run(["logits"], inputs)[0][:, 0])), scores, atol=1e-4)
    untyped = session.run(["logits"], inputs | {"token_type_ids": np.zeros_like(inputs["input_ids"])})[0][:, 0]
    assert np.abs(1 / (1 + np.exp(-untyped)) - scores).max() > 0.01, "the types would not be seen"


def test_calibration_reads_pairs_with_their_types(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(_lines(QUERIES))
    header = inspect_model(FolderFiles(source))
    for data, files in (("pairs", {"pairs": file}), ("builtin:prose", {})):
        wanted = Calibration(data=data, samples=8, length=32)
        context = PassContext(header=header, work_dir=tmp_path, calibration=wanted, data_files=files)
        samples = calibration_samples(source, context)
        ids, types, mask = (samples[name] for name in ("input_ids", "token_type_ids", "attention_mask"))
        assert len(ids) == 8
        for row, kinds, real in zip(ids.tolist(), types.tolist(), mask.sum(1).tolist(), strict=True):
            assert row[:real].count(102) == 2
            assert kinds[:real] == [0] * (row.index(102) + 1) + [1] * (real - row.index(102) - 1)


@pytest.mark.parametrize(
    ("rows", "gains"),
    [
        ([{"query": "q", "positive": "a", "negative": ["b", "c"]}], (1, 0, 0)),
        (
            [{"query": "q", "passage": text, "label": label} for text, label in (("a", 2), ("b", 0), ("c", 1))],
            (2, 0, 1),
        ),
        ([{"question": "q", "docs": ["a", "b", "c"], "labels": [0, 1, 0.5]}], (0, 1, 0.5)),
        (
            [
                {"group": 7, "query": query, "document": text, "score": 1}
                for query, text in (("q", "a"), ("q ", "b"), ("q", "c"))
            ],
            (1, 1, 1),
        ),
    ],
)
def test_every_form_of_judged_documents_is_read(rows: list[dict[str, Any]], gains: Any, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    second = [
        row | {"query": "other", "group": 8} | ({"question": "other"} if "question" in row else {}) for row in rows
    ]
    file.write_text(_lines(rows + second))
    queries = read_queries(DataSource("d", file))
    assert [query.documents for query in queries] == [("a", "b", "c")] * 2
    assert queries[0].gains == gains
    assert [(row.text.strip(), row.second) for row in pair_rows(DataSource("d", file))][:3] == [
        ("q", "a"),
        ("q", "b"),
        ("q", "c"),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query": "q", "document": "a"}] * 2, "label"),
        ([{"query": "q", "document": "a", "label": -1}] * 2, "least of them -1"),
        ([{"query": "q", "documents": ["a", "b"], "labels": [1]}] * 2, "2 documents and 1 labels"),
        ([{"query": "q", "documents": ["a", "b"], "labels": [1, "x"]}] * 2, "no numbers"),
        ([{"query": f"q{at}", "document": "a", "label": 1} for at in range(4)], "fewer than two"),
        ([{"query": "q", "text": "a"}] * 2, "positive"),
    ],
)
def test_rows_that_can_not_be_ranked_are_refused(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(_lines(rows))
    with pytest.raises(NightpressError, match=said):
        read_queries(DataSource("d", file))


@pytest.mark.parametrize("length", [8, 16, 40])
def test_pairs_are_cut_as_transformers_cuts_them(length: int, source: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, library = open_tokenizer(source), AutoTokenizer.from_pretrained(source)
    for first, second in (("a " * 3, "b " * 30), ("a " * 30, "b " * 3), ("a " * 30, "b " * 31), ("a", "b")):
        ids, types = encode_row(Row(first, second=second), tokenizer, length)
        theirs = library(first, second, truncation="longest_first", max_length=length)
        assert (ids, types) == (theirs["input_ids"], theirs["token_type_ids"])


@pytest.mark.parametrize("family", ["xlm-roberta", "deberta-v2"])
@pytest.mark.slow
def test_rerankers_of_other_families_answer_alike_in_a_graph(family: str, bert_tiny: Path, tmp_path: Path) -> None:
    """XLM-R tells texts apart by separators alone. DeBERTa's relative positions depend on the length, which the graph must compute."""
    import onnxruntime
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    more = {
        "xlm-roberta": {"type_vocab_size": 1, "pad_token_id": 0},
        "deberta-v2": {
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    }[family]
    config = AutoConfig.for_model(family, vocab_size=30522, num_labels=1, initializer_range=0.3, **size, **more)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny / name, tmp_path / "model" / name)
    header = inspect_model(FolderFiles(tmp_path / "model"))
    assert header.scores_pairs
    tokenizer = open_tokenizer(tmp_path / "model")
    rows = [Row(row["query"], second=text) for row in QUERIES[:2] for text in row["documents"] * 3]
    check = pad_typed([encode_row(row, tokenizer, 48) for row in rows], tokenizer.pad_id, header)
    assert check.types is None
    traced = tracing.trace(tmp_path / "model", header, check, PassContext(header=header, work_dir=tmp_path / "work"))
    session = onnxruntime.InferenceSession(str(traced.path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": check.ids[:, : 2 * check.ids.shape[1]], "attention_mask": check.mask}
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-4)
    assert expected.std() > 1e-3


def test_training_reads_pairs_with_their_types(source: Path, tmp_path: Path) -> None:
    from nightpress.core.compress.data.examples import collate, read_examples

    file = tmp_path / "pairs.jsonl"
    file.write_text(_lines(QUERIES))
    header = inspect_model(FolderFiles(source))
    examples = read_examples(source, header, "pairs", file, length=32, labelled=False)
    assert len(examples) == sum(len(row["documents"]) for row in QUERIES)
    batch = collate(examples.take(np.array([3, 0])), np.array([0, 1]), torch.device("cpu"))
    types = batch.inputs["token_type_ids"]
    for ids, kinds, mask in zip(batch.ids.tolist(), types.tolist(), batch.mask.sum(1).tolist(), strict=True):
        assert sum(kinds) == mask - ids.index(102) - 1

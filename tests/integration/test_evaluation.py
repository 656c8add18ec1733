"""Figures measured in a consumer's process equal a direct computation with the same model in this process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Observed, run_consumer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.models import bert_tiny_dir

EMBEDDED = [
    {"text_a": "a cat sat on the mat", "text_b": "the mat had a cat on it", "score": 4.5},
    {"text_a": "a cat sat on the mat", "text_b": "stocks fell in London", "score": 0.2},
    {"text_a": "rain is falling", "text_b": "it is raining", "score": 5},
    {"text_a": "rain is falling", "text_b": "he plays chess", "score": 0},
    {"text_a": "she sings", "text_b": "she is singing a song", "score": 4},
]
TAGGED = [
    {"tokens": ["Anne", "lives", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["Walter", "Elliot", "of", "Kellynch"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["nobody", "came"], "tags": ["O", "O"]},
]
CHOSEN = [
    {"prompt": "One, two,", "choices": ["three", "a house", "and then some more"], "answer": 0},
    {"prompt": "The sky is", "choices": ["blue", "made of chairs"], "answer": 1},
]
PROMPTS = [{"prompt": "It is a truth"}, {"prompt": "Call me Ishmael, he said, and"}, {"prompt": "She was"}]


def prepared(folder: Path, evaluate: list[dict[str, Any]], data: dict[str, list[dict[str, Any]]], tmp: Path) -> Any:
    files = {}
    for name, rows in data.items():
        files[name] = tmp / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "evaluate": evaluate}
    )
    header = inspect_model(FolderFiles(folder))
    make_plan(recipe, header)
    return quality.prepare(recipe, header, folder, files, threads=1)


def observe(
    folder: Path, trial: Any, scratch: Path, name: str, reference: Observed | None = None, *, parts: int = 1
) -> Observed:
    return run_consumer(
        safetensors.CONSUMER,
        folder,
        trial.task,
        name=name,
        scratch=scratch,
        reference=reference.outputs_file if reference else None,
        parts=parts,
    )


def named(found: tuple[Measurement, ...]) -> dict[str, Measurement]:
    return {item.name: item for item in found}


class Language:
    """A tiny Llama, and a copy with some noise in its weights."""

    def __init__(self, tmp: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            vocab_size=30522,
            initializer_range=0.5,
            eos_token_id=30521,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.noisy = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for ours, theirs in zip(self.noisy.parameters(), self.model.parameters(), strict=True):
                ours.copy_(theirs + 0.01 * torch.randn_like(theirs))
        tokenizer = bert_tiny_dir() / "tokenizer.json"
        for name, model in (("source", self.model), ("noisy", self.noisy)):
            model.save_pretrained(tmp / name)
            shutil.copy(tokenizer, tmp / name)
        evaluate = [
            {"metric": "perplexity", "samples": 6, "length": 24, "stride": 8},
            {"metric": "generation", "data": "prompts", "samples": 3, "length": 16, "new_tokens": 8},
            {"metric": "multiple-choice", "data": "chosen", "length": 32},
        ]
        self.folder, self.noisy_folder = tmp / "source", tmp / "noisy"
        self.trial = prepared(tmp / "source", evaluate, {"prompts": PROMPTS, "chosen": CHOSEN}, tmp)
        self.source = observe(tmp / "source", self.trial, tmp / "scratch", "source")
        self.artifact = observe(tmp / "noisy", self.trial, tmp / "scratch", "noisy", self.source)
        self.figures = named(quality.measurements(self.trial, self.source, self.artifact))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory):
    return Language(tmp_path_factory.mktemp("language"))


@pytest.mark.slow
def test_a_stride_scores_each_token_once_with_what_stands_before_it(language: Language):
    sequences = language.trial.evaluations[0].scorer.examples.sequences
    ids = torch.from_numpy(sequences.ids)
    with torch.inference_mode():
        logits = language.noisy(ids).logits
    first = int((sequences.targets[0] >= 0).sum())
    assert first == 23  # the first window has no context before it, so all its tokens but the first are scored
    assert ((sequences.targets[1:] >= 0).sum(axis=1) == 8).all()
    scored = torch.from_numpy(sequences.targets)
    loss = torch.nn.functional.cross_entropy(logits[scored >= 0], scored[scored >= 0])
    measured = language.figures["perplexity"]
    assert measured.n == 23 + 5 * 8
    assert measured.value == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.slow
def test_fidelity_is_the_divergence_and_agreement_of_the_two_models_answers(language: Language):
    examples = language.trial.evaluations[0].scorer.examples
    ids, compared = torch.from_numpy(examples.sequences.ids), torch.from_numpy(examples.compared)
    scored = torch.from_numpy(examples.sequences.targets) >= 0
    with torch.inference_mode():
        ours, theirs = language.noisy(ids).logits.log_softmax(-1), language.model(ids).logits.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)[compared]
    agreed = (ours.argmax(-1) == theirs.argmax(-1))[scored].float().mean()
    measured = language.figures["kl_divergence"]
    assert measured.n == int(compared.sum())
    assert measured.value == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert language.figures["top1_agreement"].value == pytest.approx(float(agreed), rel=1e-6)
    assert float(divergence.mean()) > 0.001


@pytest.mark.slow
def test_bits_per_byte_divide_the_loss_by_the_bytes_of_the_scored_text(language: Language):
    perplexity, bits = language.figures["perplexity"], language.figures["bits_per_byte"]
    assert bits.value * bits.n * np.log(2) == pytest.approx(np.log(perplexity.value) * perplexity.n, rel=1e-6)
    assert 2 * perplexity.n < bits.n < 8 * perplexity.n


@pytest.mark.slow
def test_one_forward_pass_finds_where_greedy_texts_part(language: Language):
    def greedy(model: Any, prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(8):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    examples = language.trial.evaluations[1].scorer.examples.sequences
    same, whole = 0, 0
    for ids, mask in zip(examples.ids, examples.mask, strict=True):
        prompt = ids[: mask.sum()].tolist()
        theirs, ours = greedy(language.model, prompt), greedy(language.noisy, prompt)
        parted = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 8)
        same, whole = same + parted, whole + (parted == 8)
    assert language.figures["prefix_match"].n == 24
    assert language.figures["prefix_match"].value == pytest.approx(same / 24)
    assert language.figures["generation_match"].value == pytest.approx(whole / 3)
    assert 0 < same < 24  # otherwise the test would prove nothing


@pytest.mark.slow
def test_a_choice_is_the_likeliest_answer_a_byte(language: Language):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bert_tiny_dir() / "tokenizer.json"))
    hits = []
    for row in CHOSEN:
        losses = []
        for choice in row["choices"]:
            stem = tokenizer.encode(row["prompt"], add_special_tokens=False).ids
            ids = tokenizer.encode(f"{row['prompt']} {choice}", add_special_tokens=False).ids
            ids = torch.tensor([[101, *ids]])
            with torch.inference_mode():
                logp = language.noisy(ids).logits[0].log_softmax(-1)
            at = range(len(stem), ids.shape[1] - 1)
            losses.append(-sum(float(logp[i, ids[0, i + 1]]) for i in at) / len(choice.encode()))
        hits.append(int(np.argmin(losses)) == row["answer"])
    assert language.figures["choice_accuracy"].value == np.mean(hits)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory):
    tmp = tmp_path_factory.mktemp("embedder")
    folder = bert_tiny_dir(tmp)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    evaluate = [
        {"metric": "similarity", "data": "pairs", "length": 32},
        {"metric": "retrieval", "samples": 12, "length": 48},
    ]
    trial = prepared(folder, evaluate, {"pairs": EMBEDDED}, tmp)
    source = observe(folder, trial, tmp / "scratch", "source")
    return folder, named(quality.measurements(trial, source, None))


@pytest.mark.slow
def test_similarity_is_the_correlation_with_peoples_scores(embedder: tuple[Path, dict[str, Measurement]]):
    from transformers import AutoModel, AutoTokenizer

    folder, figures = embedder
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def vector(text: str) -> Any:
        with torch.inference_mode():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)

    cosines = [float(torch.cosine_similarity(vector(r["text_a"]), vector(r["text_b"]), dim=0)) for r in EMBEDDED]
    scores = [row["score"] for row in EMBEDDED]
    assert figures["pearson"].value == pytest.approx(np.corrcoef(cosines, scores)[0, 1], abs=1e-5)
    ranks = [np.argsort(np.argsort(values)) for values in (cosines, scores)]
    assert figures["spearman"].value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@pytest.mark.slow
def test_retrieval_needs_no_labels_on_prose(embedder: tuple[Path, dict[str, Measurement]]):
    _, figures = embedder
    assert figures["ndcg"].n == 12
    assert 0.3 < figures["ndcg"].value <= figures["recall"].value <= 1
    assert figures["recall"].unit == "@10"


@pytest.mark.slow
def test_entities_are_judged_by_each_words_first_piece(tmp_path: Path):
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(1)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=dict(enumerate(names)),
        label2id={name: at for at, name in enumerate(names)},
    )
    folder = tmp_path / "model"
    BertForTokenClassification(config).save_pretrained(folder)
    shutil.copy(bert_tiny_dir() / "tokenizer.json", folder)
    trial = prepared(folder, [{"metric": "auto", "data": "tagged", "length": 32}], {"tagged": TAGGED}, tmp_path)
    source = observe(folder, trial, tmp_path / "scratch", "source")
    figures = named(quality.measurements(trial, source, None))
    targets = trial.evaluations[0].scorer.examples.sequences.targets
    assert (targets >= 0).sum() == 11  # the number of words, not of word pieces
    assert figures["entity_f1"].n == 4
    assert 0 <= figures["entity_f1"].value < 1
    # With the true tags as predictions, the scorer finds every entity.
    told = Observed({**source.outputs, "quality0.top1": targets[targets >= 0]}, (), (), 0, {}, "", 0.0, Path())
    assert named(quality.measurements(trial, told, None))["entity_f1"].value == 1


@pytest.mark.parametrize("tag", ["B-PLANET", 17, -1])
def test_a_tag_that_the_model_does_not_have_is_refused(tmp_path: Path, tag: str | int):
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=30522, num_labels=3
    )
    BertForTokenClassification(config).save_pretrained(tmp_path / "model")
    shutil.copy(bert_tiny_dir() / "tokenizer.json", tmp_path / "model")
    rows = [{"tokens": ["Ada"], "tags": [0]}, {"tokens": ["Mars"], "tags": [tag]}]
    with pytest.raises(NightpressError) as caught:
        prepared(tmp_path / "model", [{"metric": "entities", "data": "mine"}], {"mine": rows}, tmp_path)
    assert caught.value.code == ErrorCode.INVALID_DATA
    assert str(tag) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("metric", "rows", "said"),
    [
        ("similarity", [{"text_a": "a", "text_b": "b"}] * 2, "row 1 has no `score`"),
        ("similarity", [{"text_a": "a", "text_b": "b", "score": 1}] * 3, "same score"),
        ("similarity", [{"text_a": "a", "text_b": " ", "score": 1}] * 3, "not a text that says something"),
        ("similarity", [{"text_a": "a", "text_b": "b", "score": 1}], "fewer than two rows"),
        ("retrieval", [{"query": "a", "positive": []}] * 2, "`positive` or `passage`"),
        ("retrieval", [{"query": "a", "positive": "b"}, {"query": "c", "positive": "b"}], "share one passage"),
    ],
)
def test_rows_without_what_a_metric_reads_are_named(tmp_path: Path, metric: str, rows: list[Any], said: str):
    folder = bert_tiny_dir(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NightpressError) as caught:
        prepared(folder, [{"metric": metric, "data": "mine"}], {"mine": rows}, tmp_path)
    assert caught.value.code == ErrorCode.INVALID_DATA
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("metric", "data"),
    [("perplexity", "builtin:prose"), ("similarity", "builtin:prose"), ("entities", "builtin:prose")],
)
def test_a_metric_for_other_models_is_refused_before_anything_runs(tmp_path: Path, metric: str, data: str):
    with pytest.raises(NightpressError) as caught:
        prepared(bert_tiny_dir(tmp_path), [{"metric": metric, "data": data}], {}, tmp_path)
    assert caught.value.code == ErrorCode.INVALID_RECIPE
    assert "masked-lm" in caught.value.message + caught.value.hint


@pytest.mark.slow
def test_timing_that_takes_long_goes_on_telling(bert_tiny: Path, tmp_path: Path):
    latency = {"metric": "latency", "batch": 16, "length": 128, "repeats": 1000}
    trial = prepared(bert_tiny, [{"metric": "fidelity", "samples": 4, "length": 16}, latency], {}, tmp_path)
    told: list[tuple[float, str]] = []
    run_consumer(
        safetensors.CONSUMER,
        bert_tiny,
        trial.task,
        name="it",
        scratch=tmp_path / "scratch",
        progress=lambda fraction, what: told.append((fraction, what)),
    )
    timing = [fraction for fraction, what in told if what == "timing 16 × 128"]
    assert len(timing) >= 2
    assert timing == sorted(set(timing))


@pytest.mark.slow
def test_processes_that_share_out_the_examples_give_the_figures_of_one(language: Language, tmp_path: Path):
    """Each has whole batches, which compute the same in any process. Some have no part of a small set."""
    sets = tuple(replace(examples, alone=True) for examples in language.trial.task.sets)
    trial = replace(language.trial, task=replace(language.trial.task, sets=sets))
    found = {}
    for parts in (1, 3):
        scratch = tmp_path / f"{parts}"
        source = observe(language.folder, trial, scratch, "source", parts=parts)
        artifact = observe(language.noisy_folder, trial, scratch, "artifact", source, parts=parts)
        for seen in (source, artifact):
            with np.load(seen.outputs_file) as archive:
                assert set(archive.files) == set(seen.outputs)
        found[parts] = source.outputs, artifact.outputs, quality.measurements(trial, source, artifact)
    for one, three in zip(found[1][:2], found[3][:2], strict=True):
        assert one.keys() == three.keys()
        assert all(np.array_equal(one[name], three[name]) for name in one)
    assert found[1][2] == found[3][2]
    assert len(found[1][2]) > 4
    assert len(list((tmp_path / "3").glob("source-part*.npz"))) == 2

"""A vocabulary is cut without loss on the text that it was cut for, and everything that names a token follows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.data.vocabulary import count_tokens, cut_tokenizer, tokens_to_keep, vocabulary_of
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import Measurement, Report
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import embedder, language_model, run_pass

TEXTS = [
    "The lamp burned all night by the river, unbelievably bright.",
    "A letter came in winter; the horse knew the road.",
    "Tokenization of naïve words: 3,141 breadcrumbs & gardens!",
]
OTHER = "Zebras quickly vexed jumbled wizards at the antediluvian observatory in 2024 (ΩΩ)."


def _trained(kind: str) -> dict[str, Any]:
    """A small tokenizer of each kind, trained on prose, as a parsed tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from nightpress.core.compress.data.rows import read_rows

    prose = [row.text for row in read_rows("builtin:prose", None)][:150]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer: Any = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(prose, trainer)
    around = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
def test_the_text_is_tokenized_as_before_and_any_other_text_more_finely(kind: str) -> None:
    from tokenizers import Tokenizer

    state = _trained(kind)
    before = Tokenizer.from_str(json.dumps(state))
    counts = count_tokens(before, TEXTS)
    kept = tokens_to_keep(state, counts, {5}, least=1, characters=True)
    cut = cut_tokenizer(state, kept)
    after = Tokenizer.from_str(json.dumps(cut))
    assert len(kept) == after.get_vocab_size() < 0.75 * before.get_vocab_size()
    assert 5 in kept
    names, words = vocabulary_of(cut), vocabulary_of(state)
    assert {token: kept[at] for token, at in names.items()} == {token: words[token] for token in names}
    for text in TEXTS:
        whole, ours = before.encode(text), after.encode(text)
        assert ours.tokens == whole.tokens
        assert [kept[at] for at in ours.ids] == whole.ids
    whole, ours = before.encode(OTHER), after.encode(OTHER)
    assert len(ours) > len(whole)
    assert ours.tokens[0], ours.tokens[-1] == ("<s>", "</s>")
    assert after.decode(ours.ids) == before.decode(whole.ids)
    assert ours.tokens.count("<unk>") == whole.tokens.count("<unk>")


def test_rare_tokens_are_cut_where_they_may_be_split() -> None:
    from tokenizers import Tokenizer

    state = _trained("BPE")
    before = Tokenizer.from_str(json.dumps(state))
    counts = count_tokens(before, [*TEXTS, TEXTS[0]])
    every, frequent = (tokens_to_keep(state, counts, (), least=least, characters=True) for least in (1, 2))
    assert set(frequent) < set(every)
    after = Tokenizer.from_str(json.dumps(cut_tokenizer(state, frequent)))
    assert after.encode(TEXTS[0]).tokens == before.encode(TEXTS[0]).tokens
    assert len(after.encode(TEXTS[1])) > len(before.encode(TEXTS[1]))


def _named(found: tuple[Measurement, ...]) -> dict[str, Measurement]:
    return {figure.name: figure for figure in found}


def _press(source: Path, job: Path, evaluate: list[dict[str, Any]], exports: list[str]) -> tuple[Path, Report]:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 12)
    recipe = {"passes": [{"pass": "vocabulary", "data": "texts"}], "exports": exports, "evaluate": evaluate}
    lay_out(job, source, recipe, {"texts": rows})
    return job / "out", press(job)[1]


@pytest.mark.slow
def test_an_embedder_gives_the_same_vectors_with_a_twentieth_of_its_tokens(bert_tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source = embedder(bert_tiny, tmp_path / "model")
    evaluate = [
        {"metric": "neighbours", "data": "texts", "samples": 36},
        {"metric": "fidelity", "samples": 12, "length": 32},
    ]
    out, report = _press(source, tmp_path / "job", evaluate, ["safetensors"])
    header, summary = inspect_model(FolderFiles(out / "safetensors")), report.passes[0].summary
    assert header.vocabulary == summary["kept"] < 30522 / 5
    assert summary["text_tokens_after"] == summary["text_tokens"]
    assert summary["prose_tokens_after"] > 1.1 * summary["prose_tokens"]
    assert summary["missed_most"]
    ours, theirs = (
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS) for folder in (out / "safetensors", source)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for artifact in report.artifacts:
        on_texts, on_prose = (
            _named(tuple(figure for figure in artifact.measurements if figure.data == data))
            for data in ("texts", "builtin:prose")
        )
        assert on_texts["cosine"].value == pytest.approx(1, abs=1e-5)
        assert on_texts["neighbour_recall"].value == 1
        assert on_prose["cosine"].value < 0.999, "prose is split more finely, which must be seen"


@pytest.mark.slow
def test_a_language_model_is_measured_by_its_own_tokens(bert_tiny: Path, tmp_path: Path) -> None:
    source = language_model(bert_tiny, tmp_path / "model", blocks=1)
    evaluate = [
        {"metric": "perplexity", "data": "texts", "samples": 4, "length": 24},
        {"metric": "generation", "samples": 3, "length": 8, "new_tokens": 4},
    ]
    out, report = _press(source, tmp_path / "job", evaluate, ["onnx"])
    config = json.loads((out / "onnx" / "config.json").read_bytes())
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "onnx" / "tokenizer.json"))
    named = {"pad_token_id": "[PAD]", "bos_token_id": "[CLS]", "eos_token_id": "[SEP]"}
    assert {key: config[key] for key in named} == {key: tokenizer.token_to_id(name) for key, name in named.items()}
    for artifact in report.artifacts:
        figures = _named(artifact.measurements)
        assert figures["kl_divergence"].value == pytest.approx(0, abs=1e-6)
        assert figures["centred_cosine"].value == pytest.approx(1, abs=1e-4)
        assert 0 <= figures["prefix_match"].value < 1, "the source writes tokens that were cut"
        assert figures["perplexity"].value < 0.5 * _named(report.source.measurements)["perplexity"].value


@pytest.mark.slow
def test_logits_over_kept_tokens_are_the_sources(bert_tiny: Path, tmp_path: Path) -> None:
    """A head of its own, whose rows and bias are cut like the embeddings'."""
    from tokenizers import Tokenizer
    from transformers import BertForMaskedLM

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out, _ = run_pass(bert_tiny, tmp_path, {"pass": "vocabulary", "data": "texts"}, data_files={"texts": file})
    whole, cut = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (bert_tiny, out))
    kept = [whole.token_to_id(cut.id_to_token(at)) for at in range(cut.get_vocab_size())]
    ours, theirs = (BertForMaskedLM.from_pretrained(folder).eval() for folder in (out, bert_tiny))
    with torch.inference_mode():
        a, b = (
            model(torch.tensor([tokenizer.encode(TEXTS[0]).ids])).logits
            for model, tokenizer in ((ours, cut), (theirs, whole))
        )
    torch.testing.assert_close(a, b[..., kept], atol=1e-5, rtol=1e-5)
    assert not (out / "vocab.txt").exists()


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([{"pass": "vocabulary", "data": "d"}, {"pass": "recover", "train": {"data": "d"}}], "can't follow"),
        ([{"pass": "vocabulary"}], "data"),
    ],
)
def test_recipes_that_can_not_work_are_refused(passes: list[dict[str, Any]], said: str, bert_tiny: Path) -> None:
    with pytest.raises(NightpressError, match=said):
        make_plan(
            parse_recipe({"name": "t", "passes": passes, "exports": ["safetensors"]}),
            inspect_model(FolderFiles(bert_tiny)),
        )

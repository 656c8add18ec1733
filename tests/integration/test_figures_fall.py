"""Every figure of every task gets worse as more noise breaks a model. The verification and a gate on quality notice it too."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.evaluate.fidelity import KL_QUANTILES
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.runners import measure, transformers_runner
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe
from tests.models import minilm_dir
from tests.training import classifier

#: Noise on every weight, in the weight's standard deviations: too little to show in a figure, some, and so much that the model is lost.
LEVELS = (0.001, 0.3, 5.0)
WORDS = ("lamp", "river", "stone", "window", "garden", "letter", "horse", "winter", "road", "bread", "king", "sea")
TEXTS = [" ".join(WORDS[(at * 7 + place * place * 5) % 12] for place in range(2 + at % 7)) for at in range(48)]
_TAGS = ("O", "B-X", "B-Y", "I-Y")
FIDELITY = {"metric": "fidelity", "samples": 48, "length": 32}


@dataclass(frozen=True)
class Case:
    """A task: its model, its evaluations and the expected names of figures. `data`: makes rows, by data set, from the source's outputs."""

    build: Callable[[Path, Path], Path]
    figures: set[str]
    evaluate: tuple[dict[str, Any], ...] = (FIDELITY,)
    data: Callable[[Path], dict[str, list[dict[str, Any]]]] = field(default=lambda _folder: {})


def _bert(head: str, **config: Any) -> Callable[[Path, Path], Path]:
    def build(bert_tiny: Path, folder: Path) -> Path:
        import transformers

        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
        made = transformers.BertConfig(**shape, initializer_range=0.3, **config)
        getattr(transformers, head)(made).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bert_tiny / name, folder / name)
        return folder

    return build


def _says_lamp(bert_tiny: Path, folder: Path) -> Path:
    """A masked language model that predicts "lamp", the most frequent word, everywhere."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    _bert("BertForMaskedLM", vocab_size=30522)(bert_tiny, folder)
    weights = load_file(folder / "model.safetensors")
    lamp = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("lamp")
    weights["cls.predictions.bias"][lamp] = 12.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _writes_lamp(bert_tiny: Path, folder: Path) -> Path:
    """A language model that continues every text with "lamp", the most frequent word. It has learned nothing else."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {"vocab_size": 30522, "bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**ids, **shape, initializer_range=0.3, tie_word_embeddings=False))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny / name, folder.parent / name)
    lamp = Tokenizer.from_file(str(folder.parent / "tokenizer.json")).token_to_id("lamp")
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[lamp] += 0.4  # of 32 channels: 12.8 more than other words
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder.parent / name, folder / name)
    return folder


def _vit(_bert_tiny: Path, folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(**shape, image_size=32, patch_size=8, num_labels=5, initializer_range=0.3)
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def _t5(bert_tiny: Path, folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=30522, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    shutil.copy(bert_tiny / "tokenizer.json", folder)
    return folder


def _answers(folder: Path, texts: list[str]) -> np.ndarray:
    """The classes that a BERT classifier predicts, for each text or for each token of each text."""
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_bytes())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([tokenizer.encode(text).ids])).logits[0] for text in texts]
    return np.array([logit.argmax(-1).tolist() for logit in logits], dtype=object)


def _labelled(folder: Path) -> dict[str, list[dict[str, Any]]]:
    classes = _answers(folder, TEXTS)
    return {"rows": [{"text": text, "label": int(cls)} for text, cls in zip(TEXTS, classes, strict=True)]}


def _lamps(_folder: Path) -> dict[str, list[dict[str, Any]]]:
    texts = [" ".join("lamp" if (at + place) % 4 else WORDS[place] for place in range(12)) for at in range(48)]
    return {"rows": [{"text": text} for text in texts]}


def _tagged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    names = json.loads((folder / "config.json").read_bytes())["id2label"]
    rows = []
    for text, classes in zip(TEXTS, _answers(folder, TEXTS), strict=True):
        tags = [names[str(cls)] for cls in classes[1:-1]]
        rows.append({"tokens": text.split(), "tags": tags[: len(text.split())]})
    return {"rows": rows}


def _pairs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Pairs of texts, with the source's own cosines as scores."""
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def vector(text: str) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0)

    pairs = list(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))
    scores = [float(torch.cosine_similarity(vector(a), vector(b), dim=0)) for a, b in pairs]
    return {"pairs": [{"text_a": a, "text_b": b, "score": score} for (a, b), score in zip(pairs, scores, strict=True)]}


def _ranked(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Queries with documents. The label of a document is its place among them by the source's own score, the best has the largest."""
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(query: str, document: str) -> float:
        pair = tokenizer.encode(query, document)
        with torch.inference_mode():
            return float(model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids])).logits)

    found = []
    for at, query in enumerate(TEXTS):
        documents = [TEXTS[(at + step) % len(TEXTS)] for step in range(1, 7)]
        places = np.argsort(np.argsort([score(query, document) for document in documents]))
        found.append({"query": query, "documents": documents, "labels": (places**2).tolist()})
    return {"ranked": found}


_TOKENS = {"top1_agreement", "kl_divergence", "centred_cosine"}
_NEXT_TOKENS = {*_TOKENS, *KL_QUANTILES, "rms_dp"}
_NUMBERS = {"rank_correlation", "correlation", "mean_error", "largest_error", "centred_cosine"}
CASES = {
    "embedder": Case(
        lambda _bert_tiny, folder: minilm_dir(folder.parent / "minilm"),
        {"spearman", "pearson", "ndcg", "recall", "cosine", "centred_cosine"},
        ({"metric": "similarity", "data": "pairs"}, {"metric": "retrieval", "samples": 48, "length": 32}),
        _pairs,
    ),
    "classifier": Case(
        classifier,
        {"accuracy", "right_to_wrong", "f1", "flips", *_TOKENS},
        ({"metric": "accuracy", "data": "rows", "samples": 48},),
        _labelled,
    ),
    "reranker": Case(
        _bert("BertForSequenceClassification", num_labels=1),
        {"ndcg", "mrr", "kendall_tau", "top1_agreement", *_NUMBERS},
        ({"metric": "ranking", "data": "ranked", "samples": 48},),
        _ranked,
    ),
    "numbers": Case(_bert("BertForSequenceClassification", num_labels=3, problem_type="regression"), _NUMBERS),
    "labels": Case(
        _bert("BertForSequenceClassification", num_labels=4, problem_type="multi_label_classification"),
        {"label_agreement", "kl_divergence", "centred_cosine"},
    ),
    "tokens": Case(
        _bert(
            "BertForTokenClassification",
            id2label=dict(enumerate(_TAGS)),
            label2id={name: at for at, name in enumerate(_TAGS)},
        ),
        {"entity_f1", *_TOKENS},
        ({"metric": "entities", "data": "rows", "samples": 48},),
        _tagged,
    ),
    "masked LM": Case(
        _says_lamp,
        {"masked_accuracy", *_TOKENS},
        ({"metric": "masked-lm", "data": "rows", "samples": 24, "length": 32},),
        _lamps,
    ),
    "causal LM": Case(
        _writes_lamp,
        {"perplexity", "bits_per_byte", "generation_match", "prefix_match", *_NEXT_TOKENS},
        (
            {"metric": "perplexity", "data": "rows", "samples": 12, "length": 32},
            {"metric": "generation", "samples": 12, "length": 12, "new_tokens": 6},
        ),
        _lamps,
    ),
    "images": Case(_vit, {"flips", *_TOKENS}, ({"metric": "fidelity", "samples": 48},)),
    "encoder-decoder": Case(_t5, _TOKENS, ({"metric": "fidelity", "samples": 12, "length": 24},)),
}


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _observe(folder: Path, trial: quality.Trial, reference: Observed | None) -> Observed:
    """Run the runner's code in this process: importing torch in forty processes would take minutes."""
    request = {**trial.task.request(), "folder": folder.name, "device": "cpu"}
    with _inside(folder.parent):
        forward, versions, snippet, generate, _ = transformers_runner.load(request)
        outputs = measure.run_sets(
            forward, generate, request, trial.task.arrays(), None if reference is None else reference.outputs
        )
    return Observed(outputs, (), (), None, versions, snippet, 0.0, folder)


def _broken(source: Path, target: Path, level: float) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel() > 1:
            noise = torch.randn(weight.shape, generator=generator)
            # The weights of a norm or bias may all be equal. So their noise is relative to their mean size, not to their deviation.
            weights[name] = weight + level * (weight.std() if weight.dim() > 1 else weight.abs().mean() * 0.1) * noise
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _worse(measurement: Measurement, other: Measurement) -> bool:
    """Whether `measurement` is worse than `other`, without an overlap of their intervals."""
    assert None not in (measurement.low, measurement.high, other.low, other.high)
    return measurement.high < other.low if measurement.better == "higher" else measurement.low > other.high


def _verified(recipe: Recipe, trial: quality.Trial, base: Observed, seen: Observed) -> bool:
    try:
        verify(recipe, Export(format="compressed-tensors"), seen, source=base, traced=None, task=trial.task)
    except NightpressError as error:
        if error.code is not ErrorCode.VERIFICATION_FAILED:
            raise
        return False
    return True


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_figures_verification_and_gate_see_a_model_break_step_by_step(
    name: str, bert_tiny: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    source = case.build(bert_tiny, tmp_path / "source")
    files = {}
    for ref, rows in case.data(source).items():
        files[ref] = tmp_path / f"{ref}.jsonl"
        files[ref].write_text("".join(json.dumps(row) + "\n" for row in rows))
    passes, exports = [{"pass": "weight-only", "bits": 8}], ["compressed-tensors"]
    recipe = parse_recipe({"name": "t", "passes": passes, "exports": exports, "evaluate": list(case.evaluate)})
    trial = quality.prepare(recipe, inspect_model(FolderFiles(source)), source, files, threads=1)
    base = _observe(source, trial, None)
    found, verified = [], []
    for at, level in enumerate(LEVELS):
        seen = _observe(_broken(source, tmp_path / f"broken{at}", level), trial, base)
        measured = [
            measurement for measurement in quality.measurements(trial, base, seen) if measurement.name != "class_f1"
        ]
        found.append({(measurement.name, measurement.of, measurement.data): measurement for measurement in measured})
        verified.append(_verified(recipe, trial, base, seen))
        shutil.rmtree(tmp_path / f"broken{at}")
    mildest, middle, strongest = found
    assert {key[0] for key in mildest} == case.figures
    for key in mildest:
        assert not _worse(mildest[key], middle[key]), key
        assert not _worse(middle[key], strongest[key]), key
        assert _worse(strongest[key], mildest[key]), (key, mildest[key].value, strongest[key].value)
    nearness = [key for key in mildest if key[0] == "centred_cosine"]
    assert all(mildest[key].low > 0.99 for key in nearness)
    assert all(strongest[key].low < 0.5 for key in nearness)
    assert verified[0]
    assert not verified[-1]

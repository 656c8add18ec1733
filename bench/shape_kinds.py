"""The models of bench.shape_to_speed: what each learns from, and how good it is.

- `classifier`: the film reviews of DATA; accuracy on the test rows.
- `embedder`: words, sentences and paragraphs of novels; Spearman's correlation with human judgements of similarity, and nDCG@10 of the
  paragraphs of another novel, found by their first sentence.
- `reranker`: a cross-encoder that is trained here, on sentences of novels with their paragraphs and others; nDCG@10 on another novel.
"""

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nightpress.core.compress.data.examples import Batch, Examples, collate, read_examples
from nightpress.core.compress.evaluate.scores import graded_gain, ranking_scores, spearman
from nightpress.core.compress.model.networks import embeddings_of, load_model, save_model
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

Array = NDArray[np.float64]
Answer = Callable[[Batch], NDArray[np.float32]]  #: a model's first output for a batch
Qualities = Mapping[str, Array]  #: name → the value of each row, query or data set; the quality is their mean

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_SHORT, _LONG = 40, 80  #: characters that a first sentence, and the rest of its paragraph, have at least
_CANDIDATES = 10  #: documents of a query
_DOCUMENTS = 4  #: of a query in training
_BATCH = 32


@dataclass(frozen=True)
class Kind:
    """One kind of model."""

    speeds: tuple[float, ...]
    bars: Mapping[float, tuple[str, Mapping[str, float]]]  #: speed → (`change` or `share`, quality → least value)
    losses: Mapping[str, Any]
    epochs: int
    files: Callable[[Path, Path], dict[str, Path]]  #: (DATA, scratch) → `train`, and what `quality` reads
    quality: Callable[[Path, Mapping[str, Path], Answer, torch.device], Qualities]  #: (model's folder, files, …)
    train: Mapping[str, Any] = field(default_factory=dict)


# Texts --------------------------------------------------------------------------------------------------------------------


def _paragraphs(file: Path) -> list[str]:
    text = gzip.decompress(file.read_bytes()).decode().replace("\r", "")
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _split(paragraphs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first sentence of each paragraph and its rest, where both are long enough."""
    for paragraph in paragraphs:
        first, *rest = _SENTENCE.split(paragraph, maxsplit=1)
        if rest and len(first) > _SHORT and len(rest[0]) > _LONG:
            yield first, rest[0]


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _answers(answer: Answer, examples: Examples, device: torch.device) -> list[NDArray[np.float32]]:
    """The answer to each example, in their order. Texts of similar length share a batch."""
    found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(examples)
    order = np.argsort([len(row) for row in examples.ids], kind="stable")
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        for at, row in zip(chosen, answer(collate(examples, chosen, device)), strict=True):
            found[at] = row
    return found


# A classifier -------------------------------------------------------------------------------------------------------------


def _review_files(data: Path, _scratch: Path) -> dict[str, Path]:
    return {part: data / f"rt_sentiment_{part}.jsonl.gz" for part in ("train", "test")}


def _accuracy(model: Path, files: Mapping[str, Path], answer: Answer, device: torch.device) -> Qualities:
    header = inspect_model(FolderFiles(model))
    test = read_examples(model, header, "test", files["test"], length=128, labelled=True)
    assert test.labels is not None
    classes = [int(logits.argmax()) for logits in _answers(answer, test, device)]
    return {"accuracy": (np.asarray(classes) == test.labels).astype(np.float64)}


# An embedder --------------------------------------------------------------------------------------------------------------


def _embedder_files(data: Path, scratch: Path) -> dict[str, Path]:
    """Texts of all lengths: paragraphs, their sentences, and each word of them."""
    paragraphs = [part[:600] for part in _paragraphs(data / "lm_train_austen_moby.txt.gz") if len(part) > _SHORT]
    sentences = [sentence for part in paragraphs for sentence in _SENTENCE.split(part) if 10 < len(sentence) < 300]
    words = sorted({word for part in paragraphs for word in re.findall(r"[a-z]{3,}", part.lower())})
    texts = [*paragraphs, *sentences[::2], *words]
    return {
        "train": _write(scratch / "texts.jsonl", [{"text": text} for text in texts]),
        "judgements": data / "similarity",
        "novel": data / "lm_eval_persuasion.txt.gz",
    }


def _judged(folder: Path) -> dict[str, list[tuple[str, str, float]]]:
    """Data set → pairs of texts with human judgements."""
    found = {}
    for name in ("wordsim353.tsv", "simlex999.txt"):
        lines = [line.split("\t") for line in (folder / name).read_text().splitlines() if not line.startswith("#")]
        found[name] = [(first, second, float(score)) for first, second, score in lines]
    documents = (folder / "lee_docs.txt").read_text().splitlines()
    scores = np.loadtxt(folder / "similarities0-1.txt")
    places = itertools.combinations(range(len(documents)), 2)
    found["lee"] = [(documents[a], documents[b], float(scores[a, b])) for a, b in places]
    return found


def _embedder_quality(model: Path, files: Mapping[str, Path], answer: Answer, device: torch.device) -> Qualities:
    judged = _judged(files["judgements"])
    pairs = list(_split(_paragraphs(files["novel"])))
    texts = sorted({text for rows in judged.values() for first, second, _ in rows for text in (first, second)})
    texts += [text for pair in pairs for text in pair]
    file = files["train"].parent / "embedded.jsonl"
    _write(file, [{"text": text} for text in texts])
    header = inspect_model(FolderFiles(model))
    examples = read_examples(model, header, "texts", file, length=128, labelled=False)
    states = _answers(answer, examples, device)
    vectors = np.stack([row[: len(ids)].mean(0) for row, ids in zip(states, examples.ids, strict=True)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    place = {text: at for at, text in enumerate(texts)}
    by_set = []
    for rows in judged.values():
        cosines = [float(vectors[place[first]] @ vectors[place[second]]) for first, second, _ in rows]
        correlation = spearman(np.asarray(cosines), np.asarray([score for *_, score in rows]))
        by_set.append(float(correlation(np.ones((1, len(rows))))[0]))
    queries = np.stack([vectors[place[first]] for first, _ in pairs])
    passages = np.stack([vectors[place[rest]] for _, rest in pairs])
    gains, _ = ranking_scores((queries @ passages.T).astype(np.float64), np.eye(len(pairs), dtype=bool))
    return {"spearman": np.asarray(by_set), "ndcg": gains}


# A reranker ---------------------------------------------------------------------------------------------------------------


def _queries(paragraphs: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """A sentence of a paragraph is a query; what is left of it is relevant. Four paragraphs near it and five others are not."""
    random = np.random.default_rng(seed)
    long = [part for part in paragraphs if len(part) > _SHORT + _LONG]
    found = []
    for at, paragraph in enumerate(long):
        sentences = _SENTENCE.split(paragraph)
        fitting = [place for place, sentence in enumerate(sentences) if len(sentence) > _SHORT]
        if len(sentences) < 2 or not fitting:
            continue
        place = fitting[int(random.integers(len(fitting)))]
        rest = " ".join(sentences[:place] + sentences[place + 1 :])
        if len(rest) <= _LONG:
            continue
        near = [other for other in range(at - 2, at + 3) if other != at and 0 <= other < len(long)]
        far = [int(other) for other in random.permutation(len(long))[:20] if abs(int(other) - at) > 2]
        others = (near + far)[: _CANDIDATES - 1]
        found.append({"query": sentences[place], "documents": [rest[:600], *(long[other][:600] for other in others)]})
    return found


def _reranker_files(data: Path, scratch: Path) -> dict[str, Path]:
    novels = _paragraphs(data / "lm_train_austen_moby.txt.gz")
    random = np.random.default_rng(0)
    rows = _queries(novels, seed=0)
    fewer = []
    for row in rows:
        others = random.choice(len(row["documents"]) - 1, _DOCUMENTS - 1, replace=False) + 1
        fewer.append({**row, "documents": [row["documents"][at] for at in (0, *others)]})
    return {
        "train": _write(scratch / "pairs.jsonl", fewer),
        "test": _write(scratch / "test.jsonl", _queries(_paragraphs(data / "lm_eval_persuasion.txt.gz"), seed=0)),
    }


def _reranker_quality(model: Path, files: Mapping[str, Path], answer: Answer, device: torch.device) -> Qualities:
    header = inspect_model(FolderFiles(model))
    rows = [json.loads(line) for line in files["test"].read_text().splitlines()]
    examples = read_examples(model, header, "test", files["test"], length=128, labelled=False)
    scores = np.asarray([float(row[0]) for row in _answers(answer, examples, device)])
    ends = np.cumsum([len(row["documents"]) for row in rows])[:-1]
    gains = [np.eye(1, len(row["documents"]))[0] for row in rows]
    return {
        "ndcg": np.asarray(
            [graded_gain(own, wanted) for own, wanted in zip(np.split(scores, ends), gains, strict=True)]
        )
    }


def untrained_reranker(embedder: Path, target: Path) -> Path:
    """Give an embedder a head of one score."""
    import transformers

    from nightpress.core.compress.model.companions import copy_companions

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(embedder, num_labels=1, dtype=torch.float32)
    target.mkdir(parents=True)
    copy_companions(embedder, target)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (target / name).unlink(missing_ok=True)
    model.half().save_pretrained(target)
    return target


def train_reranker(untrained: Path, files: Mapping[str, Path], target: Path, device: str, epochs: int) -> None:
    """Of a query's documents, the relevant one learns to get the highest score. Embeddings stay."""
    header = inspect_model(FolderFiles(untrained))
    examples = read_examples(untrained, header, "train", files["train"], length=128, labelled=False)
    groups = len(examples) // _DOCUMENTS
    model = load_model(untrained, header).to(device).train()
    for parameter in embeddings_of(model):
        parameter.requires_grad_(False)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=0.01)
    steps = epochs * (groups // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=max(steps, 1), pct_start=0.1)
    random = np.random.default_rng(0)
    for _ in range(epochs):
        order = random.permutation(groups)
        for start in range(0, groups - _BATCH + 1, _BATCH):
            chosen = (_DOCUMENTS * order[start : start + _BATCH, None] + np.arange(_DOCUMENTS)).reshape(-1)
            batch = collate(examples, chosen, torch.device(device))
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                scores = model(**batch.inputs).logits.view(-1, _DOCUMENTS)
            loss = torch.nn.functional.cross_entropy(scores.float(), scores.new_zeros(len(scores), dtype=torch.long))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    save_model(model.eval(), untrained, target, header)


_FALL = {4.0: -0.010, 8.0: -0.020}  #: speed → the largest change for the worse
KINDS = {
    "classifier": Kind(
        (2.0, 4.0, 8.0),
        {speed: ("change", {"accuracy": least}) for speed, least in _FALL.items()},
        {"logits": {"alpha": 0.7}, "hidden": {"weight": 1.0}, "altered": 0.5},
        10,
        _review_files,
        _accuracy,
        {"length": 96},
    ),
    "embedder": Kind(
        (3.0,),
        {3.0: ("share", {"spearman": 0.97, "ndcg": 0.97})},
        {"cosine": {"weight": 4.0}, "hidden": {"weight": 1.0}},
        2,
        _embedder_files,
        _embedder_quality,
        {"freeze_embeddings": True},
    ),
    "reranker": Kind(
        (2.0, 4.0, 8.0),
        {speed: ("change", {"ndcg": least}) for speed, least in _FALL.items()},
        {"logits": {}, "hidden": {"weight": 1.0}},
        2,
        _reranker_files,
        _reranker_quality,
    ),
}

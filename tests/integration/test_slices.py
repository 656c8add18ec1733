"""A job on data with slices: each is measured apart, in the artifact and in the source, and gates name them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.data.rows import Row, read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.evaluate import quality
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import Report, Slice, Subject
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.press import lay_out, press
from tests.training import language_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
WORDS = ("lamp", "river", "stone", "window", "garden", "letter", "horse", "winter", "road", "bread", "def", "return")


def _text(at: int, count: int = 30) -> str:
    return " ".join(WORDS[(at * 7 + place * (3 + at % 4)) % len(WORDS)] for place in range(count))


def _rows() -> list[dict[str, Any]]:
    """Prose, code and chats, in turns; two verses that are too short for a window; some rows without a slice."""
    rows: list[dict[str, Any]] = []
    for at in range(30):
        rows.append({"text": f"The {_text(at)}.", "slice": "prose"})
        rows.append({"text": f"def {_text(at, 5)}(): return {_text(at + 3)}", "slice": "code"})
        asked, answer = (
            {"role": "user", "content": _text(at + 1, 6)},
            {"role": "assistant", "content": _text(at + 2, 20)},
        )
        rows.append({"messages": [asked, answer], "slice": "chat"})
    return [*rows, {"text": "a short verse", "slice": "verse"}, {"text": _text(90, 200)}]


def _chats() -> list[dict[str, Any]]:
    asked = [
        {
            "messages": [{"role": "user", "content": _text(at, 6)}, {"role": "assistant", "content": "yes"}],
            "slice": "chat",
        }
        for at in range(12)
    ]
    return [*asked, *({"prompt": _text(at, 8), "slice": "plain"} for at in range(12))]


EVALUATE = [
    {"metric": "perplexity", "data": "mixed", "samples": 60, "length": 24},
    {"metric": "generation", "data": "chats", "samples": 24, "length": 32, "new_tokens": 4},
]


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = language_model(bert_tiny, tmp_path_factory.mktemp("sliced") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory):
    recipe = {
        "passes": [{"pass": "weight-only", "bits": 4, "group_size": 32}],
        "exports": ["compressed-tensors"],
        "evaluate": EVALUATE,
        "gates": {
            "kl_divergence[code]": "<= 9",
            "perplexity[*]": "<= +500%",
            "kl_divergence[verse]": "<= 9",
            "kl_divergence[*]": "<= 0",
        },
    }
    data = {
        name: "".join(json.dumps(row) + "\n" for row in rows)
        for name, rows in (("mixed", _rows()), ("chats", _chats()))
    }
    job = lay_out(tmp_path_factory.mktemp("job") / "job", model, recipe, data)
    return job, press(job)[1]


def _parts(subject: Subject, data: str) -> dict[str, Slice]:
    return {part.name: part for part in subject.slices if part.data == data}


def _value(part: Slice, name: str) -> float:
    return next(figure.value for figure in part.measurements if figure.name == name)


@pytest.mark.slow
def test_each_slice_is_measured_on_its_own_windows(done: tuple[Path, Report], model: Path):
    """The source's perplexity of a slice, computed in this process on the windows of that slice; no window mixes two."""
    from transformers import AutoModelForCausalLM

    job, report = done
    files = {name: job / "data" / f"{name}.jsonl" for name in ("mixed", "chats")}
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": EVALUATE})
    trial = quality.prepare(recipe, inspect_model(FolderFiles(model)), model, files, threads=1)
    sequences = trial.evaluations[0].scorer.examples.sequences
    assert [sequences.slices.count(name) for name in ("prose", "code", "chat", "verse", None)] == [17, 18, 17, 0, 8]
    tokenizer, network = open_tokenizer(model), AutoModelForCausalLM.from_pretrained(model).eval()
    for name, mark in (("prose", "the"), ("code", "():"), ("chat", "[user]")):
        kept = np.asarray([other == name for other in sequences.slices])
        pieces = set(tokenizer.encode(mark, special=False))
        others = {
            token
            for other in {"the", "()", "[user]"} - {mark, "()"}
            for token in tokenizer.encode(other, special=False)
        } - pieces
        assert pieces & set(sequences.ids[kept].ravel().tolist())
        assert name == "prose" or not others & set(sequences.ids[kept].ravel().tolist())
        with torch.inference_mode():
            logits = network(torch.from_numpy(sequences.ids[kept])).logits
        targets = torch.from_numpy(sequences.targets[kept])
        loss = torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
        assert _value(_parts(report.source, "mixed")[name], "perplexity") == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.slow
def test_the_report_has_every_slice_with_intervals_and_the_worst_first(done: tuple[Path, Report]):
    artifact = done[1].artifacts[0]
    parts = _parts(artifact, "mixed")
    assert set(parts) == {"prose", "code", "chat"}
    divergences = [_value(part, "kl_divergence") for part in parts.values()]
    assert divergences == sorted(divergences, reverse=True)
    assert all(value > 0 for value in divergences)
    for part in parts.values():
        names = {figure.name for figure in part.measurements}
        assert {"perplexity", "kl_divergence", "kl_p99", "top1_agreement", "rms_dp"} <= names
        assert all(figure.low <= figure.value <= figure.high for figure in part.measurements)
    page = (done[0] / "out" / "report.html").read_text()
    assert page.index("Slice by slice") < page.index("How to use it")


@pytest.mark.slow
def test_answers_of_a_chat_are_asked_for_with_the_models_own_template(done: tuple[Path, Report], model: Path):
    job, report = done
    for name, examples in (("chat", 12), ("plain", 12)):
        part = _parts(report.artifacts[0], "chats")[name]
        assert part.examples == examples
        assert 0 <= _value(part, "prefix_match") <= 1
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": EVALUATE[1:]})
    files = {"chats": job / "data" / "chats.jsonl"}
    trial = quality.prepare(recipe, inspect_model(FolderFiles(model)), model, files, threads=1)
    sequences, tokenizer = trial.evaluations[0].scorer.examples.sequences, open_tokenizer(model)
    first = sequences.ids[0][sequences.mask[0] > 0].tolist()
    expected = tokenizer.encode(f"[user] {_text(0, 6)} [assistant] ", special=False)
    assert first[-len(expected) :] == expected


@pytest.mark.slow
def test_built_in_texts_are_slices_for_a_newcomer(model: Path, bert_tiny: Path):
    """Prose, code and, with a template, chats: no text is in two of them, and the report names what was read."""
    for folder, kinds in ((model, {"prose", "code", "chat"}), (bert_tiny, {"prose", "code"})):
        rows = read_rows("builtin:slices", None, model_dir=folder)
        assert {row.slice for row in rows} == kinds
        texts = {kind: [row.text for row in rows if row.slice == kind] for kind in kinds}
        assert all(sum(map(len, some)) > 100_000 for some in texts.values())
        assert set(texts["prose"]) | set(texts["code"]) <= {
            row.text for kind in ("prose", "code") for row in read_rows(f"builtin:{kind}", None)
        }
    chats = texts_of(read_rows("builtin:slices", None, model_dir=model), "chat")
    assert all(chat.startswith("[user] ") and "[assistant] " in chat for chat in chats)
    assert not any(
        text in chat
        for text in texts_of(read_rows("builtin:slices", None, model_dir=model), "prose")[:50]
        for chat in chats
    )


def texts_of(rows: list[Row], kind: str) -> list[str]:
    return [row.text for row in rows if row.slice == kind]


@pytest.mark.slow
def test_a_job_without_data_of_its_own_has_the_worst_slice_first(model: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "weight-only", "bits": 4, "group_size": 32}],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "auto", "data": "builtin:slices", "samples": 36, "length": 24}],
        "gates": {"kl_divergence[*]": "<= 1000"},
    }
    _, report, _ = press(lay_out(tmp_path / "job", model, recipe))
    [artifact] = report.artifacts
    lost = [_value(part, "kl_divergence") for part in artifact.slices]
    assert {part.name for part in artifact.slices} == {"prose", "code", "chat"}
    assert lost == sorted(lost, reverse=True)
    assert report.verdict == "accepted"
    assert {(used.ref, used.purpose) for used in report.data} == {
        ("builtin:prose", "evaluation"),
        ("builtin:code", "evaluation"),
    }


def test_what_only_measures_is_no_text_to_learn_from():
    for given in (
        {"calibration": {"data": "builtin:slices"}, "passes": [{"pass": "gptq"}]},
        {"passes": [{"pass": "qat", "train": {"data": "builtin:slices"}}]},
    ):
        with pytest.raises(NightpressError, match="only measures"):
            parse_recipe({"name": "t", "exports": ["compressed-tensors"], **given})


@pytest.mark.slow
def test_gates_name_slices_and_miss_what_was_not_measured(done: tuple[Path, Report]):
    decided = {result.gate: result for result in done[1].gates}
    assert decided["kl_divergence[code] <= 9"].passed
    assert decided["perplexity[*] <= +500%"].passed
    assert not decided["kl_divergence[*] <= 0"].passed
    missed = decided["kl_divergence[verse] <= 9"]
    assert missed.observed is None
    assert "there are: " in missed.explanation
    assert done[1].verdict == "rejected"

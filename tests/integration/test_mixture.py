"""The default calibration text: equal shares of prose, code, chats and the model's own texts, the same ones for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import MIXTURE, Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.press import lay_out, press
from tests.training import classifier, language_model

_RECIPE = {"name": "r", "passes": [{"pass": "gptq"}], "exports": ["gguf"]}
_TEMPLATE = "{% for message in messages %}[unused1] {{ message.role }} : {{ message.content }} [unused2] {% endfor %}"


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = language_model(bert_tiny, tmp_path_factory.mktemp("model") / "lm")
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


def _samples(model: Path, work: Path, **options: int) -> torch.Tensor:
    work.mkdir(exist_ok=True)
    calibration = Calibration(data=MIXTURE, **{"samples": 10, "length": 48, **options})  # type: ignore[arg-type]
    header = inspect_model(FolderFiles(model))
    return calibration_samples(model, PassContext(header=header, work_dir=work, calibration=calibration))["input_ids"]


@pytest.mark.slow
def test_a_language_model_gets_all_kinds_by_turns(model: Path, tmp_path: Path):
    ids = _samples(model, tmp_path / "a", samples=40, length=200)
    assert ids.shape == (40, 200)
    tokenizer = open_tokenizer(model)
    for place, ref in enumerate(("builtin:prose", "builtin:code")):
        rows = read_rows(ref, None, purpose="calibration")
        windows = text_windows(rows, tokenizer, samples=10, length=200, ref=ref).ids
        assert np.array_equal(ids[place::4], windows)
    marker = tokenizer.encode("assistant :", special=False)
    chats = ids[2::4]
    assert any(chats[:, at : at + 2].tolist().count(marker) for at in range(199))
    # The model's own texts: each token could have been drawn from what the model expects, and none is always the most likely.
    own = ids[3::4]
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        ranks = (loaded(own).logits[:, 1:-2] > loaded(own).logits[:, 1:-2].gather(2, own[:, 2:-1, None])).sum(2)
    assert 0.1 < float((ranks.float() / loaded.config.vocab_size).mean()) < 0.6  # of random weights, nearly uniform
    assert len(np.unique(own[:, 1])) == len(own)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_texts_and_another_gives_others(model: Path, tmp_path: Path):
    first = _samples(model, tmp_path / "a", seed=1)
    assert torch.equal(first, _samples(model, tmp_path / "b", seed=1))
    other = _samples(model, tmp_path / "c", seed=2)
    assert not any(torch.equal(row, other[at]) for at, row in enumerate(first))
    (kept,) = (tmp_path / "a").glob("own-texts/*.npy")
    np.save(kept, np.full((2, 48), 1000))  # a later attempt reads what the first has written
    assert (_samples(model, tmp_path / "a", seed=1)[3::4] == 1000).all()


@pytest.mark.slow
def test_models_without_a_template_get_no_chats_and_encoders_get_prose(model: Path, bert_tiny: Path, tmp_path: Path):
    plain = language_model(bert_tiny, tmp_path / "plain")
    ids = _samples(plain, tmp_path / "a", samples=6)
    tokenizer = open_tokenizer(plain)
    code = read_rows("builtin:code", None, purpose="calibration")
    assert np.array_equal(ids[1::3], text_windows(code, tokenizer, samples=2, length=48, ref="x").ids)
    encoder = classifier(bert_tiny, tmp_path / "encoder", blocks=1)
    prose = text_windows(
        read_rows("builtin:prose", None, purpose="calibration"), tokenizer, samples=10, length=48, ref="x"
    )
    assert np.array_equal(_samples(encoder, tmp_path / "b"), prose.ids)


@pytest.mark.slow
def test_a_job_tells_which_texts_it_used(model: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "gptq", "group_size": 16}],
        "calibration": "auto",
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "perplexity", "data": "builtin:code", "samples": 4, "length": 32}],
    }
    job = lay_out(tmp_path / "job", model, recipe)
    spec = json.loads((job / "spec.json").read_text())
    assert spec["recipe"]["calibration"]["data"] == MIXTURE
    spec["recipe"]["calibration"] |= {"samples": 8, "length": 32}
    (job / "spec.json").write_text(json.dumps(spec))
    _, report, _ = press(job)
    used = {(data.ref, data.purpose) for data in report.data}
    assert used == {("builtin:prose", "calibration"), ("builtin:code", "calibration"), ("builtin:code", "evaluation")}
    assert len({data.sha256 for data in report.data}) == 3
    assert {data.license for data in report.data} == {"public domain"}


def test_recipes_get_the_mixture_unless_they_say_otherwise():
    raw = {**_RECIPE, "passes": [{"pass": "gptq", "group_size": 16}], "exports": ["compressed-tensors"]}
    given = [{}, {"calibration": "auto"}, {"calibration": {"samples": 8}}, {"calibration": {"packing": False}}]
    found = [parse_recipe({**raw, **calibration}).calibration.data for calibration in given]
    assert found == ["builtin:mixture", "builtin:mixture", "builtin:mixture", "builtin:prose"]


def test_it_is_for_the_calibration_alone():
    assert parse_recipe({**_RECIPE, "calibration": "auto"}).data_refs() == set()
    measured = {**_RECIPE, "evaluate": [{"metric": "auto", "data": MIXTURE}]}
    assert parse_recipe(measured).data_refs() == {MIXTURE}  # a data set that nobody has
    with pytest.raises(NightpressError, match="packing"):
        parse_recipe({**_RECIPE, "calibration": {"data": MIXTURE, "packing": False}})

"""Bad input ends a job with an error that names the fault and says what to do. No partial result is left."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nightpress.core.errors import ErrorCode, NightpressError
from tests.models import bert_tiny_dir
from tests.press import lay_out, press

MAGNITUDE = {"passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}


def fails(job: Path) -> NightpressError:
    with pytest.raises(NightpressError) as caught:
        press(job)
    assert not list((job / "out").iterdir())
    assert caught.value.hint
    return caught.value


@pytest.fixture
def model(tmp_path: Path):
    return bert_tiny_dir(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, model: Path, bad: float):
    tensors = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = bad
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = fails(lay_out(tmp_path / "job", model, MAGNITUDE))
    assert error.code == ErrorCode.NUMERICAL_FAILURE
    assert name in error.message
    assert error.details["tensors"] == [name]


@pytest.mark.slow
def test_outputs_that_are_no_numbers_are_said_to_be_the_models(tmp_path: Path, model: Path):
    tensors = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name] = np.full_like(tensors[name], 3e38)  # finite, but the sums of its products overflow
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = fails(lay_out(tmp_path / "job", model, MAGNITUDE))
    assert error.code == ErrorCode.NUMERICAL_FAILURE
    assert "source model gives outputs that are not finite" in error.message


def test_a_tokenizer_of_another_model_is_found_out(tmp_path: Path, model: Path):
    tensors = load_file(model / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    for key, value in tensors.items():
        if value.shape and value.shape[0] == 30522:
            tensors[key] = value[:1500].copy()
    assert tensors[name].shape == (1500, 128)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 1500}
    (model / "config.json").write_text(json.dumps(config))
    error = fails(lay_out(tmp_path / "job", model, MAGNITUDE))
    assert error.code == ErrorCode.MALFORMED_MODEL
    assert "1500" in error.message


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, model: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    error = fails(lay_out(tmp_path / "job", model, MAGNITUDE))
    assert error.code == ErrorCode.MALFORMED_MODEL
    assert "tokenizer" in error.message


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, model: Path):
    (model / "tokenizer.json").write_text('{"model": {"type": "NoSuch"}}')
    assert fails(lay_out(tmp_path / "job", model, MAGNITUDE)).code == ErrorCode.MALFORMED_MODEL


def test_an_unknown_architecture_is_refused(tmp_path: Path, model: Path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "mystery", "architectures": ["MysteryModel"]})
    )
    assert fails(lay_out(tmp_path / "job", model, MAGNITUDE)).code == ErrorCode.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no text"),
        ("\n \n", "no text"),
        ('{"text": "one short row"}\n', "fewer than two"),
        ('{"text": "fine"}\n{"txt": "no"}\n', "line 2"),
        ('{"text": "fine"}\nnot json\n', "line 2"),
        ('{"text": "fine", "label": 1}\n{"text": " ", "label": 0}\n', "a single usable example"),
    ],
)
def test_an_unusable_data_set_is_refused(tmp_path: Path, model: Path, text: str, said: str):
    recipe = MAGNITUDE | {"evaluate": [{"metric": "fidelity", "data": "mine", "length": 64}]}
    error = fails(lay_out(tmp_path / "job", model, recipe, {"mine": text}))
    assert error.code == ErrorCode.INVALID_DATA
    assert said in error.message


def test_a_data_set_that_was_not_handed_over_is_refused(tmp_path: Path, model: Path):
    recipe = MAGNITUDE | {"evaluate": [{"metric": "fidelity", "data": "mine"}]}
    assert fails(lay_out(tmp_path / "job", model, recipe)).code == ErrorCode.INVALID_DATA


def test_a_length_beyond_the_model_is_refused(tmp_path: Path, model: Path):
    recipe = MAGNITUDE | {"evaluate": [{"metric": "latency", "length": 4096}]}
    error = fails(lay_out(tmp_path / "job", model, recipe))
    assert error.code == ErrorCode.INVALID_RECIPE
    assert "512" in error.message


@pytest.mark.slow
def test_a_full_disk_is_called_by_its_name(tmp_path: Path, model: Path):
    """The kernel's limit on a file's size replaces a full disk: the pass can't write its 17 MB."""
    recipe = MAGNITUDE | {"evaluate": [{"metric": "latency", "length": 8, "repeats": 3}]}
    job = lay_out(tmp_path / "job", model, recipe)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        error = fails(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert error.code == ErrorCode.DISK_FULL


@pytest.mark.slow
def test_weights_that_do_not_fit_the_config_are_said_so(tmp_path: Path, model: Path):
    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 256}
    (model / "config.json").write_text(json.dumps(config))
    error = fails(lay_out(tmp_path / "job", model, MAGNITUDE))
    assert error.code == ErrorCode.MALFORMED_MODEL
    assert "config.json" in error.message + error.hint


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"text": "fine"}\n[1]\n', "line 2 is no JSON object"),
        ('{"tokens": ["a"], "tags": ["O"]}\n', "no `text`"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, model: Path, rows: str, said: str):
    recipe = MAGNITUDE | {"evaluate": [{"metric": "fidelity", "data": "mine"}]}
    error = fails(lay_out(tmp_path / "job", model, recipe, {"mine": rows}))
    assert error.code == ErrorCode.INVALID_DATA
    assert said in error.message

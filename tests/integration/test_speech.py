"""Whisper: sounds as spectrograms, both graphs in int8, and OpenVINO's own pipeline as a consumer."""

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from nightpress.core.compress.data.decoder_text import first_tokens
from nightpress.core.compress.data.sounds import read_sounds
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.export import openvino as to_openvino
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.passes import PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.usage import run_usage

_SPECIAL = (
    "endoftext",
    "startoftranscript",
    "en",
    "transcribe",
    "translate",
    "startofprev",
    "nospeech",
    "notimestamps",
)
_LETTERS = 256


def save_whisper(folder: Path, seconds: int) -> Path:
    """A tiny Whisper with random weights that hears sounds of so many seconds, with a byte-level tokenizer."""
    letters = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    times = [f"<|{at * 0.02:.2f}|>" for at in range(1501)]
    tokenizer.add_special_tokens([*(f"<|{name}|>" for name in _SPECIAL), *times])
    ids = {name: _LETTERS + at for at, name in enumerate(_SPECIAL)}
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end, unk_token=end
    ).save_pretrained(folder)
    torch.manual_seed(5)
    config = WhisperConfig(
        vocab_size=_LETTERS + len(_SPECIAL) + len(times),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50 * seconds,
        decoder_start_token_id=ids["startoftranscript"],
        eos_token_id=ids["endoftext"],
        pad_token_id=ids["endoftext"],
        bos_token_id=ids["endoftext"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "encoder_attn" in name else 4 if parameter.ndim > 1 else 1)
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    said = {
        "decoder_start_token_id": ids["startoftranscript"],
        "eos_token_id": ids["endoftext"],
        "pad_token_id": ids["endoftext"],
        "bos_token_id": ids["endoftext"],
        "max_length": 448,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": ids["en"]},
        "task_to_id": {"transcribe": ids["transcribe"], "translate": ids["translate"]},
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "suppress_tokens": list(
            range(_LETTERS, config.vocab_size)
        ),  # a model that was never trained says anything else
        "begin_suppress_tokens": [],
    }
    (folder / "generation_config.json").write_text(json.dumps(said))
    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
    return folder


def tone(hertz: float, seconds: float, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(sound: np.ndarray, rate: int, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.repeat((sound * 2**15).astype("<i2")[:, None], channels, axis=1).tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper") / "short", 1)


def test_a_users_sounds_become_what_the_models_own_extractor_makes_of_them(short: Path, tmp_path: Path):
    rows = [
        {"audio": {"bytes": wav(tone(440, 0.8), 16_000), "path": "a.wav"}, "text": "one"},
        {"audio": {"bytes": wav(tone(440, 0.8, 48_000), 48_000, channels=2), "path": "b.wav"}, "text": "two"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sounds.parquet")
    header = inspect_model(FolderFiles(short))
    found = read_sounds("mine", tmp_path / "sounds.parquet", short, header, samples=2, seed=0)
    by_text = dict(zip(found.texts, found.features, strict=True))
    theirs = WhisperFeatureExtractor.from_pretrained(short)(tone(440, 0.8), sampling_rate=16_000, return_tensors="np")
    np.testing.assert_allclose(by_text["one"], theirs["input_features"][0], atol=0.02)  # 16 bits
    np.testing.assert_allclose(by_text["two"].mean(), by_text["one"].mean(), atol=0.05)


@pytest.mark.parametrize("broken", [b"no sound", wav(tone(440, 0.1), 16_000)[:30], "no bytes"])
def test_a_broken_sound_is_named_by_its_row(broken: Any, short: Path, tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([{"audio": broken}]), tmp_path / "sounds.parquet")
    with pytest.raises(NightpressError, match="row 1"):
        read_sounds("mine", tmp_path / "sounds.parquet", short, inspect_model(FolderFiles(short)), samples=1, seed=0)


def test_the_decoder_starts_as_the_folder_says(short: Path):
    ids = {name: _LETTERS + at for at, name in enumerate(_SPECIAL)}
    told = ("startoftranscript", "en", "transcribe", "notimestamps")
    assert first_tokens(short, inspect_model(FolderFiles(short))) == tuple(ids[name] for name in told)


def test_a_pass_that_would_calibrate_on_texts_is_refused(short: Path):
    header = inspect_model(FolderFiles(short))
    with pytest.raises(NightpressError, match="hears"):
        make_plan(parse_recipe({"name": "r", "passes": [{"pass": "gptq"}], "exports": ["compressed-tensors"]}), header)
    plan = make_plan(parse_recipe({"name": "r", "passes": [{"pass": "static-int8"}], "exports": ["onnx"]}), header)
    assert any("synthetic" in warning for warning in plan.warnings)


@pytest.mark.slow
def test_a_whole_job_measures_what_a_whisper_writes(short: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "static-int8"}],
        "exports": ["onnx"],
        "calibration": {"samples": 8, "length": 24},
        "evaluate": [
            {"metric": "auto", "samples": 6, "length": 16},
            {"metric": "generation", "samples": 4, "length": 16, "new_tokens": 6},
        ],
    }
    job = lay_out(tmp_path / "job", short, recipe)
    _, report, _ = press(job)
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.value > 0.99
    found = {figure.name: figure.value for figure in artifact.measurements}
    assert found["centred_cosine"] > 0.95
    assert found["prefix_match"] > 0.5
    # Six products of the encoder's block, ten of the decoder's, and the head. Some of them may stay in float: more where the
    # processor has no instructions for int8, because weights have 7 bits there.
    assert len([layer for layer in report.passes[0].layers if "embed" not in layer.name]) == 17
    assert report.passes[0].summary["matrices"] >= 7
    assert run_usage(artifact, job / "out").endswith("\n")


@pytest.mark.slow
def test_openvinos_pipeline_writes_what_transformers_writes(tmp_path: Path):
    genai = pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")
    tokenizers = pytest.importorskip("openvino_tokenizers", reason="openvino-tokenizers is not installed")
    import openvino

    source = save_whisper(tmp_path / "source", 30)  # the pipeline hears 30 seconds
    header = inspect_model(FolderFiles(source))
    features = np.zeros((1, *header.features), np.float32)
    check = Sequences(features, np.ones((1, 1), np.int64), decoder=np.array([first_tokens(source, header)]))
    (tmp_path / "work").mkdir()
    traced = trace(source, header, check, PassContext(header=header, work_dir=tmp_path / "work"))
    folder = tmp_path / "openvino"
    to_openvino.save(source, folder, traced, [])
    plain = transformers.AutoTokenizer.from_pretrained(source)
    for name, model in zip(
        ("tokenizer", "detokenizer"), tokenizers.convert_tokenizer(plain, with_detokenizer=True), strict=True
    ):
        openvino.save_model(model, folder / f"openvino_{name}.xml")
    pipeline = genai.WhisperPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    model = WhisperForConditionalGeneration.from_pretrained(source).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(source)
    said = []
    for hertz in (300, 2500):
        sound = tone(hertz, 3)
        ours = pipeline.generate(sound.tolist(), max_new_tokens=10, language="<|en|>", task="transcribe")
        heard = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
        theirs = model.generate(heard, max_new_tokens=10, language="en", task="transcribe", num_beams=1)
        said.append(plain.decode(theirs[0], skip_special_tokens=True))
        assert ours.texts[0] == said[-1]
        assert len(said[-1]) > 4
    assert said[0] != said[1]  # what it hears decides what it writes

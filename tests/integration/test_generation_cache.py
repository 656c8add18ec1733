"""A decoder's cache drops or rounds exactly what the options ask for, and the folder loads with transformers alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from nightpress.core.compress import report as reports
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.model.generation_cache import (
    PrefixStore,
    QuantizedLayer,
    SlidingLayer,
    cache_bytes,
    cache_for,
    pack,
    unpack,
)
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import classifier, language_model, run_pass

SPEED = {"metric": "generation-speed", "prompt": [12, 40], "tokens": 6, "repeats": 3}
SLIDING = {"mode": "sliding", "sinks": 3, "window": 20}
QUANTIZED = {"mode": "quantized", "bits": 4, "residual": 8}


@pytest.fixture(scope="module")
def source(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(bert_tiny, tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def written(model: Any, ids: torch.Tensor, new: int = 12, **how: Any) -> list[int]:
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        **how,
    )
    return out[0, ids.shape[1] :].tolist()


def text(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [SLIDING, QUANTIZED])
def test_a_text_within_the_window_is_written_as_without_a_cache(model: Any, settings: dict[str, Any]):
    room = 23 if settings is SLIDING else 8
    ids, new = text(room // 2), room - room // 2
    cached = written(model, ids, new, past_key_values=cache_for(model, settings))
    assert cached == written(model, ids, new, use_cache=False)


def test_a_sliding_cache_sees_what_a_text_of_its_sinks_and_window_alone_would_show(model: Any):
    # In a single layer, keys depend only on their token: the cache equals that of the text without its middle.
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    config = model.config.__class__.from_dict(model.config.to_dict() | {"num_hidden_layers": 1})
    single = LlamaForCausalLM(config).eval()
    ids = text(60)
    cache = cache_for(single, SLIDING)
    with torch.inference_mode():
        for at in range(60):
            logits = single(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        cut = torch.cat([ids[:, :3], ids[:, 60 - 21 :]], dim=1)
        expected = single(input_ids=cut, use_cache=False).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-5)
    assert cache.layers[0].keys.shape[-2] == 23


def test_a_sliding_cache_holds_no_more_however_long_the_text_grows(model: Any):
    sizes = []
    for length in (30, 120):
        cache = cache_for(model, SLIDING)
        with torch.inference_mode():
            model(input_ids=text(length), past_key_values=cache, use_cache=True)
        sizes.append(cache_bytes(cache))
        assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1] == 4 * 2 * 23 * 2 * 8 * 4  # layers, keys and values, tokens, heads, width, bytes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [-2, -1])
def test_rounding_errs_by_half_a_step_at_most(bits: int, dim: int):
    states = torch.randn(2, 3, 5, 32, 16, generator=torch.Generator().manual_seed(bits))
    codes, step, low = pack(states, bits, dim=dim)
    assert codes.nbytes == states.numel() * bits // 8
    found = unpack(codes, step, low, bits=bits, dim=dim)
    # Half a step, plus the rounding of the step and of the lowest value to float16.
    assert ((found - states).abs() <= 0.5 * step.float() + 4e-3).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.13), (4, 0.19), (8, 0.32)])
def test_what_is_rounded_takes_its_bits_and_is_never_rounded_again(bits: int, share: float):
    layer = QuantizedLayer(bits, residual=16)
    states = torch.randn(1, 2, 400, 64, generator=torch.Generator().manual_seed(0))
    for start in range(0, 400, 8):
        part = states[:, :, start : start + 8]
        keys, values = layer.update(part, part)
        if start == 96:
            early = keys[:, :, :32].clone()
    assert keys.shape == values.shape == states.shape
    assert torch.equal(keys[:, :, :32], early)
    assert torch.equal(keys[:, :, -16:], states[:, :, -16:])
    whole = 2 * states.nbytes
    held = sum(tensor.nbytes for tensor in (layer.keys, layer.values, *layer.packed))
    assert held < share * whole + 2 * 48 * 2 * 64 * 4


def test_beams_take_their_rounded_tokens_along():
    layer = QuantizedLayer(8, residual=0)
    states = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    layer.update(states, states)
    layer.reorder_cache(torch.tensor([1, 1]))
    keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert torch.equal(keys[0, :, :64], keys[1, :, :64])
    assert torch.allclose(keys[0, :, :64], states[1], atol=0.05)


def test_a_dropped_or_rounded_token_can_not_be_taken_back():
    for layer in (SlidingLayer(1, 4, torch.ones(2)), QuantizedLayer(4, 8)):
        with pytest.raises(ValueError, match="cut back"):
            layer.crop(-1)


# Reused prefixes -----------------------------------------------------------------------------------------------------


def read(model: Any, store: PrefixStore, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    cache, known = store.take(ids[0])
    with torch.inference_mode():
        logits = model(input_ids=ids[:, known:], past_key_values=cache, use_cache=True).logits[0, -1]
    store.put(ids[0], cache)
    return logits, known


def test_a_known_beginning_is_not_read_again_and_changes_nothing(model: Any):
    store = PrefixStore(10**7)
    first, second = text(30), torch.cat([text(24), text(10, seed=2)], dim=1)
    read(model, store, first)
    logits, known = read(model, store, second)
    assert known == 24
    with torch.inference_mode():
        assert torch.allclose(logits, model(input_ids=second, use_cache=False).logits[0, -1], atol=1e-5)
    # The last token is always computed: its logits are needed to choose the next token.
    assert read(model, store, first)[1] == 29
    # A text that continues a known text replaces it.
    count = len(store)
    read(model, store, torch.cat([second, text(5, seed=3)], dim=1))
    assert len(store) == count


def test_the_store_keeps_within_its_bytes_and_lets_the_least_used_go(model: Any):
    texts = [text(20, seed=seed) for seed in range(4)]
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=texts[0], past_key_values=cache, use_cache=True)
    each = cache_bytes(cache) + texts[0].nbytes
    store = PrefixStore(3 * each)
    for ids in texts[:3]:
        read(model, store, ids)
    for at in (0, 0, 2):
        read(model, store, texts[at])
    read(model, store, texts[3])
    assert store.used == 3 * each
    known = [store.take(ids[0])[1] for ids in texts]
    assert known == [19, 0, 19, 19]
    assert not PrefixStore(each - 1).put(texts[0][0], cache)


# The artifact --------------------------------------------------------------------------------------------------------

#: A user's program, which runs in a process without Nightpress.
_ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
found = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    out = []
    for length in (10, 50, 50):
        ids = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(1))
        text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=12, max_new_tokens=12)
        out.append(text[0, length:].tolist())
    found.append([out, len(getattr(model, "_prefix_store", ()))])
assert not any(name.startswith("core") for name in sys.modules)
print(json.dumps(found))
"""
_EXACT: list[dict[str, Any]] = [{"mode": "static", "length": 64}, {"prefix_bytes": 10**7}]


@pytest.mark.slow
def test_the_folders_write_with_their_caches_in_the_hands_of_transformers(source: Path, model: Any, tmp_path: Path):
    ways = [*_EXACT, SLIDING, QUANTIZED]
    folders, settings = [], []
    for at, options in enumerate(ways):
        pressed, record = run_pass(source, tmp_path / str(at), {"pass": "generation-cache", **options})
        assert record.summary["against_no_cache"]["tokens_alike"] == 1
        folders.append(tmp_path / f"exported-{at}")
        safetensors.save(pressed, folders[-1])
        settings.append(json.loads((folders[-1] / "generation_config.json").read_bytes()))
        assert settings[-1]["use_cache"] is True
        assert settings[-1]["eos_token_id"] == 102  # the existing settings stay
    run = subprocess.run(
        [sys.executable, "-I", "-c", _ELSEWHERE, *map(str, folders)],
        env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    plain = written(model, text(10), use_cache=False), written(model, text(50), use_cache=False)
    for options, given, ((short, long, again), stored) in zip(ways, settings, json.loads(run.stdout), strict=True):
        assert long == again
        assert bool(stored) == ("prefix_bytes" in options)
        if options in _EXACT:
            assert (short, long) == plain
        else:
            assert long == written(model, text(50), past_key_values=cache_for(model, given["cache_config"]))


@pytest.mark.slow
def test_a_job_measures_it_beside_no_cache_and_the_report_shows_both(source: Path, tmp_path: Path):
    pass_ = {"pass": "generation-cache", **SLIDING}
    recipe = {
        "passes": [pass_],
        "exports": ["safetensors"],
        "evaluate": [SPEED],
        "gates": {"decode_tokens_per_s": "> 0"},
    }
    _, report, _ = press(lay_out(tmp_path / "job", source, recipe))
    (artifact,) = report.artifacts
    shapes = [(timing.prompt, timing.tokens, timing.cached) for timing in artifact.generation]
    assert shapes == [(12, 6, True), (40, 6, True), (12, 4, False), (40, 4, False)]
    # While the text fits into the window, the tokens are the same as without a cache.
    assert artifact.generation[2].alike == 1
    assert [timing.alike for timing in report.source.generation[2:]] == [1, 1]
    assert report.gates[0].observed == min(timing.decode_tokens_per_s for timing in artifact.generation[:2])
    assert artifact.verification is not None
    assert "trust_remote_code=True" in artifact.verification.load_snippet
    page = reports.render_html(report)
    for expected in ("What the cache keeps", "safetensors, no cache", "Decoded tokens/s", "40, 4 written, no cache"):
        assert expected in page
    assert "What the cache keeps" in reports.render_markdown(report)


def test_no_cache_at_all_can_be_asked_for(source: Path, model: Any, tmp_path: Path):
    folder, record = run_pass(source, tmp_path / "work", {"pass": "generation-cache", "mode": "none"})
    assert json.loads((folder / "generation_config.json").read_bytes())["use_cache"] is False
    assert record.summary["cache_bytes"] == []


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "static"}, "length"),
        ({"mode": "sliding"}, "window"),
        ({"mode": "sliding", "window": 4, "sinks": 4}, "not more than the 4 `sinks`"),
        ({"mode": "sliding", "window": 20, "bits": 8}, "`bits` is for `mode: quantized`"),
        ({"mode": "quantized", "prefix_bytes": 1000}, "`prefix_bytes` is for `mode: dynamic`"),
        ({"mode": "quantized", "bits": 3}, "bits"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(NightpressError) as error:
        _recipe(options)
    assert error.value.code is ErrorCode.INVALID_RECIPE
    assert says in str(error.value)


def _with(changes: dict[str, Any]) -> Callable[[Path, Path], Path]:
    def make(bert_tiny: Path, folder: Path) -> Path:
        language_model(bert_tiny, folder)
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (classifier, {}, "classification"),
        (language_model, {"mode": "static", "length": 4096}, "2048 positions"),
        (_with({"model_type": "gpt2"}), SLIDING, "no rotary positions"),
        (_with({"sliding_window": 64}), QUANTIZED, "window of their own"),
        (
            _with({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}),
            SLIDING,
            "(dynamic)",
        ),
    ],
)
def test_a_model_that_can_not_is_refused_with_the_reason(
    make: Callable[[Path, Path], Path], options: dict[str, Any], says: str, bert_tiny: Path, tmp_path: Path
):
    header = inspect_model(FolderFiles(make(bert_tiny, tmp_path / "model")))
    with pytest.raises(NightpressError) as error:
        make_plan(_recipe(options), header)
    assert error.value.code is ErrorCode.INVALID_RECIPE
    assert says in str(error.value)


def test_a_draft_needs_a_cache_that_can_be_cut_back(source: Path):
    recipe = {
        "name": "r",
        "passes": [{"pass": "generation-cache", **SLIDING}, {"pass": "early-exit", "train": {"data": "builtin:prose"}}],
        "exports": ["safetensors"],
    }
    with pytest.raises(NightpressError, match="cut back"):
        make_plan(parse_recipe(recipe), inspect_model(FolderFiles(source)))


def _recipe(options: dict[str, Any]) -> Any:
    return parse_recipe({"name": "r", "passes": [{"pass": "generation-cache", **options}], "exports": ["safetensors"]})

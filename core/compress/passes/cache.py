"""generation-cache: measures the effect of a key/value cache, and writes its settings into generation_config.json."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.model.companions import copy_folder
from nightpress.core.compress.model.generation_cache import PrefixStore, cache_bytes, cache_for
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes.decoding import change_settings, prompts
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord, Series
from nightpress.core.recipes.passes.caching import GenerationCache

_TEXTS, _NEW = 2, 16  #: number of texts in each check, tokens generated after each
_LENGTHS = (64, 256, 1024)  #: text lengths in tokens at which the cache's bytes are measured
_PREFIX, _OWN = 256, 16  #: tokens of a prefix that was read before, and of the new text after it
_NEAR = 1e-3  #: tolerated difference as a share of the largest logit; another order of summation changes less

#: Settings of an earlier cache.
_STALE = frozenset({"use_cache", "cache_implementation", "cache_config", "max_cache_len"})


@folder_pass(GenerationCache)
def generation_cache(source: Path, target: Path, options: GenerationCache, context: PassContext) -> PassRecord:
    """Compare greedy decoding with the cache to decoding without a cache, measure the cache's bytes, and write the settings.

    Raises NightpressError(numerical_failure) if the cache should be exact at the tested length and its logits differ by more than `_NEAR`.
    """
    start = time.monotonic()
    torch.set_num_threads(context.threads)
    model = load_model(source, context.header).to(context.device)
    longest = min(context.header.positions or max(_LENGTHS), max(_LENGTHS)) - _NEW
    text = prompts(source, "builtin:prose", context, count=_TEXTS, length=longest)
    context.progress(0.1, "decoding without a cache")
    summary: dict[str, Any] = {"mode": options.mode, "settings": options.settings()}
    short = int(max(2, min(32, longest, options.exact_to - _NEW)))
    if options.mode != "none":
        near = _compare(model, text[:, :short], options, {"use_cache": False})
        if options.exact_to >= short + _NEW and near["logit_difference"] > _NEAR:
            raise NightpressError(
                ErrorCode.NUMERICAL_FAILURE,
                f"`generation-cache`: with the cache the model answers differently than without one, by {near['logit_difference']:.2g} of its largest logit.",
                hint="Use `mode: dynamic`, or say on the project's page which model this is.",
            )
        summary["against_no_cache"] = near
    if short + _NEW < options.exact_to < longest:
        context.progress(0.4, "decoding longer texts")
        beyond = int(min(longest, 2 * options.exact_to))
        summary["beyond"] = _compare(model, text[:, :beyond], options, {})
    context.progress(0.6, "weighing the cache")
    lengths = sorted({min(length, longest) for length in _LENGTHS})
    weighed = [_weigh(model, text[:1, :length], options) for length in lengths] if options.mode != "none" else []
    summary["cache_bytes"] = weighed
    if options.prefix_bytes is not None:
        context.progress(0.8, "reading a known beginning again")
        summary["prefix"] = _reuse(model, text, options.prefix_bytes)
    copy_folder(source, target)
    change_settings(target, options.settings(), without=_STALE)
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary=summary,
        series=tuple(
            Series(
                name=name,
                x=tuple(timing["tokens"] for timing in weighed),
                y=tuple(timing[key] / 1e6 for timing in weighed),
                x_label="tokens",
            )
            for name, key in ((f"MB kept, {options.mode}", "bytes"), ("MB kept, dynamic", "dynamic_bytes"))
            if len(weighed) > 1
        ),
    )


def _kwargs(model: Any, options: GenerationCache) -> dict[str, Any]:
    """Return the arguments of `generate` for one call with the cache. A cache object must not be reused."""
    settings = options.settings()
    own = settings.pop("cache_config", None)
    if own is not None and own["mode"] != "dynamic":
        settings["past_key_values"] = cache_for(model, own)
    return settings


def _compare(model: Any, texts: Tensor, options: GenerationCache, reference: dict[str, Any]) -> dict[str, Any]:
    """Decode greedily after each text, with the cache and with the arguments `reference`, and compare.

    texts [N, S]. `tokens_alike` is the share of tokens before the first difference. `logit_difference` is relative to the largest logit; it
    is measured up to and including the first differing token.
    """
    alike, difference = 0, 0.0
    for ids in texts:
        ours, theirs = (_write(model, ids[None], kwargs) for kwargs in (_kwargs(model, options), reference))
        differ = (ours[0] != theirs[0]).nonzero()
        same = int(differ[0]) if len(differ) else _NEW
        alike += same
        ahead = slice(0, min(same + 1, _NEW))  # the first differing token still has the same text before it
        gap = (ours[1][ahead] - theirs[1][ahead]).abs().max() / theirs[1][ahead].abs().max()
        difference = max(difference, float(gap))
    return {
        "prompt": texts.shape[1],
        "tokens": _NEW,
        "texts": len(texts),
        "tokens_alike": alike / (_NEW * len(texts)),
        "logit_difference": difference,
    }


def _write(model: Any, ids: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the _NEW tokens that the model generates after the prompt `ids` [1, S], and their logits [_NEW, V] float32."""
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=_NEW,
        max_new_tokens=_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **({"use_cache": True} | settings),
    )
    return found.sequences[0, ids.shape[1] :], torch.cat(found.logits).float()


def _weigh(model: Any, ids: Tensor, options: GenerationCache) -> dict[str, int]:
    """Return the bytes of the cache, and of a dynamic cache, after reading a text `ids` [1, S]."""
    from transformers import StaticCache

    given = _kwargs(model, options)
    cache = given.get("past_key_values")
    if options.mode == "static":
        cache = StaticCache(config=model.config, max_cache_len=max(options.length or 0, ids.shape[1]))
    sizes = []
    for used in (cache, None):
        with torch.inference_mode():
            out = model(input_ids=ids, past_key_values=used, use_cache=True, logits_to_keep=1)
        sizes.append(cache_bytes(out.past_key_values))
    return {"tokens": ids.shape[1], "bytes": sizes[0], "dynamic_bytes": sizes[1]}


def _reuse(model: Any, text: Tensor, limit: int) -> dict[str, Any]:
    """Time reading a prompt whose prefix was read before: without a cache, and with the prefix's keys and values from the store.

    limit: bytes that the store may hold.
    """
    length = min(_PREFIX, text.shape[1] - _OWN)
    known, asked = text[:1, :length], torch.cat([text[:1, :length], text[1:2, :_OWN]], dim=1)
    store = PrefixStore(limit)
    with torch.inference_mode():
        cache, _ = store.take(known[0])
        model(input_ids=known, past_key_values=cache, use_cache=True, logits_to_keep=1)
        store.put(known[0], cache)
        took: dict[bool, list[float]] = {False: [], True: []}
        answers = {}
        reused = 0
        for _ in range(3):
            for reuses in (False, True):
                began = time.perf_counter()
                cache, found = store.take(asked[0]) if reuses else (None, 0)
                reused = max(reused, found)
                out = model(input_ids=asked[:, found:], past_key_values=cache, use_cache=True, logits_to_keep=1)
                took[reuses].append(time.perf_counter() - began)
                answers[reuses] = out.logits[0, -1].float()
    gap = (answers[True] - answers[False]).abs().max() / answers[False].abs().max()
    return {
        "prompt": asked.shape[1],
        "reused": reused,
        "kept_bytes": store.used,
        "prefill_tokens_per_s": asked.shape[1] / min(took[False]),
        "prefill_tokens_per_s_reused": asked.shape[1] / min(took[True]),
        "logit_difference": float(gap),
        "same_token": bool(answers[True].argmax() == answers[False].argmax()),
    }

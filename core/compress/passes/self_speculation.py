"""Self-speculative decoding: a language model drafts tokens with its first blocks, and checks many of them in one pass of all blocks.

Greedy decoding gives the full model's tokens, whatever the draft is (LayerSkip, arXiv 2404.16710; transformers' `assistant_early_exit`).
The best depth for drafts depends on the model, so this pass measures it.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.model.companions import copy_folder
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes.decoding import change_settings, prompts
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.depth import depth
from nightpress.core.recipes.passes.adapt import EarlyExit

_PROMPTS, _PROMPT, _NEW = 4, 32, 48  #: number of texts, tokens of each, tokens generated after each


def speculate(source: Path, target: Path, options: EarlyExit, context: PassContext) -> PassRecord:
    """Time greedy decoding with drafts of several depths, and write the fastest depth into generation_config.json.

    A depth must give the tokens of decoding without drafts. If the recipe names no `exits`, it must also be faster than that; else nothing
    is written.
    """
    start = time.monotonic()
    torch.set_num_threads(context.threads)
    model = load_model(source, context.header).to(context.device)
    model.config.use_cache = True
    texts = [row[None] for row in prompts(source, options.train.data, context, count=_PROMPTS, length=_PROMPT)]
    total = depth(context.header)
    tried = options.exits or tuple(sorted({max(1, total // 8), max(1, total // 4), max(1, total // 2)}))
    _decode(model, texts[:1], None)  # warm
    plain, answers = _decode(model, texts, None)
    rows_found: list[dict[str, Any]] = []
    for at, block in enumerate(tried):
        blocks = block + 1 if options.exits else block
        context.progress((at + 1) / (len(tried) + 1), f"drafting with {blocks} of {total} blocks")
        rate, found = _decode(model, texts, blocks)
        equal = sum(torch.equal(a, b) for a, b in zip(found, answers, strict=True))
        rows_found.append({"blocks": blocks, "tokens_per_second": rate, "speedup": rate / plain, "equal": equal})
    right = [row for row in rows_found if row["equal"] == len(texts)]
    best = max(right, key=lambda row: row["tokens_per_second"], default=None)
    chosen = best["blocks"] if best is not None and (best["speedup"] > 1 or options.exits) else None
    copy_folder(source, target)
    if chosen is not None:
        change_settings(target, {"assistant_early_exit": chosen})
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "draft_blocks": chosen,
            "blocks": total,
            "tokens_per_second_without": plain,
            "tried": rows_found,
            "prompts": len(texts),
            "new_tokens": _NEW,
            "trained": False,
        },
    )


def _decode(model: Any, prompts: list[Tensor], draft: int | None) -> tuple[float, list[Tensor]]:
    """Decode greedily after each prompt [1, L]. Return generated tokens per second, and the token ids [1, L + new] of each text.

    draft: number of blocks that draft; None: no drafts.
    """
    began = time.perf_counter()
    made = 0
    answers = []
    for ids in prompts:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW,
            do_sample=False,
            assistant_early_exit=draft,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
        made += out.shape[1] - ids.shape[1]
        answers.append(out.cpu())
    return made / (time.perf_counter() - began), answers

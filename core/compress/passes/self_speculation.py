"""Self-speculative decoding: a language model drafts tokens with its first blocks, and checks many of them in one pass of all blocks.

Greedy decoding gives the full model's tokens, whatever the draft is (LayerSkip, arXiv 2404.16710; transformers' `assistant_early_exit`).
The best depth for drafts depends on the model, so this pass measures it.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.compress.model.checkpoint import write_file
from nightpress.core.compress.model.companions import copy_folder
from nightpress.core.compress.model.networks import load_model
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
    rows = read_rows(options.train.data, context.data_files.get(options.train.data), purpose="calibration")
    windows = text_windows(rows, open_tokenizer(source), samples=_PROMPTS, length=_PROMPT, ref=options.train.data)
    prompts = [row[None].to(context.device) for row in torch.from_numpy(windows.ids)]
    total = depth(context.header)
    tried = options.exits or tuple(sorted({max(1, total // 8), max(1, total // 4), max(1, total // 2)}))
    _decode(model, prompts[:1], None)  # warm
    plain, answers = _decode(model, prompts, None)
    rows_found: list[dict[str, Any]] = []
    for at, block in enumerate(tried):
        blocks = block + 1 if options.exits else block
        context.progress((at + 1) / (len(tried) + 1), f"drafting with {blocks} of {total} blocks")
        rate, found = _decode(model, prompts, blocks)
        equal = sum(torch.equal(a, b) for a, b in zip(found, answers, strict=True))
        rows_found.append({"blocks": blocks, "tokens_per_second": rate, "speedup": rate / plain, "equal": equal})
    right = [row for row in rows_found if row["equal"] == len(prompts)]
    best = max(right, key=lambda row: row["tokens_per_second"], default=None)
    chosen = best["blocks"] if best is not None and (best["speedup"] > 1 or options.exits) else None
    copy_folder(source, target)
    if chosen is not None:
        file = target / "generation_config.json"
        config = json.loads(file.read_bytes()) if file.is_file() else {}
        write_file(file, json.dumps(config | {"assistant_early_exit": chosen}, indent=2).encode() + b"\n")
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "draft_blocks": chosen,
            "blocks": total,
            "tokens_per_second_without": plain,
            "tried": rows_found,
            "prompts": len(prompts),
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

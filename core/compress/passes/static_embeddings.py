"""Distil an embedder to a table of token vectors, as Model2Vec does (github.com/MinishLab/model2vec, `distill`).

Tulkens and van Dongen 2024. The weights are smooth inverse frequencies (Arora et al. 2017) with Zipf's law for the frequencies.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.model.checkpoint import disk_errors, tensor_info, write_file, write_json, write_tensors
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.numerical_failures import check_finite
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.solvers.components import principal_components, zipf_weights
from nightpress.core.compress.solvers.distillation import pool
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import StaticEmbeddings
from nightpress.core.recipes.sentence import CONFIG_FILE

_PART = 4096  #: tokens between two checkpoints
_BATCH = 256
_LARGEST = 100.0  #: magnitude in the table
_UNUSED = re.compile(r"\[unused\d+\]")  #: BERT's places for further tokens; no text holds them
_CARRIED = ("tokenizer_config.json", "special_tokens_map.json")


@folder_pass(StaticEmbeddings)
def static_embeddings(source: Path, target: Path, options: StaticEmbeddings, context: PassContext) -> PassRecord:
    """Write the table to `target`, as model2vec saves it. Parts of the token vectors are checkpoints.

    Raises NightpressError(invalid_recipe) for a model without tokenizer.json, or whose token ids have gaps.
    """
    start = time.monotonic()
    tokenizer = _tokenizer(source)
    words = _words(tokenizer)
    vectors = torch.from_numpy(np.concatenate(list(_token_vectors(source, tokenizer, len(words), context))))  # [V, H]
    check_finite(["the vectors of single tokens"], vectors)
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = tokenizer.token_to_id(_unknown(tokenizer) or "")
    silent = torch.tensor(
        [at in special or at == unknown or bool(_UNUSED.fullmatch(word)) for at, word in enumerate(words)]
    )
    spoken = vectors[~silent].double()
    wanted = min(options.dimensions or spoken.shape[1], *spoken.shape)
    reduced, kept_variance = principal_components(spoken, wanted)
    weights = (
        torch.ones(len(words), dtype=torch.float64) if options.sif is None else zipf_weights(len(words), options.sif)
    )
    table = torch.zeros(len(words), wanted, dtype=torch.float64)
    table[~silent] = reduced * weights[~silent, None]
    # Vectors are normalized in the end, so the scale is free. Frequent tokens have small weights, which float16 would round coarsely.
    table *= _LARGEST / table.abs().max().clamp(min=1e-30)
    _write(source, target, table.to(getattr(torch, options.type)), tokenizer)
    context.progress(1.0, "done")
    summary = {
        "tokens": len(words),
        "without_a_vector": int(silent.sum()),
        "dimensions": wanted,
        "kept_variance": round(kept_variance, 4),
        "sif": options.sif,
    }
    return PassRecord(index=context.index, name=options.name, seconds=time.monotonic() - start, summary=summary)


def _tokenizer(source: Path) -> Any:
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    if not file.is_file():
        raise _unusable("it has no tokenizer.json", "Save the tokenizer once with transformers.")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _words(tokenizer: Any) -> list[str]:
    """The tokens by their ids. model2vec wants a vector for each id from 0 on."""
    found = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if [token_id for _, token_id in found] != list(range(len(found))):
        raise _unusable("its token ids have gaps", "Use another model.")
    return [word for word, _ in found]


def _unknown(tokenizer: Any) -> str | None:
    model = json.loads(tokenizer.to_str())["model"]
    if isinstance(model.get("unk_id"), int):  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    unknown: str | None = model.get("unk_token")
    return unknown


def _token_vectors(source: Path, tokenizer: Any, count: int, context: PassContext) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the pooled vectors of single tokens between the special tokens of a text, part by part: float32 [part, H]."""
    folder = context.work_dir / "token-vectors" / hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    model: Any = None
    torch.set_num_threads(context.threads)
    before, after = _around(tokenizer)
    for at in range(0, count, _PART):
        file = folder / f"{context.index}-{at}.npy"
        if not file.is_file():
            context.progress(0.9 * at / count, f"asking the model for the vectors of tokens, {at:,} of {count:,}")
            model = model or load_model(source, context.header)
            ids = torch.tensor([[*before, token, *after] for token in range(at, min(at + _PART, count))])
            found = torch.cat([_pooled(model, rows, context.header.pooling) for rows in torch.split(ids, _BATCH)])
            with disk_errors():
                folder.mkdir(parents=True, exist_ok=True)
                np.save(file.with_suffix(".partial.npy"), found.numpy())
                file.with_suffix(".partial.npy").replace(file)
            context.whole(at // _PART, file)
        yield np.load(file)


def _pooled(model: Any, ids: Tensor, pooling: str) -> Tensor:
    """The pooled vectors of texts of equal length, ids [B, S] → [B, H]."""
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return pool(hidden, mask, pooling).float()


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def _write(source: Path, target: Path, table: Tensor, tokenizer: Any) -> None:
    """Write the folder as model2vec's `save_pretrained` lays it out. The prompts and similarity function of the source stay."""
    with disk_errors():
        target.mkdir(parents=True)
    info = tensor_info("embeddings", {torch.float16: "F16", torch.float32: "F32"}[table.dtype], tuple(table.shape))
    write_tensors(target / "model.safetensors", [info], [("embeddings", table)])
    config = {
        "model_type": "model2vec",
        "architectures": ["StaticModel"],
        "hidden_dim": table.shape[1],
        "seq_length": 1_000_000,
        "normalize": True,
        "embedding_dtype": str(table.dtype).removeprefix("torch."),
    }
    kinds = {".": "StaticEmbedding", "1_Normalize": "Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    files: dict[str, Any] = {"config.json": config, "modules.json": modules}
    if (source / CONFIG_FILE).is_file():
        settings = json.loads((source / CONFIG_FILE).read_bytes())
        if (settings.get("truncate_dim") or 0) > table.shape[1]:
            del settings["truncate_dim"]
        files[CONFIG_FILE] = settings
    for name, content in files.items():
        write_json(target / name, content)
    write_file(target / "tokenizer.json", tokenizer.to_str().encode())
    for name in _CARRIED:
        if (source / name).is_file():
            write_file(target / name, (source / name).read_bytes())


def _unusable(what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_RECIPE, f"`static-embeddings` can't take this model: {what}.", hint=hint)

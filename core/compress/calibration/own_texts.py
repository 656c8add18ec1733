"""Texts that a language model itself writes: they are what it will meet in use, and no data set is needed for them (arXiv 2305.17888)."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import open_tokenizer, special_tokens
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.networks import cast_weights, load_model
from nightpress.core.recipes.graphs import caches_other_states
from nightpress.core.recipes.header import ModelHeader

_LARGEST = 2_000_000_000  #: parameters of a model that writes: in float32 they take as much memory as measuring the source does
_BATCH = 32  #: texts that are written side by side


def writes_texts(header: ModelHeader) -> bool:
    """Whether a model of this kind and size writes calibration text. Without a cache of keys and values it would read each text anew for each token."""
    return header.task == "causal-lm" and header.parameters <= _LARGEST and not caches_other_states(header)


def own_windows(source: Path, context: PassContext, count: int, length: int) -> NDArray[np.int64]:
    """Texts that the model in `source` writes, sampled at temperature 1: [count, length], with the special tokens of each text.

    The first token after the special ones is drawn from the whole vocabulary, so that texts differ. They are kept in the job's work folder:
    a later attempt reads the same texts.
    """
    told = f"{context.index} {context.calibration.seed} {count} {length} {context.device} {context.header.model_dump_json()}"
    file = context.work_dir / "own-texts" / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.npy"
    if not file.is_file():
        written = _written(source, context, count, length)
        buffer = io.BytesIO()
        np.save(buffer, written)
        with disk_errors():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, buffer.getvalue())
    context.whole(0, file)
    ids: NDArray[np.int64] = np.load(file)
    return ids


def _written(source: Path, context: PassContext, count: int, length: int) -> NDArray[np.int64]:
    tokenizer = open_tokenizer(source)
    before, after = special_tokens(tokenizer)
    special = {*before, *after}
    torch.set_num_threads(context.threads)
    model = load_model(source, context.header)
    if torch.device(context.device).type == "cuda":
        cast_weights(model, torch.bfloat16).to(context.device)
    generator = torch.Generator().manual_seed(context.calibration.seed)
    assert context.header.vocabulary is not None
    allowed = torch.tensor([token for token in range(context.header.vocabulary) if token not in special])
    rows = []
    for start in range(0, count, _BATCH):
        texts = min(_BATCH, count - start)
        first = allowed[torch.randint(len(allowed), (texts, 1), generator=generator)]
        begun = torch.cat([torch.tensor(before, dtype=torch.int64).expand(texts, -1), first], 1)
        rows.append(_continued(model, begun, length - len(after), generator, context, start / count))
    ids = torch.cat(rows)
    return torch.cat([ids, torch.tensor(after, dtype=torch.int64).expand(count, -1)], 1).numpy()


@torch.inference_mode()
def _continued(
    model: Any, ids: Tensor, length: int, generator: torch.Generator, context: PassContext, done: float
) -> Tensor:
    """Continue texts [B, L] to `length` tokens. The draws are on the CPU, so that they depend on the seed and the probabilities alone."""
    step, cache = ids, None
    while ids.shape[1] < length:
        out = model(input_ids=step.to(model.device), past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        # Logits that are not finite are an error of the weights. The pass finds it, and names the layer.
        chances = out.logits[:, -1].float().nan_to_num().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
        step = ids if cache is None else drawn
        if ids.shape[1] % 64 == 0:
            context.progress(0.0, f"the model writes calibration text, {done:.0%}")
    return ids[:, :length]

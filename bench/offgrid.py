"""A language model that doesn't flatter 4-bit methods: SmolLM2-135M, moved off the 4-bit grid that its weights were on.

    python -m bench.offgrid [--device cuda] [--steps 400]

SmolLM2-135M's weights were 4-bit before they were dequantized, so rounding them to 4 bits again loses almost nothing. This trains it on
public-domain prose for some hundred steps, as an update of rank 32 of every linear layer in the blocks, and keeps the update in
bench/data/offgrid.safetensors: two factors a layer in fp8 (e4m3), each with a scale, 10 MB in all. `offgrid_dir` merges it into the model.

Printed: the perplexity of text that trained nothing, and the error of rounding to the old grid, each before and after.
"""

import gzip
import logging
import math
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.quality import SHARED, perplexity, windows
from bench.record import BENCH, Figure, finish, make_parser
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer
from tests.models import smollm_dir

UPDATE = BENCH / "data" / "offgrid.safetensors"
RANK, LENGTH, RATE = 32, 512, 1e-3


@cache
def offgrid_dir(dtype: str = "float32", update: Path = UPDATE) -> Path:
    """A folder with SmolLM2-135M and the update merged into its weights. The process removes it when it ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = smollm_dir()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    factors = load_file(update)
    with torch.no_grad():
        for name, layer in _layers(model).items():
            layer.weight += _read(factors, f"{name}.up") @ _read(factors, f"{name}.down")
    target = source.parent / f"offgrid-{dtype}"
    model.to(getattr(torch, dtype)).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


class LowRank(nn.Module):
    """A linear layer with a trained update: y = (W + up · down) x. up [out, rank] starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        rows, columns = layer.weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns, device=layer.weight.device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.down.T @ self.up.T
        return out


def train(source: Path, ids: Tensor, steps: int, batch_size: int, device: str) -> dict[str, Tensor]:
    """Train the factors on token ids [samples, LENGTH], with AdamW and a rate that falls to zero. Returns them as they are stored."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).requires_grad_(False)
    trained = {name: LowRank(layer) for name, layer in _layers(model).items()}
    for name, layer in trained.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    learned = [parameter for layer in trained.values() for parameter in (layer.up, layer.down)]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * (1 - step / steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (batch_size,), generator=generator)].to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    stored: dict[str, Tensor] = {}
    for name, layer in trained.items():
        _store(stored, f"{name}.up", layer.up.detach().cpu())
        _store(stored, f"{name}.down", layer.down.detach().cpu())
    return stored


def _layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layers." in name}


def _store(into: dict[str, Tensor], name: str, factor: Tensor) -> None:
    scale = factor.abs().max().clamp(min=1e-12) / 448
    into[name] = (factor / scale).to(torch.float8_e4m3fn)
    into[f"{name}_scale"] = scale.reshape(1)


def _read(factors: dict[str, Tensor], name: str) -> Tensor:
    return factors[name].float() * factors[f"{name}_scale"]


def off_the_grid(folder: Path) -> float:
    """‖w − ŵ‖ / ‖w‖ of rounding the blocks' weights to the form that they had, Q4_1: 16 steps from the least of 32 weights to the greatest."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lost = norm = 0.0
    for layer in _layers(model).values():
        grouped = layer.weight.detach().view(-1, 32)
        low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
        step = ((high - low) / 15).clamp(min=1e-12)
        rounded = ((grouped - low) / step).round() * step + low
        lost += float((grouped - rounded).square().sum())
        norm += float(grouped.square().sum())
    return math.sqrt(lost / norm)


def training_ids(source: Path) -> Tensor:
    """All training text as token ids [samples, LENGTH]: novels in the public domain, or else the built-in calibration prose."""
    novels = SHARED / "lm_train_austen_moby.txt.gz"
    if novels.exists():
        text = gzip.decompress(novels.read_bytes()).decode()
    else:
        text = "\n".join(row.text or "" for row in read_rows("builtin:prose", None, purpose="calibration"))
    ids = torch.tensor(open_tokenizer(source).encode(text, special=False))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def main() -> int:
    parser = make_parser("offgrid", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, 512 tokens each")
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens, for the perplexities")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = smollm_dir()
    usual = all(getattr(options, name) == parser.get_default(name) for name in ("steps", "batch"))
    UPDATE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        update = UPDATE if usual else Path(scratch) / "offgrid.safetensors"
        save_file(train(source, training_ids(source), options.steps, options.batch, options.device), update)
        persuasion = SHARED / "lm_eval_persuasion.txt.gz"
        held_out = windows(persuasion if persuasion.exists() else None, source, options.samples, LENGTH)
        figures = [Figure("update", round(update.stat().st_size / 1e6, 1), "MB", bar="<= 12")]
        for name, folder in {"before": source, "after": offgrid_dir(update=update)}.items():
            figures += [
                Figure(f"{name}/perplexity", round(perplexity(folder, held_out, options.device), 2)),
                Figure(
                    f"{name}/rounding error", round(off_the_grid(folder), 4), bar=">= 0.03" if name == "after" else ""
                ),
            ]
    return finish("offgrid", figures, parser, options, choices=("device",))


if __name__ == "__main__":
    sys.exit(main())

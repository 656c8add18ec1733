"""Distillation of a decoder on one GPU and on several: training steps a second.

    python -m bench.train_gpu --gpus 2 [--hidden 2048 --inner 8192 --heads 32 --kv-heads 8 --layers 16] [--batch 32] [--length 512] [--steps 20]

The student and its teacher have the same shape, by default some 1.1 billion parameters, and random weights: the work does not depend on
their values. The training is that of `recover` on the built-in prose, with all of a batch's positions scored: products in bfloat16, weights
and moments in float32. Each side trains twice in the same processes, and the second time counts. Checkpoints are left out. Both sides take
the same batches; several GPUs share out each.

What each side is at is written to stderr at once. A side that takes longer than --limit seconds is cut off: its processes write where they
are, and the figures of the other side are kept.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.limits import CutOffError, limited, say
from bench.record import Figure, finish, keep, make_parser
from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Recover
from nightpress.core.recipes.passes.training import Training

VOCABULARY = 32000
WARM_STEPS = 3


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the bytes of a text, so that nothing need be fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<unk>": 1} | {letter: at for at, letter in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": options.inner,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "num_hidden_layers": options.layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max(2048, options.length),
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def random_model(config: dict[str, Any], device: str, *, seed: int) -> Any:
    """A model on the CPU, whose weights the device has drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    rotary = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 1})).model.rotary_emb
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = rotary  # its buffers are computed, not drawn
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.copy_(1 + 0.02 * drawn if parameter.dim() == 1 else 0.02 * drawn)
    return model


def steps_per_second(
    folder: Path, config: dict[str, Any], train: Training, *, context: PassContext
) -> dict[str, float]:
    """Train twice in this process. Returns the steps per second of the second time, and the peak of this GPU's memory."""
    from nightpress.core.compress.executors import train as executor
    from nightpress.core.compress.passes.distill import teach

    executor.write_checkpoint = lambda *_: None
    torch.set_num_threads(context.threads)
    context.progress(0.0, "making two models")
    teacher, student = (random_model(config, context.device, seed=seed) for seed in (0, 1))
    for steps in (WARM_STEPS, train.steps):
        context.progress(0.0, f"training for {steps} steps")
        options = Recover(train=train.model_copy(update={"steps": steps}))
        trained, _ = teach(student, teacher, [], folder, options, context)
    peak = torch.cuda.max_memory_allocated() if context.device == "cuda" else 0
    return {
        "steps": trained.steps_per_second,
        "peak": peak / 2**30,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }


def measure(options: argparse.Namespace, device: str, scratch: Path) -> list[Figure]:
    config = config_of(options)
    model, threads = scratch / "model", len(os.sched_getaffinity(0))
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    write_tokenizer(model)
    header = ModelHeader(
        model_type="llama", architecture="LlamaForCausalLM", config=config, tensors=(), has_tokenizer=True
    )
    from bench.train_gpu import steps_per_second  # under this name, the processes find it

    train = Training(length=options.length, batch=options.batch, steps=options.steps, validation=0)
    found = {}
    for count in sorted({1, options.gpus}):
        title = f"{count} GPU{'s' if count > 1 else ''}"
        with Ranks(count, scratch / f"ranks-{count}", device=device, threads=threads) as ranks:
            context = PassContext(
                header=header,
                work_dir=scratch / f"work-{count}",
                device=device,
                ranks=ranks,
                progress=lambda _, message, title=title: say(f"{title}: {message}"),
            )
            try:
                with limited(title, options.limit, ranks):
                    given = (model, config, train)
                    found[count] = over_ranks(steps_per_second, *given, samples=options.batch, context=context)
            except CutOffError as error:
                say(str(error))
                continue
        say(f"{title}: {found[count]}")
    if not found:
        return []
    title = f"{next(iter(found.values()))['parameters'] / 1e9:.2f}B, {options.batch} x {options.length} tokens"
    figures = [
        figure
        for count, side in found.items()
        for figure in (
            Figure(f"{title}/{count} GPU{'s' if count > 1 else ''}/steps", round(side["steps"], 3), "steps/s"),
            Figure(
                f"{title}/{count} GPU{'s' if count > 1 else ''}/peak", round(side["peak"], 2), "GiB of the first GPU"
            ),
        )
    ]
    if len(found) > 1:
        ratio = found[options.gpus]["steps"] / found[1]["steps"]
        bar = ">= 1.8" if options.gpus == 2 else ""
        figures.append(Figure(f"{title}/{options.gpus} GPUs/ratio", round(ratio, 2), "of one GPU's steps/s", bar=bar))
    return figures


def main() -> int:
    parser = make_parser("train_gpu", __doc__)
    for name, value in {"gpus": 2, "hidden": 2048, "inner": 8192, "heads": 32, "kv-heads": 8, "layers": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"batch": 32, "length": 512, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="a folder for the figures, in place of the usual one")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of a side")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: processes that exchange by gloo"
    )
    options = parser.parse_args()
    # The processes import this module, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, options.device, Path(folder))
    if options.out is not None:
        keep("train_gpu", figures, options.out)
        return int(not figures)
    return finish("train_gpu", figures, parser, options, choices=("limit", "out")) if figures else 1


if __name__ == "__main__":
    sys.exit(main())

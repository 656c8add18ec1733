"""Looking at a model without changing it: what its layers are given, what its blocks do, and what its loss thinks of either.

`survey` holds one block at a time, as the blocks executor does. `gradients` holds the whole model, which is run backwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress.checkpoint import read_shards
from core.compress.context import PassContext
from core.compress.executors.activations import Calls
from core.compress.executors.skeleton import Skeleton, Source
from core.compress.networks import load_model
from core.compress.solvers.units import Moments
from core.recipes.anatomy import Anatomy
from core.recipes.costs import BATCH_TOKENS


@dataclass(frozen=True)
class Seen:
    """One block of the source model."""

    index: int
    tensors: Mapping[str, Tensor]  #: by their names in the files, in their stored dtype
    moments: Moments | None  #: of what the watched module was given
    influence: float  #: one minus the mean cosine of what enters with what leaves, over tokens


def survey(source: Path, ids: Tensor, context: PassContext, watched: str | None) -> Iterator[Seen]:
    """Run ids [samples, length] through the blocks of the model, one after the other. watched: a module within a block, or None."""
    files = Source(read_shards(source))
    device = torch.device(context.device)
    skeleton = Skeleton(source, files, context.device, torch.float32)
    rows = max(1, min(len(ids), BATCH_TOKENS[device.type] // ids.shape[1]))
    with torch.no_grad():
        hidden, calls = [], Calls(device)
        batches = ({"input_ids": one} for one in torch.split(ids, rows))
        for entered, heard in skeleton.capture(0, batches, []):
            hidden.append(entered.clone())
            calls.add(heard, keep_on=device)
        for index in range(len(skeleton.blocks)):
            context.progress(index / len(skeleton.blocks), f"looking at block {index + 1} of {len(skeleton.blocks)}")
            tensors = {name: files.read(name) for name in skeleton.block_names(index)}
            block = skeleton.fill_block(index, tensors)
            moments: list[Moments] = []
            cosines = torch.zeros((), dtype=torch.float64)
            with ExitStack() as stack:
                if watched is not None:
                    hook = block.get_submodule(watched).register_forward_pre_hook(_take_moments(moments, device))
                    stack.callback(hook.remove)
                for at, before in enumerate(hidden):
                    (call,) = calls.of(index, at)
                    out = block(before, *call.args, **call.kwargs)
                    after = out[0] if isinstance(out, tuple) else out
                    cosines += F.cosine_similarity(before, after, dim=-1).double().sum().cpu()
                    hidden[at] = after
            skeleton.empty_block(index)
            yield Seen(index, tensors, moments[0] if moments else None, 1 - float(cosines) / ids.numel())


def _take_moments(into: list[Moments], device: torch.device) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not into:
            into.append(Moments(inputs[0].shape[-1], device))
        into[0].add(inputs[0])

    return hook


def unit_gradients(source: Path, ids: Tensor, context: PassContext, anatomy: Anatomy, watched: str) -> list[Tensor]:
    """For each block [inputs of the watched module]: what the loss would change by without the weights behind each input.

    Σ_i |w_ij ∂L/∂w_ij|, in the mean over samples (LLM-Pruner, arXiv 2305.11627, eq. 5). The absolute value is taken weight by weight: a norm
    behind the layer makes the loss deaf to the scale of an outlier, and the signed sum would call it unimportant.
    """
    found: list[Tensor] = []
    model = _whole(source, context)
    modules = [one.get_submodule(watched) for one in _blocks(model, anatomy)]

    def collect(index: int, entered: Tensor, left: Tensor) -> None:
        weight = modules[index].weight
        assert isinstance(weight, Tensor)
        assert left.grad is not None
        gradient = left.grad[0].T @ entered[0].detach()  # ∂L/∂w [out, in]
        score = ((weight.T if anatomy.transposed else weight) * gradient).abs().sum(0).float().cpu()
        if index == len(found):
            found.append(score)
        else:
            found[index] += score

    _backwards(model, ids, context, modules, collect)
    return [one / len(ids) for one in found]


def block_gradients(source: Path, ids: Tensor, context: PassContext, anatomy: Anatomy) -> list[float]:
    """For each block: what the loss would change by without what it adds to the hidden states: Σ_i |Σ_tokens a_i ∂L/∂a_i|, in the mean over samples."""
    found = [0.0] * anatomy.layers

    def collect(index: int, entered: Tensor, left: Tensor) -> None:
        assert left.grad is not None
        found[index] += float(((left - entered).detach() * left.grad).sum((0, 1)).abs().sum()) / len(ids)

    model = _whole(source, context)
    _backwards(model, ids, context, _blocks(model, anatomy), collect)
    return found


def _whole(source: Path, context: PassContext) -> nn.Module:
    torch.set_num_threads(context.threads)
    model: nn.Module = load_model(source, context.header).to(context.device)
    return model.requires_grad_(False)


def _blocks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    rows = [
        one
        for name, one in model.named_modules()
        if isinstance(one, nn.ModuleList) and f".{name}".endswith(f".{anatomy.family.blocks}")
    ]
    return list(rows[0])


def _backwards(
    model: nn.Module,
    ids: Tensor,
    context: PassContext,
    modules: Sequence[nn.Module],
    collect: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run the texts forwards and backwards, a text at a time, and hand on what entered and what left each module, the latter with its gradient."""
    kept: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Any) -> None:
        left: Tensor = out[0] if isinstance(out, tuple) else out
        left.retain_grad()
        kept.append((args[0] if args else kwargs["hidden_states"], left))

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator(context.device).manual_seed(context.seed)
    with ExitStack() as stack:
        # Nothing is trained: what gradients flow back to are the embedded tokens.
        stack.callback(embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_(True)).remove)
        for one in modules:
            stack.callback(one.register_forward_hook(hook, with_kwargs=True).remove)
        for at, sample in enumerate(torch.split(ids, 1)):
            context.progress(at / len(ids), f"gradients of text {at + 1} of {len(ids)}")
            _loss(model, sample.to(context.device), context, generator).backward()  # type: ignore[no-untyped-call]
            for index, (entered, left) in enumerate(kept):
                collect(index, entered, left)
            kept.clear()


def _loss(model: nn.Module, ids: Tensor, context: PassContext, generator: torch.Generator) -> Tensor:
    """ids [1, L] → a number whose gradient says what matters.

    A language model's is that of the next token. Elsewhere no label is known: the model's own distribution is drawn from, or of an
    embedding a random direction is taken, so that the squared gradient is the Fisher information in the mean.
    """
    task = context.header.task
    if task == "causal-lm":
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    out = model(input_ids=ids)
    if task == "embedding":
        pooled = out.last_hidden_state.mean(1).float()
        return (F.normalize(pooled, dim=-1) * torch.randn(pooled.shape, generator=generator, device=ids.device)).sum()
    logits = out.logits.float().reshape(-1, out.logits.shape[-1])
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn)

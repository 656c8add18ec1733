"""Measures a model without changing it: the inputs of its layers, the influence of its blocks, and the gradients of its loss.

`survey` holds one block in memory at a time, like the blocks executor. `unit_gradients` and `block_gradients` hold the whole model, because
they run it backwards.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.batches import alone, count_of, split_mask, tokens_a_sample
from nightpress.core.compress.executors.calls import Calls
from nightpress.core.compress.executors.live_block import probe_of
from nightpress.core.compress.executors.watch import without_padding
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.model.rows import unsupported
from nightpress.core.compress.model.skeleton import Batch, Skeleton
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.numerical_failures import check_finite
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers.units import Moments
from nightpress.core.recipes.anatomy import Anatomy
from nightpress.core.recipes.costs import BATCH_TOKENS


@dataclass(frozen=True)
class SourceBlock:
    """One block of the source model."""

    index: int
    #: By their names in the files, in their stored dtype. Not those of experts that live in another process.
    tensors: Mapping[str, Tensor]
    moments: Moments | None  #: of the watched module's inputs
    influence: float  #: 1 − the mean over tokens of the cosine between the block's input and its output
    #: By prefix of a mixture's experts: the mean size of each expert's weighted outputs [experts], float64; 0 if it gets no token.
    saliency: Mapping[str, Tensor] = field(default_factory=dict)


def survey(source: Path, samples: Batch, context: PassContext, watched: str | None) -> Iterator[SourceBlock]:
    """Run texts or images through the model's blocks one after the other. Yields a description of each block.

    samples: `input_ids` [samples, length], and their mask if they are padded; or `pixel_values`. watched: path of a module in a block, or None.
    The processes of `context.group` share out the samples, and all yield the same figures.
    Raises NightpressError(numerical_failure) for a block whose input or output is not finite.
    """
    files = SourceTensors.in_folder(source)
    device = torch.device(context.device)
    samples, real = split_mask(samples)
    group, probe = context.group, probe_of(samples)
    skeleton = Skeleton(source, files, context.device, torch.float32, probe, group)
    if skeleton.whole is not None:
        raise unsupported(f"The model's blocks can't be compared: {skeleton.whole}")
    most = math.ceil(count_of(samples) / group.size)  # samples of a process
    own = group.share(count_of(samples))
    samples, real = {name: tensor[own] for name, tensor in samples.items()}, None if real is None else real[own]
    rows = max(1, min(most, BATCH_TOKENS[device.type] // tokens_a_sample(samples, skeleton.config)))
    starts = range(0, count_of(samples), rows)
    masks = [None if real is None else real[at : at + rows].to(device) for at in starts]
    with torch.no_grad():
        hidden, calls = [], Calls(device)
        batches = ({name: tensor[at : at + rows] for name, tensor in samples.items()} for at in starts)
        for entered, heard in skeleton.capture(0, batches, []):
            hidden.append(entered.clone())
            calls.add(heard, keep_on=device)
        whole = sum(entered.shape[:-1].numel() for entered in hidden)
        tokens = group.total(whole if real is None else int(real.sum()))
        for index in range(len(skeleton.blocks)):
            context.progress(index / len(skeleton.blocks), f"looking at block {index + 1} of {len(skeleton.blocks)}")
            tensors = {name: files.read(name) for name in skeleton.held_names(index)}
            block = skeleton.fill_block(index, tensors)
            look = _InputSums(device)
            mixtures = [(prefix, mixture, _OutputSizes(len(mixture))) for prefix, mixture in skeleton.experts(index)]
            cosines = torch.zeros((), dtype=torch.float64)
            with ExitStack() as stack:
                if watched is not None:
                    stack.callback(block.get_submodule(watched).register_forward_pre_hook(look).remove)
                for _, mixture, sizes in mixtures:
                    mixture.watch = sizes
                    stack.callback(setattr, mixture, "watch", None)
                for at, (before, mask) in enumerate(zip(hidden, masks, strict=True)):
                    look.real = mask
                    for _, mixture, _ in mixtures:
                        mixture.real = None if mask is None else mask.flatten()
                    (call,) = calls.of(index, at)
                    out = block(before, *call.args, **call.kwargs)
                    after = out[0] if isinstance(out, tuple) else out
                    each = F.cosine_similarity(before, after, dim=-1)  # [B, L]
                    cosines += without_padding(each[..., None], masks[at]).double().sum().cpu()
                    hidden[at] = after
                if skeleton.shares_experts(index):
                    for _ in range(len(hidden), math.ceil(most / rows)):
                        for _, mixture, _ in mixtures:
                            mixture.take_part()
            skeleton.empty_block(index)
            name = skeleton.blocks[index].name
            group.sum(cosines)
            for _, _, sizes in mixtures:
                sizes.combine(group)
            if look.moments is not None:
                look.moments.combine(group)
            check_finite([name], cosines)
            if look.moments is not None:
                check_finite([f"{name}.{watched}"], look.moments)
            saliency = {prefix: sizes.means() for prefix, _, sizes in mixtures}
            yield SourceBlock(index, tensors, look.moments, 1 - float(cosines) / tokens, saliency)


class _OutputSizes:
    """Sums up the sizes of each expert's outputs, weighted by the router."""

    def __init__(self, experts: int) -> None:
        self._sums, self._tokens = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)

    def __call__(self, expert: int, weighted: Tensor) -> None:
        self._sums[expert] += weighted.float().norm(dim=-1).sum(dtype=torch.float64).cpu()
        self._tokens[expert] += len(weighted)

    def combine(self, group: Group) -> None:
        group.sum(self._sums)
        group.sum(self._tokens)

    def means(self) -> Tensor:
        return self._sums / self._tokens.clamp(min=1)


class _InputSums:
    """A forward pre-hook that sums up the moments of a module's inputs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moments: Moments | None = None
        self.real: Tensor | None = None  #: bool [B, L] of the current batch: False for padding; None: it has no padding

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.moments is None:
            self.moments = Moments(inputs[0].shape[-1], self._device)
        self.moments.add(without_padding(inputs[0], self.real))


def unit_gradients(source: Path, samples: Batch, context: PassContext, anatomy: Anatomy, watched: str) -> list[Tensor]:
    """Estimate, for each input of the watched module, how much the loss changes without its weights. Returns one tensor [inputs] per block.

    The score of input j is Σ_i |w_ij ∂L/∂w_ij|, as a mean over samples (LLM-Pruner, arXiv 2305.11627, eq. 5). The absolute value is taken
    for each weight. With a norm after the layer, the loss does not depend on the scale of an outlier, and the signed sum would rate the
    outlier as unimportant. The processes of `context.group` share out the samples. Raises NightpressError(numerical_failure).
    """
    found: list[Tensor] = []
    model = _load_whole(source, context)
    modules = [block.get_submodule(watched) for block in _blocks(model, anatomy)]

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

    _backwards(model, samples, context, modules, collect)
    for at, sums in enumerate(found):
        context.group.sum(sums)
        check_finite([anatomy.name(at, watched, "weight").removesuffix(".weight")], sums)
    return [sums / count_of(samples) for sums in found]


def block_gradients(source: Path, samples: Batch, context: PassContext, anatomy: Anatomy) -> list[float]:
    """Estimate, for each block, how much the loss changes without the block's contribution a to the hidden states (output − input).

    The score is Σ_i |Σ_tokens a_i ∂L/∂a_i|, as a mean over samples. The processes of `context.group` share out the samples.
    Raises NightpressError(numerical_failure).
    """
    found, count = [0.0] * anatomy.layers, count_of(samples)

    def collect(index: int, entered: Tensor, left: Tensor) -> None:
        assert left.grad is not None
        found[index] += float(((left - entered).detach() * left.grad).sum((0, 1)).abs().sum()) / count

    model = _load_whole(source, context)
    _backwards(model, samples, context, _blocks(model, anatomy), collect)
    summed = torch.tensor(found, dtype=torch.float64)
    context.group.sum(summed)
    found = summed.tolist()
    for at, influence in enumerate(found):
        check_finite([f"{anatomy.prefix}{at}"], torch.tensor(influence))
    return found


def _load_whole(source: Path, context: PassContext) -> nn.Module:
    torch.set_num_threads(context.threads)
    model: nn.Module = load_model(source, context.header).to(context.device)
    return model.requires_grad_(False)


def _blocks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The model's blocks. Where transformers calls them otherwise than the files do, they are the only list of so many modules."""
    rows = {
        f".{name}": list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == anatomy.layers
    }
    found = [row for name, row in rows.items() if name.endswith(f".{anatomy.family.blocks}")] or list(rows.values())
    if len(found) != 1:
        raise unsupported(f"transformers has {len(found)} rows of {anatomy.layers} blocks for this model")
    return found[0]


def _backwards(
    model: nn.Module,
    samples: Batch,
    context: PassContext,
    modules: Sequence[nn.Module],
    collect: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run each sample forwards and backwards. Calls `collect` (index of the module, its input, its output with its gradient) for each module.

    Each runs in a batch of its own, a text with its padding cut off.
    """
    count, real = count_of(samples), split_mask(samples)[1]
    kept: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Any) -> None:
        left: Tensor = out[0] if isinstance(out, tuple) else out
        left.retain_grad()
        kept.append((args[0] if args else kwargs["hidden_states"], left))

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    with ExitStack() as stack:
        # No weight requires gradients here. The embedded tokens or patches do, so that gradients flow back through all blocks.
        stack.callback(embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_(True)).remove)
        for module in modules:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for at in range(count)[context.group.share(count)]:
            sample = {name: tensor.to(context.device) for name, tensor in alone(samples, real, at).items()}
            context.progress(at / count, f"gradients of sample {at + 1} of {count}")
            generator = torch.Generator(context.device).manual_seed(
                context.seed + at
            )  # whichever process runs the sample
            _loss(model, sample, context, generator).backward()  # type: ignore[no-untyped-call]
            for index, (entered, left) in enumerate(kept):
                collect(index, entered, left)
            kept.clear()


def _loss(model: nn.Module, sample: Batch, context: PassContext, generator: torch.Generator) -> Tensor:
    """The loss for a text [1, L] or an image, a scalar whose gradient measures importance.

    For a causal language model, it is the loss of the next token. For other models no label is known. There a label is drawn from the
    model's own distribution, or an embedding is projected on a random direction. The expectation of the squared gradient is then the Fisher
    information.
    """
    task = context.header.task
    if task == "causal-lm":
        ids, logits = sample["input_ids"], model(**sample, use_cache=False).logits
        # A text of one token has no next token. Its sum is 0; `reduction="mean"` would give NaN.
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum") / max(1, ids.shape[1] - 1)
    out = model(**sample)
    if task == "embedding":
        pooled = out.last_hidden_state.mean(1).float()
        return (
            F.normalize(pooled, dim=-1) * torch.randn(pooled.shape, generator=generator, device=pooled.device)
        ).sum()
    logits = out.logits.float().reshape(-1, out.logits.shape[-1])
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn)

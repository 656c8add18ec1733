"""Proposes places in a block where factors can be exchanged, from a run of the block: which layers read which layer's output.

A proposal may be wrong, e.g. where something else reads the output as well. `folding` proves each on the block, and the first of several
proposals for the same layers that holds is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nightpress.core.compress.executors.live_block import Called, LiveBlock
from nightpress.core.compress.model.experts import Experts

_TRIED = 2  #: linear layers before a layer that are tried as its source


@dataclass(frozen=True)
class Proposal:
    """Layers in a block that may exchange factors. Names are those of the block's modules; `*` stands for an expert's number."""

    source: str
    kind: str  #: as `Fold.kind`
    targets: tuple[str, ...]  #: linear layers that are rounded
    routers: tuple[str, ...] = ()  #: other matrices that read the source's output


def propose(block: LiveBlock, rounded: Sequence[str], heads: int) -> Iterator[tuple[Proposal, ...]]:
    """Yield, for each input of layers, the proposals for it, the likeliest first.

    rounded: modules of the block that are rounded. heads: key and value heads; 0: the config doesn't say.
    """
    trace, modules = block.trace(), dict(block.module.named_modules())
    mixtures = {name: module for name, module in modules.items() if isinstance(module, Experts)}
    inside = tuple(f"{name}." for name in mixtures)
    readers: dict[tuple[int, int], list[str]] = {}
    for call in trace:
        if _matrix(modules[call.name]) is not None and not call.name.startswith(inside):
            readers.setdefault(call.given, []).append(call.name)
        elif call.name in mixtures:
            first = mixtures[call.name].into
            readers.setdefault(call.given, []).extend(f"{call.name}.*.{part}" for part in first)
    chosen = set(rounded) | {_starred(name, inside) for name in rounded}
    for given, names in readers.items():
        every = tuple(dict.fromkeys(names))
        targets = tuple(name for name in every if name in chosen)
        if not targets:
            continue
        routers = tuple(name for name in every if name not in chosen)
        norms = [call.name for call in trace if call.made == given and _is_norm(modules[call.name])]
        if norms:
            yield tuple(Proposal(norms[-1], kind, targets, routers) for kind in ("norm", "norm+1"))
        elif "*" not in "".join(every):
            yield tuple(_from_linears(trace, modules, inside, targets, routers, heads))
    for name, mixture in mixtures.items():
        *into, down = (f"{name}.*.{part}" for part in (*mixture.into, mixture.down))
        if down in chosen and into[-1] in chosen:
            yield (Proposal(into[-1], "linear", (down,)),)


def _from_linears(
    trace: Sequence[Called],
    modules: Mapping[str, nn.Module],
    inside: tuple[str, ...],
    targets: tuple[str, ...],
    routers: tuple[str, ...],
    heads: int,
) -> Iterator[Proposal]:
    """Yield the linear layers that ran last before the targets and may have made their input, by its width."""
    at = next(at for at, call in enumerate(trace) if call.name in targets)
    weight = _matrix(modules[targets[0]])
    assert weight is not None
    columns, tried = weight.shape[1], 0
    for call in reversed(trace[:at]):
        made = _matrix(modules[call.name])
        if (
            made is None
            or call.name.startswith(inside)
            or call.name in targets
            or not isinstance(modules[call.name], nn.Linear)
        ):
            continue
        grouped = heads > 0 and len(made) < columns and columns % len(made) == 0 and len(made) % heads == 0
        if len(made) == columns or grouped:
            yield Proposal(call.name, "values" if grouped else "linear", targets, routers)
            tried += 1
        if tried == _TRIED:
            return


def _starred(name: str, inside: tuple[str, ...]) -> str:
    """The name of an expert's layer with `*` in place of the expert's number."""
    for prefix in inside:
        if name.startswith(prefix):
            _, _, leaf = name.removeprefix(prefix).partition(".")
            return f"{prefix}*.{leaf}"
    return name


def _matrix(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding) else None


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1

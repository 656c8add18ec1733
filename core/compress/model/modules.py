"""Gives the layers of transformers' modules the shapes that they have in the files, where config.json describes others."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

_VALUES = ("value", "v_proj", "v_lin", "v", "value_proj")  #: names of the layer that computes an attention's values


class Files(Protocol):
    """The tensors of a model's files, read on request."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


def fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters their shapes in the files. shapes: by the parameters' names below `module`.

    A parameter whose shape changes loses its values.
    """
    changed = False
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        holder: Any = module.get_submodule(path)
        old = holder._parameters[leaf]
        if old is None or tuple(old.shape) == shape:
            continue
        changed = True
        holder._parameters[leaf] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        if leaf == "weight" and isinstance(holder, nn.Linear):
            holder.out_features, holder.in_features = shape
        elif leaf == "weight" and hasattr(holder, "nf"):  # transformers' Conv1D
            holder.nf = shape[1]
    if changed:
        for inner in module.modules():
            _recount_heads(inner)


def _recount_heads(module: Any) -> None:
    """Correct the number of heads in attention modules that store it."""
    value = next((getattr(module, name) for name in _VALUES if hasattr(module, name)), None)
    if isinstance(value, nn.Linear):
        if hasattr(module, "attention_head_size") and hasattr(module, "all_head_size"):
            module.all_head_size = value.out_features
            module.num_attention_heads = value.out_features // int(module.attention_head_size)
        elif hasattr(module, "num_heads") and hasattr(module, "head_dim"):
            module.num_heads = value.out_features // int(module.head_dim)
    # Phi-3 reads the number from its config.
    if hasattr(module, "qkv_proj") and hasattr(module, "num_key_value_groups"):
        module.config = copy.copy(module.config)
        module.config.num_attention_heads = module.o_proj.in_features // module.head_dim
        module.num_key_value_heads = module.config.num_attention_heads // module.num_key_value_groups
    fused = getattr(module, "c_attn", None)
    if fused is not None and hasattr(module, "split_size"):
        width = fused.weight.shape[1] // 3
        module.split_size, module.num_heads = width, width // int(module.head_dim)


def take_own_shapes(model: nn.Module, files: Files) -> None:
    """Load the tensors whose shapes in the files differ from the config. transformers does not load these."""
    parameters = dict(model.named_parameters())
    base = f"{getattr(model, 'base_model_prefix', '')}."
    odd: dict[str, Tensor] = {}
    for stored in files.names():
        name = next(
            (known for known in (stored, base + stored, stored.removeprefix(base)) if known in parameters), None
        )
        if name is not None:
            tensor = files.read(stored)
            if parameters[name].shape != tensor.shape:
                odd[name] = tensor.to(parameters[name].dtype)
    give(model, odd)


def give(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a model, whatever their shapes were. tensors: by the parameters' names.

    Attention without heads and layers without inputs, which have nothing to compute, are replaced by stand-ins.
    """
    fit(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    _skip_empty(model)


class BiasAlone(nn.Module):
    """A linear layer without inputs: it answers with its bias. A drop-in for nn.Linear, with the same parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias  # [out, 0], [out]
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, any] → [1, 1, out]: a sum with the residual broadcasts it."""
        bias = x.new_zeros(self.out_features) if self.bias is None else self.bias
        return bias.view(*[1] * (x.dim() - 1), -1)


class NoHeads(nn.Module):
    """An attention module without heads. It keeps its layers, which are empty, so that the parameters keep their names."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, layer in attention.named_children():
            self.add_module(name, layer)

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        """hidden [B, S, H] → what the output projection answers, if it is part of this module; else the input, which is not used."""
        output = next((layer for layer in self.children() if isinstance(layer, BiasAlone)), None)
        return (hidden if output is None else output(hidden)), None


def _skip_empty(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer.in_features == 0:
                setattr(parent, name, BiasAlone(layer))
    for parent in list(model.modules()):
        for name, inner in list(parent.named_children()):
            value = next((getattr(inner, key) for key in _VALUES if hasattr(inner, key)), None)
            if isinstance(value, nn.Linear) and value.out_features == 0 and not isinstance(inner, NoHeads):
                setattr(parent, name, NoHeads(inner))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In this context, transformers shows no progress bars and no warnings, e.g. about shapes that are corrected afterwards."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

"""Modules of transformers that decide in Python what a graph must decide as it runs: the same mathematics in operations on tensors."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nightpress.core.compress.graph.restated.funnel import restate_funnel
from nightpress.core.compress.graph.restated.longformer import restate_longformer
from nightpress.core.compress.graph.restated.mvp import restate_mvp

#: `model_type` → what restates the modules of such a model in place.
_RESTATED: Mapping[str, Callable[[nn.Module], None]] = {
    "funnel": restate_funnel,
    "longformer": restate_longformer,
    "mvp": restate_mvp,
}


def restate(model: Any) -> None:
    """Make a model traceable if its type is known here. Its weights, its modules' names and its answers stay."""
    known = _RESTATED.get(model.config.model_type)
    if known is not None:
        known(model)

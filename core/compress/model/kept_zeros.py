"""The zeros of a pruned model, which stay while it learns."""

from typing import Any

import torch
from torch import Tensor, nn


class KeptZeros:
    """Remembers where a model's matrices are zero, and keeps these weights at zero."""

    def __init__(self, model: Any) -> None:
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self._zeros = [(matrix, matrix.detach() == 0) for matrix in matrices if bool((matrix == 0).any())]

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """The masks of the matrices that learn, by their names in a module that has the model in it."""
        zeros = {id(matrix): zero for matrix, zero in self._zeros}
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        return {name: zeros[id(parameter)] for name, parameter in named.items() if id(parameter) in zeros}

    def apply(self) -> None:
        with torch.no_grad():
            for weight, zeros in self._zeros:
                weight.masked_fill_(zeros.to(weight.device), 0)

"""What every pass is that leaves codes and scales in the place of weights."""

from typing import ClassVar

from core.recipes.header import TensorInfo
from core.recipes.linears import module_of
from core.recipes.passes.base import ExportFormat, OnLinears
from core.recipes.schemes import Scheme


class Quantizing(OnLinears):
    """A pass that leaves codes and scales in the place of linear weights, in a format of compressed-tensors."""

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    def scheme(self, module: str) -> Scheme:
        """How the weight of this module is stored."""
        raise NotImplementedError

    @property
    def coarsest_bits(self) -> int:
        """Of any weight it rounds."""
        raise NotImplementedError

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return self.scheme(module_of(tensor)).stored_bytes(tensor) if self.takes(tensor) else tensor.size

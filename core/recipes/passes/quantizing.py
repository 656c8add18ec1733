"""What every pass is that leaves codes and scales in the place of weights."""

from typing import ClassVar

from core.recipes.header import ModelHeader, TensorInfo
from core.recipes.linears import invalid, is_expert, module_of
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

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        taken = [tensor for tensor in header.tensors if self.takes(tensor)]
        schemes = {self.scheme(module_of(tensor)) for tensor in taken if is_expert(tensor.name)}
        if any(not one.symmetric for one in schemes):
            raise invalid(
                f"`{self.name}`: transformers passes over the zero points of a mixture's experts.",
                "Set `symmetric` to true for this model.",
            )
        if len(schemes) > 1:
            raise invalid(
                f"`{self.name}`: transformers reads one grid alone for all experts of a mixture.",
                "Let all experts have the same bits and groups: `overrides` may name other layers.",
            )
        if any(one.format == "nvfp4-pack-quantized" for one in schemes):
            raise invalid(
                f"`{self.name}`: transformers passes over what nvfp4's scales are divided by in a mixture's experts.",
                "Use `mxfp4` or integers for this model.",
            )

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return self.scheme(module_of(tensor)).stored_bytes(tensor) if self.takes(tensor) else tensor.size

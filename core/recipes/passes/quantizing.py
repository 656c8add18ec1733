"""The base class of all passes that replace weights with codes and scales."""

from collections.abc import Collection
from typing import ClassVar

from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid, module_of
from nightpress.core.recipes.passes.base import ExportFormat, OnLinears, Relation
from nightpress.core.recipes.readable import why_unreadable
from nightpress.core.recipes.schemes import Scheme


class Quantizing(OnLinears):
    """A pass that replaces linear weights with codes and scales, in a format of compressed-tensors."""

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    def scheme(self, module: str) -> Scheme:
        """Return the scheme in which this module's weight is stored."""
        raise NotImplementedError

    @property
    def coarsest_bits(self) -> int:
        """The smallest number of bits of any weight that the pass rounds."""
        raise NotImplementedError

    @property
    def rounding_bits(self) -> int | None:
        return self.coarsest_bits

    def schemes(self, module: str) -> Collection[Scheme]:
        """Return the schemes that the pass may choose from for this module."""
        return {self.scheme(module)}

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        taken = {tensor: self.schemes(module_of(tensor)) for tensor in header.tensors if self.takes(tensor)}
        if (unreadable := why_unreadable(header, taken)) is not None:
            why, advice = unreadable
            raise invalid(f"`{self.name}`: {why}.", advice)

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return self.scheme(module_of(tensor)).stored_bytes(tensor) if self.takes(tensor) else tensor.size

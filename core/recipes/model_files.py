"""How a model's folder is read, wherever it lies."""

from collections.abc import Mapping
from typing import Protocol


class ModelFiles(Protocol):
    """A model's folder: local, in object storage, or at a source."""

    def names(self) -> Mapping[str, int]:
        """Sizes of the files by relative POSIX path."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the file's end."""

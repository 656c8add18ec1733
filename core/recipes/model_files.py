"""The interface for reading a model's folder, independent of where it is stored."""

from collections.abc import Mapping
from typing import Protocol


class ModelFiles(Protocol):
    """A model's folder: local, in object storage, or at a source."""

    def names(self) -> Mapping[str, int]:
        """Return relative POSIX path → size in bytes, for every file."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; fewer only at the file's end."""

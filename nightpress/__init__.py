"""Nightpress compresses Transformer models overnight and proves what it did.

The folders beside this file are links: in a checkout they lie at the top, in an installed package below this name.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nightpress.client import ApiError, AsyncClient, Client, ClientError, TransferError, UnreachableError

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "TransferError", "UnreachableError"]


def __getattr__(name: str) -> Any:
    """The clients are imported when first asked for: a worker's child needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nightpress import client

    return getattr(client, name)

"""The Python client, synchronous and asynchronous, and the `nightpress` command in `client.cli`.

Import it as `from nightpress import AsyncClient, Client`.
"""

from nightpress.client.asynchronous import AsyncClient
from nightpress.client.client import Client
from nightpress.client.errors import ApiError, ClientError, TransferError, UnreachableError

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "TransferError", "UnreachableError"]

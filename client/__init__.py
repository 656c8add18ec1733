"""What a person holds: a typed client for Python, synchronous and asynchronous, and the `nightpress` command in client.cli."""

from nightpress.client.asynchronous import AsyncClient
from nightpress.client.client import Client
from nightpress.client.errors import ApiError, ClientError, TransferError, UnreachableError

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "TransferError", "UnreachableError"]

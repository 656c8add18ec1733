"""What a person holds: a typed client for Python, synchronous and asynchronous, and the `nightpress` command in client.cli."""

from client.asynchronous import AsyncClient
from client.client import Client
from client.errors import ApiError, ClientError, TransferError, UnreachableError

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "TransferError", "UnreachableError"]

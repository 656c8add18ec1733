"""Taking the files of a model or a data set: the same requests for both."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from api.deps import ModelsReader, ModelsWriter, Services, ServicesDep
from api.problems import documented
from api.routes import answer
from core.errors import ErrorCode, NightpressError
from core.schemas import UploadFile

_PIECE = 1024**2  #: bytes handed to the store's thread at a time
_PATIENCE_S = 60.0  #: a client that sends nothing for so long has gone


class Subject(Protocol):
    @property
    def id(self) -> str: ...


class Registry(Protocol):
    """What the registries of models and of data sets have in common."""

    def get(self, tenant_id: str, reference: str, /) -> Any: ...
    def uploads(self, subject_id: str, /) -> list[UploadFile]: ...
    def receive_part(self, subject_id: str, path: str, number: int, stream: Iterator[bytes], size: int, /) -> None: ...
    def complete(self, subject_id: str, /) -> Any: ...
    def delete(self, subject_id: str, /) -> None: ...

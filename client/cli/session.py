"""The options that every command shares, `--api`, `--profile` and `--json`, and the client that is made from them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nightpress.client.client import Client


@dataclass(frozen=True)
class Session:
    """The values of the shared options."""

    api: str | None = None
    json: bool = False
    profile: str | None = None

    def client(self) -> Client:
        """A client of the chosen server. Raises ClientError for an unknown profile."""
        return Client(self.api, profile=self.profile)


_API = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="URL",
        help="The API's address; otherwise NIGHTPRESS_API_URL, or the stack that runs on this machine.",
    ),
]
_PROFILE = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="A server that `nightpress servers` lists; otherwise NIGHTPRESS_PROFILE."
    ),
]
_JSON = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON and nothing else to standard output: a document, or a document on each line."
    ),
]


def takes_session(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: its parameter `session: Session` is replaced by the shared options."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "session"]
    common = [
        inspect.Parameter("_api", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_API),
        inspect.Parameter("_profile", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_PROFILE),
        inspect.Parameter("_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON),
    ]

    @functools.wraps(function)
    def subcommand(*, _api: str | None, _profile: str | None, _json: bool, **given: Any) -> None:
        function(session=Session(_api, _json, _profile), **given)

    parameters = [*(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own), *common]
    subcommand.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    subcommand.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return subcommand

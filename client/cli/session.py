"""What every subcommand shares: `--api`, `--profile` and `--json`, said once, and the client made from them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nightpress.client.client import Client


@dataclass(frozen=True)
class Session:
    """The options that every subcommand takes."""

    api: str | None = None
    json: bool = False
    profile: str | None = None

    def client(self) -> Client:
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
    typer.Option("--profile", metavar="NAME", help="A server of `nightpress servers`; otherwise NIGHTPRESS_PROFILE."),
]
_JSON = Annotated[
    bool,
    typer.Option("--json", help="Print JSON (one document, or one a line) and nothing else to standard output."),
]


def takes_session(function: Callable[..., None]) -> Callable[..., None]:
    """Make a subcommand of a function whose parameter `session: Session` stands for the common options."""
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

"""Deliveries of results, and what they need: stored credentials, and the destinations of a model's name."""

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, model_validator

from nightpress.core.wire.base import Request, View

DeliveryState = Literal["pending", "delivered", "failed", "cancelled", "superseded"]
Destination = Annotated[
    str,
    Field(
        min_length=6,
        max_length=1024,
        pattern=r"^(s3|hf|oci)://[^\x00-\x20\x7f]+$",
        examples=[
            "s3://models/{model}/{job}",
            "hf://acme/encoder-int8@main",
            "oci://registry.example.com/acme/encoder:nightly",
        ],
    ),
]
Destinations = Annotated[list[Destination], Field(max_length=8)]
_Secret = Annotated[SecretStr, Field(min_length=1, max_length=8192, strict=False)]


class Secrets(Request):
    """Of s3: `access_key_id` and `secret_access_key`; of hf: `token`; of oci: `username` and `password`."""

    access_key_id: _Secret | None = None
    secret_access_key: _Secret | None = None
    token: _Secret | None = None
    username: _Secret | None = None
    password: _Secret | None = None

    def plain(self) -> dict[str, str]:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value.get_secret_value() for name, value in given.items() if value is not None}


#: scheme of an address → the names of its secrets
SECRETS_OF = {
    "s3": {"access_key_id", "secret_access_key"},
    "hf": {"token"},
    "oci": {"username", "password"},
}


class CredentialCreate(Request):
    """What the addresses below `prefix` are reached with. It is stored encrypted, and never shown again."""

    prefix: Destination
    secrets: Secrets

    @model_validator(mode="after")
    def _fit(self) -> "CredentialCreate":
        check_secrets(self.prefix, self.secrets)
        return self


class CredentialRotate(Request):
    """New secrets in place of the old ones."""

    secrets: Secrets


def check_secrets(prefix: str, secrets: Secrets) -> None:
    """Raises ValueError if these are not the secrets of the prefix's kind."""
    scheme = prefix.partition("://")[0]
    if secrets.plain().keys() != SECRETS_OF[scheme]:
        raise ValueError(f"credentials for {scheme}:// are {' and '.join(sorted(SECRETS_OF[scheme]))}")


class CredentialView(View):
    """Stored credentials, without their secrets."""

    id: str
    prefix: str
    version: int
    created_by: str | None
    created_at: dt.datetime
    rotated_at: dt.datetime


class ModelDestinations(Request):
    """Where each result that becomes the latest of a model's name goes."""

    destinations: Destinations


class ModelDestinationsView(View):
    """`version`: 0 as long as none were set; also the ETag."""

    model: str
    destinations: list[str]
    version: int
    set_by: str | None = None
    set_at: dt.datetime | None = None


class DeliveryCreate(Request):
    """Deliver the result of an accepted job now."""

    job_id: str = Field(min_length=1, max_length=40)
    destinations: Destinations = Field(min_length=1)


class DeliveryAttemptView(View):
    """One try. `error` is null if it delivered."""

    number: int
    at: dt.datetime
    error: dict[str, Any] | None
    sent_bytes: int
    duration_ms: int


class ResultDeliveryView(View):
    """One artifact on its way to one address; `log` is filled in where one delivery is asked for.

    `superseded`: a newer result was given to the same address first. `result`: where it is, e.g. the commit of the Hub.
    """

    id: str
    job_id: str
    artifact: str
    destination: str
    state: DeliveryState
    running: bool  #: whether an attempt is under way
    attempts: int
    next_at: dt.datetime | None
    total_bytes: int
    sent_bytes: int
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created_by: str | None
    created_at: dt.datetime
    finished_at: dt.datetime | None
    log: list[DeliveryAttemptView] = []

"""Calls about deliveries, their destinations and credentials, and about signatures. Nothing is sent here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from nightpress.client.calls import Call, if_match, items_reader, nothing, path_of, post, query, reader
from nightpress.core.wire.base import Page
from nightpress.core.wire.deliveries import (
    CredentialCreate,
    CredentialView,
    DeliveryCreate,
    ModelDestinations,
    ModelDestinationsView,
    ResultDeliveryView,
    Secrets,
)
from nightpress.core.wire.results import SigningKeyView

_DELIVERY, _DELIVERIES = reader(ResultDeliveryView), reader(Page[ResultDeliveryView])
_MADE = items_reader(ResultDeliveryView)
_CREDENTIAL, _CREDENTIALS = reader(CredentialView), reader(Page[CredentialView])
_DESTINATIONS = reader(ModelDestinationsView)
_KEYS = items_reader(SigningKeyView)


# Deliveries ----------------------------------------------------------------------------------------------------------


def deliver_result(job_id: str, destinations: Sequence[str]) -> Call[list[ResultDeliveryView]]:
    """Deliver every artifact of an accepted job to `s3://…`, `hf://…` or `oci://…` addresses. Returns at once."""
    return post("/v1/deliveries", _MADE, DeliveryCreate(job_id=job_id, destinations=list(destinations)))


def page_result_deliveries(
    *, job_id: str | None = None, state: str | None = None, cursor: str | None = None, limit: int = 50
) -> Call[Page[ResultDeliveryView]]:
    """A page of deliveries, newest first: of one job, or in one state."""
    params = query(job=job_id, state=state, cursor=cursor, limit=limit)
    return Call("GET", "/v1/deliveries", _DELIVERIES, params=params)


def get_result_delivery(delivery: str) -> Call[ResultDeliveryView]:
    """A delivery with every try."""
    return Call("GET", path_of("deliveries", delivery), _DELIVERY)


def cancel_delivery(delivery: str) -> Call[ResultDeliveryView]:
    """Cancel a delivery. One that is under way ends within seconds; what has arrived stays there."""
    return post(path_of("deliveries", delivery, "cancel"), _DELIVERY)


def retry_delivery(delivery: str) -> Call[ResultDeliveryView]:
    """Try a failed or cancelled delivery again, or a pending one now. It goes on where it stopped."""
    return post(path_of("deliveries", delivery, "retry"), _DELIVERY)


# Destinations of a model's name --------------------------------------------------------------------------------------


def get_destinations(model: str) -> Call[ModelDestinationsView]:
    """Where each result goes that becomes the latest of a model's name."""
    return Call("GET", path_of("models", model, "destinations"), _DESTINATIONS)


def set_destinations(
    model: str, destinations: Sequence[str], *, version: int | None = None
) -> Call[ModelDestinationsView]:
    """Set where each result goes that becomes the latest of a model's name; an empty list ends it.

    With `version`, raises ApiError(precondition_failed) where they have been changed since that version.
    """
    body = ModelDestinations(destinations=list(destinations)).model_dump(mode="json")
    headers = if_match(version)
    path = path_of("models", model, "destinations")
    return Call("PUT", path, _DESTINATIONS, repeatable=not headers, json=body, headers=headers)


# Credentials ---------------------------------------------------------------------------------------------------------


def create_credential(prefix: str, secrets: dict[str, str]) -> Call[CredentialView]:
    """Store what the destinations below a prefix are reached with. No answer shows it again.

    `secrets`: of s3 access_key_id and secret_access_key, of hf token, of oci username and password.
    """
    CredentialCreate.model_validate({"prefix": prefix, "secrets": secrets})
    # The models of the wire hide secrets, also where they are written as JSON.
    return replace(post("/v1/credentials", _CREDENTIAL), json={"prefix": prefix, "secrets": secrets})


def page_credentials(*, cursor: str | None = None, limit: int = 50) -> Call[Page[CredentialView]]:
    return Call("GET", "/v1/credentials", _CREDENTIALS, params=query(cursor=cursor, limit=limit))


def get_credential(credential: str) -> Call[CredentialView]:
    return Call("GET", path_of("credentials", credential), _CREDENTIAL)


def rotate_credential(credential: str, secrets: dict[str, str]) -> Call[CredentialView]:
    """Replace the secrets. Each delivery uses the new ones from its next attempt on."""
    Secrets.model_validate(secrets)
    return replace(post(path_of("credentials", credential, "rotate"), _CREDENTIAL), json={"secrets": secrets})


def delete_credential(credential: str, *, version: int | None = None) -> Call[None]:
    """Delete credentials. With `version`, raises ApiError(precondition_failed) where they have been replaced since."""
    return Call("DELETE", path_of("credentials", credential), nothing, headers=if_match(version))


# Signatures ----------------------------------------------------------------------------------------------------------


def list_signing_keys() -> Call[list[SigningKeyView]]:
    """The public keys that check the signatures of this service's artifacts; the one in use first."""
    return Call("GET", "/v1/signing-keys", _KEYS)


def get_attestation(job_id: str, format: str) -> Call[bytes]:  # noqa: A002 - the word in the address
    """The signed statement of an accepted artifact: a Sigstore bundle. Raises ApiError(not_found) where it was not accepted."""
    path = path_of("jobs", job_id, "artifacts", format, "attestation")
    return Call("GET", path, lambda response: response.content)


def get_report_file(job_id: str, form: Literal["json", "html", "md"]) -> Call[bytes]:
    """A report as it was signed, byte for byte."""
    params = query(unchanged="true") if form != "json" else []
    return Call("GET", path_of("jobs", job_id, f"report.{form}"), lambda response: response.content, params=params)

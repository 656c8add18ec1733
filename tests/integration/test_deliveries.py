"""Deliveries, credentials and signatures in SQL: who takes a delivery, what comes first, and what is stored."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.attestation import read_bundle, read_public_keys
from nightpress.core.handoff.manifest import describe_bytes
from nightpress.core.service.compose import Resources
from nightpress.core.service.deliveries.addresses import parse_destination
from nightpress.core.service.tables.deliveries import (
    deliveries,
    delivery_attempts,
    destination_credentials,
    model_destinations,
)
from nightpress.core.service.tables.jobs import job_artifacts
from nightpress.core.service.tables.signing import attestations, signing_keys
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.wire.deliveries import Secrets
from tests.columns import MAPPING, WORDS, Rows, identifier, whole_id
from tests.deliveries import FILES, TENANT, World

HERE = "hf://acme/tiny"
COVERED = {attestations, deliveries, delivery_attempts, destination_credentials, model_destinations, signing_keys}


@pytest.fixture
def world(tmp_path: Path, sql_url: str) -> Iterator[World]:
    world = World(tmp_path, sql_url, destinations=["hf://acme", "s3://models/out"])
    yield world
    world.close()


def take(world: World, limit: int = 9) -> list[str]:
    return [due.id for due in world.store.take_due(limit=limit, ttl_s=60)]


# Who takes a delivery ------------------------------------------------------------------------------------------------


def test_a_delivery_has_one_owner_whose_claim_expires(world: World) -> None:
    world.accept(destinations=[HERE])
    [due] = world.store.take_due(limit=9, ttl_s=60)
    assert take(world) == []
    assert world.store.renew(due.claim, -1)  # as if its process had been away for long
    [again] = world.store.take_due(limit=9, ttl_s=60)
    assert (again.id, again.attempts) == (due.id, 2)
    assert not world.store.renew(due.claim, 60)
    assert not world.store.settle(due, result={"url": "theirs"}, duration_s=1)
    with pytest.raises(NightpressError) as lost:
        world.store.note(due.claim, {"model.onnx": {"upload_id": "theirs"}})
    assert lost.value.code is ErrorCode.CANCELLED
    assert world.store.settle(again, result={"url": "ours"}, duration_s=1)
    assert world.store.get(TENANT, due.id).result == {"url": "ours"}


@pytest.mark.slow
def test_an_address_has_one_delivery_under_way_and_the_newest_result_wins(world: World) -> None:
    for _ in range(3):
        world.accept(destinations=[HERE])
    newest, *others = world.deliveries()
    assert take(world) == [newest.id]
    assert [world.store.get(TENANT, old.id).state for old in others] == ["superseded", "superseded"]
    world.accept(destinations=[HERE])
    assert take(world) == []  # the newest of all waits until the one that is under way has ended
    [waiting] = [found for found in world.deliveries(state="pending") if not found.running]
    assert waiting.id == world.deliveries()[0].id


@pytest.mark.slow
def test_an_older_result_never_follows_a_newer_one(world: World) -> None:
    world.accept(destinations=[HERE])
    [older] = world.store.take_due(limit=1, ttl_s=60)
    world.accept(destinations=[HERE])
    newer = world.deliveries()[0]
    assert take(world) == []  # the older is under way
    refused = NightpressError(ErrorCode.DESTINATION_UNAVAILABLE, "Away.")
    assert world.store.settle(older, error=refused, pause_s=0.0, duration_s=1)
    world.store.retry(TENANT, newer.id)
    due = world.store.take_due(limit=9, ttl_s=60)
    assert [found.id for found in due] == [newer.id]
    assert world.store.settle(due[0], result={"url": "newer"}, duration_s=1)
    with pytest.raises(NightpressError):
        world.store.retry(TENANT, older.id)
    assert world.store.get(TENANT, older.id).state == "superseded"


def test_cancel_and_retry_are_guarded(world: World) -> None:
    world.accept(destinations=[HERE])
    [due] = world.store.take_due(limit=1, ttl_s=60)
    assert world.store.retry(TENANT, due.id).running  # under way: nothing changes
    assert world.store.cancel(TENANT, due.id).state == "cancelled"
    assert not world.store.renew(due.claim, 60)
    assert world.store.retry(TENANT, due.id).state == "pending"
    [again] = world.store.take_due(limit=1, ttl_s=60)
    assert world.store.settle(again, result={"url": "x"}, duration_s=1)
    assert world.store.cancel(TENANT, due.id).state == "delivered"
    with pytest.raises(NightpressError) as refused:
        world.store.retry(TENANT, due.id)
    assert refused.value.code is ErrorCode.CONFLICT
    for other in (world.store.get, world.store.cancel, world.store.retry):
        with pytest.raises(NightpressError) as missing:
            other("another", due.id)
        assert missing.value.code is ErrorCode.NOT_FOUND


# What is delivered ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_name_has_standing_destinations_for_each_result_that_becomes_its_latest(world: World) -> None:
    names = world.resources.model_destinations
    assert names.get(TENANT, "tiny").version == 0
    names.set(TENANT, "tiny", ["hf://acme/latest"], version=0)
    first = world.accept(destinations=[HERE, "hf://acme/latest"])
    assert {found.destination for found in world.deliveries(job_id=first)} == {HERE, "hf://acme/latest"}
    kept = world.accept(promote=False)
    assert world.deliveries(job_id=kept) == []
    second = world.accept()
    assert [found.destination for found in world.deliveries(job_id=second)] == ["hf://acme/latest"]
    for due in world.store.take_due(limit=9, ttl_s=60):
        world.store.settle(due, result={"url": "x"}, duration_s=1)
    world.resources.promotions.promote(TENANT, "tiny", first, key_id=None)  # going back is delivered as well
    assert next(found.state for found in world.deliveries(job_id=first)) == "pending"
    with pytest.raises(NightpressError) as changed:
        names.set(TENANT, "tiny", [], version=0)
    assert changed.value.code is ErrorCode.PRECONDITION_FAILED


def test_artifacts_need_addresses_of_their_own(world: World) -> None:
    both: dict[str, Any] = {"onnx": FILES, "gguf": {"model.gguf": b"x"}}
    clash = world.accept(both, destinations=["s3://models/out/x"])
    assert {(found.state, found.error and found.error["code"]) for found in world.deliveries(job_id=clash)} == {
        ("failed", "invalid_request")
    }
    apart = world.accept(both, destinations=["s3://models/out/{job}/{artifact}"])
    wanted = {f"s3://models/out/{apart}/{form}" for form in both}
    assert {found.destination for found in world.deliveries(job_id=apart)} == wanted


def test_a_job_that_is_given_anothers_result_delivers_it_too(world: World) -> None:
    world.accept(fingerprint="f" * 64)
    store = world.resources.store
    from tests.jobs import load, submit

    again = load(store, submit(store, fingerprint="f" * 64, destinations=[HERE]))
    done = store.requests.reuse(again)
    assert done.reused_from is not None
    assert [found.destination for found in world.deliveries(job_id=done.id)] == [HERE]
    signed = read_bundle(world.resources.signing.bundle(done.id, "onnx"), keys_of(world))
    assert signed.files == {path: describe_bytes(path, data).sha256 for path, data in FILES.items()}


def test_what_is_on_its_way_is_not_pruned(world: World) -> None:
    job_id = world.accept(destinations=[HERE], promote=False)
    retention = world.resources.retention
    assert (retention.prune_artifacts(-60), retention.prune_jobs(-60)) == (0, 0)
    world.store.cancel(TENANT, world.deliveries()[0].id)
    assert retention.prune_artifacts(-60) == 1
    with pytest.raises(NightpressError) as pruned:
        world.store.add(TENANT, job_id, [HERE])
    assert pruned.value.code is ErrorCode.CONFLICT


# Signatures ----------------------------------------------------------------------------------------------------------


def keys_of(world: World) -> list[Any]:
    return read_public_keys("".join(key.public_key for key in world.resources.signing.public_keys()).encode())


def test_accepted_artifacts_are_signed_once_and_rejected_ones_never(world: World) -> None:
    signing = world.resources.signing
    accepted, rejected = world.accept(), world.accept(verdict="rejected")
    assert (signing.sign_pending(), signing.sign_pending()) == (1, 0)
    bundle = signing.bundle(accepted, "onnx")
    renewed = world.settings.model_copy(update={"secret_key": SecretStr("another")})
    other = Resources(renewed, world.engine).signing
    assert other.bundle(accepted, "onnx") == bundle  # the first signature stays
    later = other.bundle(world.accept(), "onnx")
    assert [key.current for key in other.public_keys()] == [True, False]
    keys = keys_of(world)
    assert read_bundle(bundle, keys).key_id != read_bundle(later, keys).key_id
    with pytest.raises(NightpressError) as missing:
        signing.bundle(rejected, "onnx")
    assert missing.value.code is ErrorCode.NOT_FOUND


# Credentials ---------------------------------------------------------------------------------------------------------


def test_credentials_are_sealed_for_their_place_and_sealed_again_by_a_new_key(world: World) -> None:
    stored = world.credentials("hf://acme/tiny", token="hf_narrow")
    world.credentials("hf://acme", token="hf_wide")
    book, here = world.resources.credentials, parse_destination(HERE, world.settings)
    assert book.secrets_for(TENANT, here) == {"token": "hf_narrow"}
    assert book.secrets_for(TENANT, parse_destination("hf://acme/other", world.settings)) == {"token": "hf_wide"}
    with transaction(world.engine, read_only=True) as connection:
        texts = str(connection.execute(select(destination_credentials)).all())
    assert "hf_narrow" not in texts
    book.rotate(TENANT, stored.id, Secrets(token=SecretStr("hf_new")))

    newer = world.settings.model_copy(update={"credential_keys": [SecretStr("second"), SecretStr("first")]})
    moved = Resources(newer, world.engine).credentials
    assert (moved.seal_again(), moved.seal_again()) == (2, 0)
    assert moved.secrets_for(TENANT, here) == {"token": "hf_new"}
    with pytest.raises(NightpressError) as closed:
        book.secrets_for(TENANT, here)
    assert closed.value.code is ErrorCode.DESTINATION_REFUSED

    with transaction(world.engine) as connection:  # who can only write rows can't have it sent elsewhere
        mine = destination_credentials.c.id == stored.id
        connection.execute(update(destination_credentials).where(mine).values(prefix="hf://acme/stolen"))
    with pytest.raises(NightpressError):
        moved.secrets_for(TENANT, parse_destination("hf://acme/stolen", world.settings))
    with pytest.raises(NightpressError) as none:
        moved.secrets_for("another", here)
    assert "No credentials" in none.value.message


# Every column --------------------------------------------------------------------------------------------------------


def test_every_column(world: World, rows: Rows) -> None:
    assert open_keeper(world.settings)  # the same installation key serves webhooks
    stored = world.credentials("hf://acme", token="x")
    sealed = {"sealed": WORDS, "sealed_by": whole_id(16), "created_at": rows.now, "rotated_at": rows.now}
    known = {"id": stored.id, "tenant_id": TENANT, "prefix": "hf://acme", "version": 1, "created_by": None}
    rows.check(destination_credentials, {**known, **sealed})
    with transaction(world.engine) as connection:
        connection.execute(update(destination_credentials).values(created_by="key00001"))
    rows.check(destination_credentials, {**known, **sealed, "created_by": "key00001"})
    world.resources.model_destinations.set(TENANT, "other", [HERE], key_id="key00002")
    named = {"tenant_id": TENANT, "model_name": "other", "destinations": [HERE], "version": 1}
    rows.check(model_destinations, {**named, "set_by": "key00002", "set_at": rows.now})

    job_id = world.accept()
    [made] = world.store.add(TENANT, job_id, [HERE], key_id="key00003")
    [due] = world.store.take_due(limit=1, ttl_s=600)
    due.claim.total, due.claim.done, due.claim.skipped = 1000, 300, 100
    world.store.note(due.claim, {"model.onnx": {"upload_id": "u"}})
    row: dict[str, Any] = {
        "id": made.id,
        "tenant_id": TENANT,
        "job_id": job_id,
        "artifact": "onnx",
        "destination": HERE,
        "state": "pending",
        "attempts": 1,
        "next_at": rows.now,
        "claim_id": identifier("clm"),
        "claim_until": rows.after(600),
        "total_bytes": 1000,
        "sent_bytes": 300,
        "resume": {"model.onnx": {"upload_id": "u"}},
        "result": None,
        "error": None,
        "created_by": "key00003",
        "created_at": rows.now,
        "finished_at": None,
    }
    rows.check(deliveries, row)
    fault = NightpressError(ErrorCode.DESTINATION_UNAVAILABLE, "Away.", hint="Wait.")
    assert world.store.settle(due, error=fault, pause_s=900, duration_s=2.5)
    free = {"claim_id": None, "claim_until": None, "next_at": rows.after(900), "error": fault.as_dict()}
    rows.check(deliveries, {**row, **free})
    tried = {"delivery_id": made.id, "number": 1, "at": rows.now, "sent_bytes": 200, "duration_ms": 2500}
    rows.check(delivery_attempts, {**tried, "error": fault.as_dict()})
    world.store.retry(TENANT, made.id)
    [due] = world.store.take_due(limit=1, ttl_s=600)
    assert world.store.settle(due, result={"url": "there"}, duration_s=1)
    done = {"state": "delivered", "result": {"url": "there"}, "resume": {}, "finished_at": rows.now, "next_at": None}
    nothing = {"claim_id": None, "claim_until": None, "sent_bytes": 0, "total_bytes": 0}
    rows.check(deliveries, {**row, **done, **nothing}, alike=frozenset({"sent_bytes", "total_bytes"}))
    assert world.store.forget(-60) == 1

    world.resources.signing.sign_pending()
    with transaction(world.engine, read_only=True) as connection:
        artifact_id = connection.execute(select(job_artifacts.c.id)).scalar_one()
    [key] = world.resources.signing.public_keys()
    rows.check(signing_keys, {"id": key.id, "public_key": WORDS, "created_at": rows.now})
    signed = {"artifact_id": artifact_id, "bundle": MAPPING, "key_id": key.id, "signed_at": rows.now}
    rows.check(attestations, signed)
    rows.all_seen(*COVERED)
    assert isinstance(key.created_at, dt.datetime)

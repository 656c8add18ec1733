"""API keys: their format, their rights, and that a stolen table of keys is useless."""

import datetime as dt

import pytest
from sqlalchemy import Engine, select, update

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.logs import redact
from nightpress.core.service.access import __main__ as access
from nightpress.core.service.access import keys
from nightpress.core.service.access.keys import ALL_SCOPES, KeyRing, create_key, revoke
from nightpress.core.service.tables.access import api_keys


def refused(ring: KeyRing, plain: str) -> NightpressError:
    with pytest.raises(NightpressError) as raised:
        ring.authenticate(plain)
    assert raised.value.code is ErrorCode.UNAUTHENTICATED
    return raised.value


def test_a_key_opens_its_tenant_with_its_scopes(engine: Engine):
    record, plain = create_key(engine, tenant_id="search", name="ci", scopes=["jobs:read", "jobs:write"])
    ring = KeyRing(engine)
    assert ring.cached(plain) is None
    principal = ring.authenticate(plain)
    assert (principal.tenant_id, principal.key_id) == ("search", record.id)
    assert principal.scopes == {"jobs:read", "jobs:write"}
    assert ring.cached(plain) == principal == ring.authenticate(plain)


def test_every_changed_character_makes_it_worthless_for_the_same_reason(engine: Engine):
    _, plain = create_key(engine, name="ci", scopes=["admin"])
    ring = KeyRing(engine)
    answers = {
        str(refused(ring, wrong)) for wrong in ("", "np_", plain[:-1], plain + "0", plain.upper(), "np_é" + plain)
    }
    for index in range(len(plain)):
        other = "0" if plain[index] != "0" else "1"
        answers.add(str(refused(ring, plain[:index] + other + plain[index + 1 :])))
    assert len(answers) == 1


def test_a_well_made_key_that_was_never_given_out_is_refused(engine: Engine):
    _, plain = create_key(engine, name="ci", scopes=["admin"])
    for body in (plain[:12] + "A" * 43, "np_aaaaaaaa_" + "A" * 43):
        forged = body + keys._checksum(body)
        assert keys._SHAPE.fullmatch(forged)
        refused(KeyRing(engine), forged)


def test_an_expired_key_is_refused(engine: Engine):
    now = dt.datetime.now(dt.UTC)
    _, old = create_key(engine, name="old", scopes=["admin"], expires_at=now - dt.timedelta(seconds=1))
    _, new = create_key(engine, name="new", scopes=["admin"], expires_at=now + dt.timedelta(hours=1))
    ring = KeyRing(engine)
    refused(ring, old)
    ring.authenticate(new)


def test_a_revoked_key_is_refused_and_remembered_no_longer_than_five_seconds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    record, plain = create_key(engine, name="ci", scopes=["admin"])
    ring = KeyRing(engine)
    ring.authenticate(plain)
    assert revoke(engine, record.id)
    assert not revoke(engine, record.id)
    refused(KeyRing(engine), plain)
    now = keys.time.monotonic()
    monkeypatch.setattr(keys.time, "monotonic", lambda: now + 5.1)
    assert ring.cached(plain) is None
    refused(ring, plain)


def test_the_table_holds_no_usable_key(engine: Engine):
    _, plain = create_key(engine, name="ci", scopes=["admin"])
    with transaction(engine, read_only=True) as connection:
        dump = str(connection.execute(select(api_keys)).all())
    assert plain not in dump
    assert plain[12:55] not in dump


def test_when_a_key_was_last_used_is_kept_to_the_minute(engine: Engine):
    record, plain = create_key(engine, name="ci", scopes=["admin"])

    def last_used() -> dt.datetime | None:
        with transaction(engine, read_only=True) as connection:
            return connection.execute(select(api_keys.c.last_used_at)).scalar_one()

    assert last_used() is None
    KeyRing(engine).authenticate(plain)
    first = last_used()
    assert first is not None
    KeyRing(engine).authenticate(plain)
    assert last_used() == first
    with transaction(engine) as connection:
        connection.execute(update(api_keys).values(last_used_at=first - dt.timedelta(minutes=2)))
    KeyRing(engine).authenticate(plain)
    assert (last_used() or first) >= first
    assert record.name == "ci"


def test_a_scope_that_does_not_exist_is_refused(engine: Engine):
    for scopes in (["jobs:reed"], []):
        with pytest.raises(NightpressError) as raised:
            create_key(engine, name="ci", scopes=scopes)
        assert raised.value.code is ErrorCode.INVALID_REQUEST


def test_keys_are_blotted_out_of_logs(engine: Engine):
    _, plain = create_key(engine, name="ci", scopes=["admin"])
    assert plain[12:] not in redact(f"called with {plain} by")


def test_the_operators_command(
    sql_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", sql_url)
    assert access.main(["create-key", "--name", "ci", "--days", "1"]) == 0
    plain = capsys.readouterr().out.strip()
    principal = KeyRing(engine).authenticate(plain)
    assert principal.scopes == ALL_SCOPES - {"admin"}
    assert access.main(["create-key", "--name", "ops", "--scope", "admin", "--tenant", "ops"]) == 0
    assert KeyRing(engine).authenticate(capsys.readouterr().out.strip()).tenant_id == "ops"
    assert access.main(["revoke-key", principal.key_id]) == 0
    refused(KeyRing(engine), plain)
    assert access.main(["revoke-key", principal.key_id]) == 1
    assert "no key" in capsys.readouterr().err

"""Signing in by OpenID Connect at a real provider: the page's sessions, tokens of programs, and the command line."""

import json
import re
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc.jwk import RSAKey
from sqlalchemy import select, update

from nightpress import migrations
from nightpress.client import Client, device_flow
from nightpress.client.cli import output
from nightpress.client.sign_ins import read_sign_in
from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.oidc.sessions import UNCONFIRMED_S, SessionBook
from nightpress.core.service.access.oidc.sign_in import SignIn
from nightpress.core.service.tables.access import audit_log, sessions
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.command import Done, run
from tests.face import Face
from tests.oidc import Provider, Visitor, serve_with_provider

Served = tuple[RunningApi, Provider]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_with_provider(tmp_path_factory.mktemp("oidc")) as served:
        yield served


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Face:
    """The settings of somebody else's machine, without a key."""
    face = Face(tmp_path_factory.mktemp("machine"))
    face.settings.key_file.unlink()
    return face


@pytest.fixture
def visitor(served: Served) -> Iterator[Visitor]:
    with Visitor(served[0].url) as visitor:
        yield visitor
    served[1].put("ada", ["engineers"])


def forget_cached(api: RunningApi) -> None:
    """As another process would see it, or this one five seconds later."""
    api.services.resources.sessions._known.clear()


def status_of(visitor: Visitor) -> int:
    return visitor.get(f"{visitor.api}/v1/me").status_code


def set_back(api: RunningApi, **columns: float) -> None:
    """Set times of all live sessions to so many seconds from now."""
    values = {name: db_now(seconds) for name, seconds in columns.items()}
    with statement(api.services.resources.engine) as connection:
        connection.execute(update(sessions).where(sessions.c.ended_at.is_(None)).values(values))
    forget_cached(api)


def newest(api: RunningApi) -> Any:
    with transaction(api.services.resources.engine, read_only=True) as connection:
        return connection.execute(select(sessions).order_by(sessions.c.created_at.desc()).limit(1)).one()


def sign_in_of(api: RunningApi) -> SignIn:
    found = api.services.resources.sign_in
    assert found is not None
    return found


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_person_signs_in_acts_within_the_groups_and_signs_out(served: Served, visitor: Visitor):
    api, _ = served
    assert status_of(visitor) == 401
    answer = visitor.sign_in(place="#/models")
    assert answer.headers["location"] == "/#/models"
    me = visitor.get(f"{api.url}/v1/me").json()
    assert (me["tenant_id"], me["person"]["email"], me["person"]["tenants"]) == (
        "engines",
        "ada@example.com",
        ["engines"],
    )
    assert me["key_id"] == me["person"]["id"]
    assert "admin" not in me["scopes"]
    assert visitor.get(f"{api.url}/v1/webhooks").status_code == 403, "a scope that no group gives"
    body = {"name": "nightly", "scopes": ["jobs:read"]}
    made = visitor.post(f"{api.url}/v1/keys", json=body, headers=visitor.csrf()).json()
    assert made["record"]["made_by"] == me["key_id"]
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {made['key']}"}) as robot:
        assert robot.get(f"{api.url}/v1/jobs").status_code == 200
    with transaction(api.services.resources.engine, read_only=True) as connection:
        lines = connection.execute(select(audit_log.c.action).where(audit_log.c.key_id == me["key_id"])).scalars().all()
    assert lines == ["POST /v1/keys"]
    assert visitor.post(f"{api.url}/auth/sign-out", headers=visitor.csrf()).status_code == 204
    assert newest(api).reason == "signed_out"
    assert status_of(visitor) == 401


def test_a_person_of_two_tenants_chooses_and_one_of_none_is_told(served: Served, visitor: Visitor):
    api, provider = served
    provider.put("dana", ["watchers", "engineers"], elsewhere=True)  # these groups come from userinfo
    visitor.sign_in("dana")
    me = visitor.get(f"{api.url}/v1/me").json()
    assert (me["tenant_id"], me["person"]["tenants"]) == ("engines", ["engines", "watch"]), "in the setting's order"
    visitor.sign_in("dana", tenant="watch")
    me = visitor.get(f"{api.url}/v1/me").json()
    assert (me["tenant_id"], me["scopes"]) == ("watch", ["jobs:read"])
    provider.put("eve", ["strangers"])
    with Visitor(api.url) as other:
        assert other.sign_in("eve").headers["location"] == "/#sign-in=forbidden"
        assert status_of(other) == 401


@pytest.mark.parametrize(
    "times",
    [{"seen_at": -7300}, {"ends_at": -1}, {"confirmed_at": -(900 + UNCONFIRMED_S + 60)}],
    ids=["idle", "old", "unconfirmed"],
)
def test_a_session_ends_by_itself(served: Served, visitor: Visitor, times: dict[str, float]):
    api, _ = served
    visitor.sign_in()
    set_back(api, seen_at=-7000, ends_at=60, confirmed_at=-4000)
    assert status_of(visitor) == 200
    visitor.sign_in()
    set_back(api, **times)
    assert status_of(visitor) == 401
    api.services.resources.sessions.prune()
    assert (newest(api).reason, newest(api).refresh_token) == ("expired", None)


def test_a_session_is_confirmed_and_ends_when_the_group_is_gone(served: Served, visitor: Visitor):
    api, provider = served
    visitor.sign_in()
    before = newest(api)
    sign_in_of(api).confirm_due()
    assert newest(api).refresh_token == before.refresh_token, "not due yet"
    set_back(api, check_at=-1)
    sign_in_of(api).confirm_due()
    after = newest(api)
    assert after.confirmed_at > before.confirmed_at
    assert after.check_at > after.confirmed_at
    assert after.refresh_token != before.refresh_token
    assert status_of(visitor) == 200
    provider.put("ada", ["strangers"])
    set_back(api, check_at=-1)
    sign_in_of(api).confirm_due()
    forget_cached(api)
    assert newest(api).reason == "no_group"
    assert status_of(visitor) == 401


@pytest.mark.slow
def test_a_refresh_token_that_the_provider_refuses_ends_the_session(served: Served, visitor: Visitor):
    api, provider = served
    visitor.sign_in()
    provider.stop()
    set_back(api, check_at=-1)
    with pytest.raises(NightpressError) as away:
        sign_in_of(api).confirm_due()
    assert away.value.code is ErrorCode.SOURCE_UNAVAILABLE
    assert status_of(visitor) == 200, "a provider that is away ends nothing for an hour"
    provider.start()  # it has forgotten all tokens
    set_back(api, check_at=-1)
    sign_in_of(api).confirm_due()
    forget_cached(api)
    assert newest(api).reason == "refused"
    assert status_of(visitor) == 401


def test_of_many_processes_one_confirms_a_session(served: Served, visitor: Visitor):
    api, _ = served
    visitor.sign_in()
    set_back(api, check_at=-1)
    engine, settings = api.services.resources.engine, api.services.resources.settings
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: SessionBook(engine, settings).take_due(), range(8)))
    mine = newest(api).id
    assert [due.id for due in taken if due is not None].count(mine) == 1


def test_sessions_are_listed_and_ended_by_whoever_may_write_keys(served: Served, visitor: Visitor):
    api, _ = served
    visitor.sign_in()
    live = newest(api)
    key = api.key(tenant_id="engines")
    with Client(api.url, key) as client:
        (mine,) = [session for session in client.sessions.iterate() if session.id == live.id]
        assert (mine.live, mine.email, mine.groups, mine.person_id) == (
            True,
            "ada@example.com",
            ["engineers"],
            live.person_id,
        )
        client.sessions.end(live.id)
        forget_cached(api)
        assert status_of(visitor) == 401
        (mine,) = [session for session in client.sessions.iterate() if session.id == live.id]
        assert (mine.live, mine.reason) == (False, "revoked")


@pytest.mark.slow
def test_nothing_changes_for_who_does_not_set_it(tmp_path: Path, face: Face):
    settings = Settings(_env_file=None, data_dir=tmp_path / "np", broker_url="redis://127.0.0.1:1/0")
    migrations.upgrade(settings.sql_url)
    with serve(settings) as api, Visitor(api.url) as visitor:
        assert visitor.get(f"{api.url}/auth/provider").json()["issuer"] == ""
        assert visitor.get(f"{api.url}/auth/sign-in").status_code == 404
        visitor.cookies.set("nightpress_session", "x")
        refused = visitor.get(f"{api.url}/v1/me")
        assert (refused.status_code, "no API key" in refused.json()["detail"]) == (401, True)
        refused = visitor.get(f"{api.url}/v1/me", headers={"Authorization": "Bearer a.b.c"})
        assert (refused.status_code, "API key is not valid" in refused.json()["detail"]) == (401, True)
        assert "takes API keys only" in run(face, "login", "--api", api.url).stderr


# Programs ------------------------------------------------------------------------------------------------------------


def test_a_program_comes_with_the_providers_access_token(served: Served):
    api, provider = served
    form = {"grant_type": "client_credentials", "resource": "urn:nightpress-api"}
    told = httpx.post(f"{provider.issuer}/token", data=form, auth=("robot", "robot-secret"), trust_env=False).json()
    headers = {"Authorization": f"Bearer {told['access_token']}"}
    me = httpx.get(f"{api.url}/v1/me", headers=headers, trust_env=False).json()
    assert (me["tenant_id"], me["person"]["name"], me["scopes"]) == ("robots", "robot", ["jobs:read"])


@pytest.mark.slow
def test_keys_of_the_provider_are_rotated(served: Served):
    api, provider = served

    def status() -> int:
        headers = {"Authorization": f"Bearer {provider.sign()}"}
        return httpx.get(f"{api.url}/v1/me", headers=headers, trust_env=False).status_code

    assert status() == 200
    provider.stop()
    provider.key = RSAKey.generate_key(2048, {"kid": "second", "use": "sig", "alg": "RS256"})
    provider.start()
    sign_in_of(api).provider._keys._tried_at -= 31  # half a minute later
    assert status() == 200


# The command line ----------------------------------------------------------------------------------------------------


def command(face: Face, api: RunningApi, *arguments: str) -> Done:
    return run(face, *arguments, "--api", api.url, "--json")


def log_in(face: Face, api: RunningApi, provider: Provider, monkeypatch: pytest.MonkeyPatch, *more: str) -> Done:
    """Run `nightpress login`, and do in a browser what it asks for."""
    helpers: list[threading.Thread] = []

    def note(text: str, style: str = "") -> None:
        url, code = re.findall(r"Open (\S+) in a browser and enter the code (\S+)\.", text)[0]

        def approve() -> None:
            with Visitor(api.url) as browser:
                browser.go(f"{url}?user_code={code}", "ada")

        helpers.append(threading.Thread(target=approve))
        helpers[-1].start()

    monkeypatch.setattr(output, "note", note)
    monkeypatch.setattr(device_flow, "_POLL_S", 0.2)  # the provider names no interval
    done = command(face, api, "login", *more)
    for helper in helpers:
        helper.join()
    monkeypatch.undo()
    return done


@pytest.mark.slow
def test_the_command_line_signs_in_by_the_device_flow_refreshes_and_signs_out(
    served: Served, face: Face, monkeypatch: pytest.MonkeyPatch
):
    api, provider = served
    provider.put("ada", ["watchers", "engineers"])
    assert command(face, api, "whoami").returncode != 0
    done = log_in(face, api, provider, monkeypatch, "--tenant", "watch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tenant_id"] == "watch"
    me = json.loads(command(face, api, "whoami").stdout)
    assert (me["tenant_id"], me["person"]["email"]) == ("watch", "ada@example.com")
    path = face.folder / "config" / "nightpress" / "sign-ins.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    stored = json.loads(path.read_text())
    stored[api.url]["expires_at"] = 0
    path.write_text(json.dumps(stored))
    assert command(face, api, "whoami").returncode == 0
    renewed = json.loads(path.read_text())[api.url]
    assert renewed["expires_at"] > 0
    assert renewed["refresh_token"] != stored[api.url]["refresh_token"], "this provider's work once"
    assert json.loads(command(face, api, "logout").stdout) == {"api_url": api.url, "removed": True}
    assert json.loads(path.read_text()) == {}
    assert command(face, api, "whoami").returncode != 0


@pytest.mark.slow
def test_a_sign_in_that_the_api_refuses_is_not_kept(served: Served, face: Face, monkeypatch: pytest.MonkeyPatch):
    api, provider = served
    provider.put("ada", ["strangers"])
    done = log_in(face, api, provider, monkeypatch)
    assert "none of your groups" in done.stderr
    monkeypatch.setenv("XDG_CONFIG_HOME", str(face.folder / "config"))
    assert read_sign_in(api.url) is None

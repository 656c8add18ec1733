"""S31 to S34: forged and foreign tokens, sign-ins that are not one's own, requests that other sites forge, and other tenants."""

import base64
import hmac
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from joserfc import jwt
from joserfc.jwk import RSAKey
from sqlalchemy import func, select, text
from starlette.responses import Response

from nightpress.api import browser
from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.oidc.sessions import Confirmed
from nightpress.core.service.tables.access import sessions
from nightpress.core.settings import Settings
from tests.api import RunningApi
from tests.oidc import Provider, Visitor, serve_with_provider
from tests.patience import slowness

Served = tuple[RunningApi, Provider]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_with_provider(tmp_path_factory.mktemp("oidc")) as served:
        yield served


@pytest.fixture
def visitor(served: Served) -> Iterator[Visitor]:
    with Visitor(served[0].url) as visitor:
        yield visitor


def ask(api: RunningApi, token: str, **headers: str) -> httpx.Response:
    return httpx.get(
        f"{api.url}/v1/me",
        headers={"Authorization": f"Bearer {token}", **headers},
        trust_env=False,
        timeout=20 * slowness(),
    )


def how_many(api: RunningApi) -> int:
    with transaction(api.services.resources.engine, read_only=True) as connection:
        return int(connection.execute(select(func.count()).select_from(sessions)).scalar_one())


# S31: tokens ---------------------------------------------------------------------------------------------------------


def unsigned(provider: Provider) -> str:
    _, payload, _ = provider.sign().split(".")
    header = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": provider.key.kid}).encode()).rstrip(b"=")
    return f"{header.decode()}.{payload}."


def by_the_public_key_as_a_secret(provider: Provider) -> str:
    """Algorithm confusion: HS256, with what everybody knows of the provider's key."""
    secret = provider.key.as_pem(private=False)
    return _compact(
        {"alg": "HS256", "kid": provider.key.kid}, provider, lambda text: hmac.digest(secret, text, "sha256")
    )


def with_an_extension(provider: Provider) -> str:
    """Signed rightly, with a header that a reader must understand."""

    def sign(text: bytes) -> bytes:
        return bytes(provider.key.private_key.sign(text, PKCS1v15(), SHA256()))

    return _compact({"alg": "RS256", "kid": provider.key.kid, "crit": ["x"], "x": 1}, provider, sign)


def signed_by_rs512(provider: Provider) -> str:
    claims = jwt.decode(provider.sign(), provider.key).claims
    key = RSAKey.import_key({**provider.key.as_dict(private=True), "alg": "RS512"})
    return jwt.encode({"alg": "RS512", "kid": key.kid}, claims, key, algorithms=["RS512"])


def _compact(header: dict[str, Any], provider: Provider, sign: Callable[[bytes], bytes]) -> str:
    first = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=")
    content = first + b"." + provider.sign().split(".")[1].encode()
    return (content + b"." + base64.urlsafe_b64encode(sign(content)).rstrip(b"=")).decode()


_OTHER = RSAKey.generate_key(2048)


def by_another_key(provider: Provider, **header: Any) -> str:
    claims = jwt.decode(provider.sign(), provider.key).claims
    return jwt.encode({"alg": "RS256", "kid": provider.key.kid, **header}, claims, _OTHER)


def with_its_own_key_in_the_header(provider: Provider) -> str:
    claims = jwt.decode(provider.sign(), provider.key).claims
    return jwt.encode({"alg": "RS256", "jwk": _OTHER.as_dict(private=False)}, claims, _OTHER)


def changed(provider: Provider) -> str:
    header, _, signature = provider.sign().split(".")
    claims = jwt.decode(provider.sign(), provider.key).claims | {"groups": ["engineers", "watchers"]}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{header}.{payload}.{signature}"


FORGED: dict[str, Callable[[Provider], str]] = {
    "unsigned": unsigned,
    "algorithm confusion": by_the_public_key_as_a_secret,
    "another key of the same name": by_another_key,
    "its own key in the header": with_its_own_key_in_the_header,
    "changed": changed,
    "an algorithm that is not allowed": signed_by_rs512,
    "another audience": lambda provider: provider.sign(aud="another service"),
    "no audience": lambda provider: provider.sign(aud=None),
    "another issuer": lambda provider: provider.sign(iss="https://login.example.com"),
    "an issuer that only begins alike": lambda provider: provider.sign(iss=provider.issuer + "/"),
    "expired": lambda provider: provider.sign(exp=int(time.time()) - 120),
    "never expires": lambda provider: provider.sign(exp=None),
    "not yet valid": lambda provider: provider.sign(nbf=int(time.time()) + 600),
    "nobody": lambda provider: provider.sign(sub=None),
    "an endless name": lambda provider: provider.sign(sub="x" * 256),
    "a name that no database stores": lambda provider: provider.sign(sub="ada\0"),
    "a name that looks like another": lambda provider: provider.sign(sub="аda"),  # with a Cyrillic letter
    "a logout token": lambda provider: provider.sign({"typ": "logout+jwt"}),
    "an unknown extension": with_an_extension,
    "too long": lambda provider: provider.sign(more="x" * 20_000),
    "no token": lambda _provider: "a.b.c",
    "no text": lambda _provider: "..",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_or_foreign_token_opens_nothing(served: Served, name: str):
    api, provider = served
    assert ask(api, provider.sign()).status_code == 200
    refused = ask(api, FORGED[name](provider))
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")


@pytest.mark.slow
def test_a_token_gives_no_more_than_its_groups_and_only_in_their_tenants(served: Served):
    api, provider = served
    allowed = ask(api, provider.sign(groups=["watchers"]))
    assert (allowed.json()["tenant_id"], allowed.json()["scopes"]) == ("watch", ["jobs:read"])
    for groups in ([], ["strangers"], None, {"engineers": True}, "not a group", [["engineers"]], 7):
        assert ask(api, provider.sign(groups=groups)).status_code == 403, groups
    other = ask(api, provider.sign(groups=["watchers"]), **{"X-Nightpress-Tenant": "engines"})
    assert other.status_code == 403
    both = provider.sign(groups=["watchers", "engineers"])
    assert ask(api, both, **{"X-Nightpress-Tenant": "watch"}).json()["scopes"] == ["jobs:read"]
    key = {
        "Authorization": f"Bearer {api.key(tenant_id='engines', scopes=['jobs:read'])}",
        "X-Nightpress-Tenant": "watch",
    }
    assert httpx.get(f"{api.url}/v1/me", headers=key, trust_env=False).json()["tenant_id"] == "engines"


@pytest.mark.parametrize(
    "wrong", [{"nonce": "another"}, {"nonce": None}, {"azp": "cli"}, {"aud": "cli"}, {"aud": "urn:nightpress-api"}]
)
def test_an_id_token_of_another_sign_in_or_client_signs_nobody_in(served: Served, wrong: dict[str, Any]):
    api, provider = served
    found = api.services.resources.sign_in
    assert found is not None
    right = {"aud": ["page"], "azp": "page", "nonce": "mine"}
    assert found._tokens.check_id_token(provider.sign(**right), nonce="mine")["sub"] == "ada"
    with pytest.raises(NightpressError) as refused:
        found._tokens.check_id_token(provider.sign(**(right | wrong)), nonce="mine")
    assert refused.value.code is ErrorCode.UNAUTHENTICATED


@pytest.mark.slow
def test_tokens_of_unknown_keys_do_not_flood_the_provider(served: Served):
    api, provider = served
    log = []
    found = api.services.resources.sign_in
    assert found is not None
    fetch = found.provider._keys._fetch
    found.provider._keys._fetch = lambda: (log.append(1), fetch())[1]  # type: ignore[func-returns-value]
    try:
        for number in range(20):
            assert ask(api, by_another_key(provider, kid=f"k{number}")).status_code == 401
    finally:
        found.provider._keys._fetch = fetch
    assert len(log) <= 1


# S32: sign-ins -------------------------------------------------------------------------------------------------------


def test_a_sign_in_is_finished_once_and_by_the_browser_that_began_it(served: Served, visitor: Visitor):
    api, _ = served
    begun = visitor.get(f"{api.url}/auth/sign-in").headers["location"]
    back = visitor.go(begun, "ada")
    pending = visitor.cookies["nightpress_sign_in"]
    before = how_many(api)
    with Visitor(api.url) as victim:  # login CSRF: the attacker has somebody else finish the attacker's sign-in
        assert victim.get(back).headers["location"] == "/#sign-in=unauthenticated"
        victim.get(f"{api.url}/auth/sign-in")
        assert victim.get(back).headers["location"] == "/#sign-in=unauthenticated", "the state of another sign-in"
        assert "nightpress_session" not in victim.cookies
    assert visitor.get(back).headers["location"] == "/#/jobs"
    assert how_many(api) == before + 1
    with Visitor(api.url) as thief:  # who has copied both cookie and address
        thief.cookies.set("nightpress_sign_in", pending)
        assert thief.get(back).headers["location"].startswith("/#sign-in=")
        assert "nightpress_session" not in thief.cookies
    assert how_many(api) == before + 1


def test_the_database_too_makes_one_session_of_a_sign_in(served: Served, visitor: Visitor):
    """Should a provider take a code twice, the second session of a state is refused by its unique column."""
    api, _ = served
    visitor.sign_in()
    person = visitor.get(f"{api.url}/v1/me").json()["person"]["id"]
    book = api.services.resources.sessions
    book.begin(Confirmed(person, ["engineers"], None), "engines", state="once", replaces=None)
    with pytest.raises(NightpressError) as refused:
        book.begin(Confirmed(person, ["engineers"], None), "engines", state="once", replaces=None)
    assert refused.value.code is ErrorCode.CONFLICT


@pytest.mark.parametrize(
    "change",
    [
        {"code": "stolen"},
        {"state": "other"},
        {"state": ""},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"code": None},
    ],
)
def test_an_answer_that_was_tampered_with_makes_no_session(served: Served, visitor: Visitor, change: dict[str, Any]):
    api, _ = served
    begun = visitor.get(f"{api.url}/auth/sign-in").headers["location"]
    back = httpx.URL(visitor.go(begun, "ada"))
    query = {name: value for name, value in ({**dict(back.params), **change}).items() if value is not None}
    assert visitor.get(back.copy_with(params=query)).headers["location"] == "/#sign-in=unauthenticated"
    assert "nightpress_session" not in visitor.cookies


def test_an_error_of_the_provider_is_not_shown(served: Served, visitor: Visitor):
    api, _ = served
    begun = httpx.URL(visitor.get(f"{api.url}/auth/sign-in").headers["location"])
    told = {
        "state": begun.params["state"],
        "error": "access_denied",
        "error_description": "<b>call 0900</b>",
        "iss": begun.host,
    }
    assert visitor.get(f"{api.url}/auth/callback", params=told).headers["location"] == "/#sign-in=unauthenticated"


@pytest.mark.parametrize(
    "place",
    ["https://evil.example", "//evil.example", "/\\evil.example", "#/x\r\nSet-Cookie: a=b", "javascript:alert(1)", ""],
)
def test_a_sign_in_leads_to_no_other_site(served: Served, visitor: Visitor, place: str):
    assert visitor.sign_in(place=place).headers["location"] == "/#/jobs"


def test_a_planted_session_is_not_taken_over_and_an_old_one_ends(served: Served, visitor: Visitor):
    api, _ = served
    visitor.cookies.set("nightpress_session", "planted")
    visitor.sign_in()
    visitor.cookies.clear()
    visitor.sign_in()
    old = visitor.cookies["nightpress_session"]
    assert len(old) == 43
    visitor.sign_in()
    assert visitor.cookies["nightpress_session"] != old
    for cookie in ("planted", old):
        headers = {"Cookie": f"nightpress_session={cookie}"}
        api.services.resources.sessions._known.clear()
        assert httpx.get(f"{api.url}/v1/me", headers=headers, trust_env=False).status_code == 401


def test_a_dump_of_the_database_holds_no_cookie_and_no_token(served: Served, visitor: Visitor):
    api, _ = served
    visitor.sign_in()
    with transaction(api.services.resources.engine, read_only=True) as connection:
        dump = "".join(map(str, connection.execute(text("SELECT * FROM sessions")).all()))
    assert visitor.cookies["nightpress_session"] not in dump
    assert visitor.csrf()["X-CSRF-Token"] not in dump
    sign_in = api.services.resources.sign_in
    assert sign_in is not None
    opened = [sign_in._refresh.open(part) for part in dump.split("'") if part.count(".") == 4]
    tokens = [content["token"] for content in opened if content is not None]
    assert tokens
    assert not any(token in dump for token in tokens)


# S33: forged requests ------------------------------------------------------------------------------------------------


def test_another_site_changes_nothing_with_somebodys_session(served: Served, visitor: Visitor):
    api, _ = served
    visitor.sign_in()
    body = {"name": "forged", "scopes": ["jobs:read"]}
    with Visitor(api.url) as other:
        other.sign_in()
        wrong = [{}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "é"}, other.csrf()]
    for headers in wrong:
        encoded = {name: value.encode("utf-8") for name, value in headers.items()}
        assert visitor.post(f"{api.url}/v1/keys", json=body, headers=encoded).status_code == 403
        assert visitor.delete(f"{api.url}/v1/keys/x", headers=encoded).status_code == 403
        assert visitor.post(f"{api.url}/auth/sign-out", headers=encoded).status_code == 403
    assert "forged" not in {key["name"] for key in visitor.get(f"{api.url}/v1/keys").json()["items"]}
    assert visitor.post(f"{api.url}/v1/keys", json=body, headers=visitor.csrf()).status_code == 201


def test_cookies_are_for_the_page_alone(served: Served, visitor: Visitor):
    api, _ = served
    lines = visitor.sign_in().headers.get_list("set-cookie")
    (session,) = [line for line in lines if line.startswith("nightpress_session=")]
    (csrf,) = [line for line in lines if line.startswith("nightpress_csrf=")]
    assert {"Path=/", "SameSite=Strict", "HttpOnly"} <= set(session.split("; "))
    assert "SameSite=Strict" in csrf
    begun = visitor.get(f"{api.url}/auth/sign-in").headers["set-cookie"].split("; ")
    assert {"SameSite=Lax", "HttpOnly", "Max-Age=600"} <= set(begun)


def test_over_https_cookies_are_secure_and_of_this_host():
    settings = Settings(_env_file=None, public_url="https://nightpress.example.com")
    response = Response()
    browser.keep(response, settings, "x")
    browser.keep_sign_in(response, settings, "x", 600)
    lines = response.headers.getlist("set-cookie")
    assert len(lines) == 4
    assert all(line.startswith("__Host-") and "Secure" in line and "Path=/" in line for line in lines)


# S34: settings that would open the door ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"oidc_issuer": "http://login.example.com"},
        {"public_url": "http://nightpress.example.com"},
        {"public_url": "https://example.com/nightpress"},
        {"oidc_groups": {}},
        {"oidc_groups_claim": "email"},
        {"oidc_algorithms": ["HS256"]},
        {"oidc_algorithms": ["none"]},
        {"oidc_groups": {"x": {"tenant": "../x", "scopes": ["jobs:read"]}}},
    ],
)
def test_settings_that_would_open_the_door_are_refused(wrong: dict[str, Any]):
    right: dict[str, Any] = {
        "oidc_issuer": "https://login.example.com",
        "public_url": "https://nightpress.example.com",
        "oidc_client_id": "x",
        "oidc_groups": {"x": {"tenant": "x", "scopes": ["jobs:read"]}},
    }
    Settings(_env_file=None, **right)
    with pytest.raises(ValueError, match=r"."):
        Settings(_env_file=None, **(right | wrong))

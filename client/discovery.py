"""Which server and which key: the caller's arguments, then the environment, the stored servers, and the embedded stack's folder."""

import os
from dataclasses import dataclass

import httpx

from nightpress.client.errors import ClientError
from nightpress.client.servers import Servers, read_servers, servers_file
from nightpress.client.sign_ins import SignInTokens, read_sign_in, sign_ins_file
from nightpress.client.transport import Options
from nightpress.core.settings import Settings, load_settings
from nightpress.core.stack_state import STATE_FILE, StackState

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Setting:
    """A value and where it was found, which `nightpress doctor` prints."""

    value: str | None
    source: str


@dataclass(frozen=True)
class Endpoint:
    """A server and its key. They are looked up together, so that no server is sent another server's key."""

    url: str
    source: str
    key: Setting
    sign_in: SignInTokens | None = None  #: where there is no key


def find_server(
    settings: Settings, api_url: str | None = None, api_key: str | None = None, profile: str | None = None
) -> Endpoint:
    """Find the server and its key. Raises ClientError for an unknown profile, or for both an address and a profile."""
    if api_url and profile:
        raise ClientError("Both an address and a profile were given.", hint="Give --api or --profile, not both.")
    servers, environment = read_servers(), os.environ
    if not api_url and (named := profile or environment.get("NIGHTPRESS_PROFILE")):
        return _named(servers, named, api_key)
    if address := api_url or environment.get("NIGHTPRESS_API_URL"):
        url, source = clean_url(address), "--api" if api_url else "NIGHTPRESS_API_URL"
    elif servers.default:
        return _named(servers, servers.default, api_key)
    elif left := StackState.load(settings.data_dir).api_url:
        url, source = clean_url(left), str(settings.data_dir / STATE_FILE)
    else:
        url, source = f"http://{settings.api_host}:{settings.api_port}", "the default"
    given = _given_key(api_key)
    if given is None and (signed_in := _sign_in(url, source)) is not None:
        return signed_in
    return Endpoint(url, source, given or _key_of_this_machine(settings, url))


def _named(servers: Servers, name: str, api_key: str | None) -> Endpoint:
    server, source = servers.get(name), f"{servers_file()}, {name}"
    if not api_key and not server.api_key and (signed_in := _sign_in(server.api_url, source)) is not None:
        return signed_in
    return Endpoint(server.api_url, source, Setting(api_key or server.api_key, "given" if api_key else source))


def _sign_in(url: str, source: str) -> Endpoint | None:
    """The server with the sign-in that `nightpress login` has stored for it."""
    found = read_sign_in(url)
    if found is None:
        return None
    return Endpoint(url, source, Setting(None, f"signed in, {sign_ins_file()}"), SignInTokens(url, found))


def _given_key(given: str | None) -> Setting | None:
    if given:
        return Setting(given.strip(), "given")
    if key := os.environ.get("NIGHTPRESS_API_KEY"):
        return Setting(key.strip(), "NIGHTPRESS_API_KEY")
    return None


def _key_of_this_machine(settings: Settings, url: str) -> Setting:
    if httpx.URL(url).host not in {*_LOOPBACK, settings.api_host}:
        return Setting(None, f"no NIGHTPRESS_API_KEY, and {settings.key_file} is only for this machine's own service")
    try:
        key = settings.key_file.read_text().strip()
    except FileNotFoundError:
        return Setting(None, f"no NIGHTPRESS_API_KEY and no {settings.key_file}")
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(
            f"The key file {settings.key_file} cannot be read: {getattr(error, 'strerror', 'it is not text')}.",
            hint="Set NIGHTPRESS_API_KEY, or run as the person who started the stack.",
        ) from error
    if not key:
        return Setting(None, f"{settings.key_file} is empty; the next `nightpress up` writes a key into it")
    return Setting(key, str(settings.key_file))


def clean_url(url: str) -> str:
    """The address without a slash at its end, and with `http://` where it names no scheme."""
    url = url.strip().rstrip("/")
    return url if "://" in url else f"http://{url}"


def options_from(
    api_url: str | None, api_key: str | None, profile: str | None, *, timeout_s: float, retries: int
) -> Options:
    """The options of a client. What the caller does not give is found as in `find_server`, and raises as it does."""
    place = find_server(load_settings(), api_url, api_key, profile)
    return Options(place.url, place.key.value, place.sign_in, timeout_s=timeout_s, retries=retries)

"""Finding the server and the key: what was said, then the environment, then what the embedded stack left in its folder."""

import json
import os
from dataclasses import dataclass

from client.errors import ClientError
from client.transport import Options
from core.settings import Settings, load_settings

DEVSTACK_FILE = "devstack.json"


@dataclass(frozen=True)
class Found:
    """A value and where it came from, for `nightpress doctor`."""

    value: str | None
    source: str


def find_api_url(settings: Settings, given: str | None = None) -> Found:
    if given:
        return Found(_clean_url(given), "--api")
    if url := os.environ.get("NIGHTPRESS_API_URL"):
        return Found(_clean_url(url), "NIGHTPRESS_API_URL")
    if left := read_devstack(settings).get("api_url"):
        return Found(_clean_url(str(left)), str(settings.data_dir / DEVSTACK_FILE))
    return Found(f"http://{settings.api_host}:{settings.api_port}", "the default")


def find_api_key(settings: Settings, given: str | None = None) -> Found:
    if given:
        return Found(given.strip(), "given")
    if key := os.environ.get("NIGHTPRESS_API_KEY"):
        return Found(key.strip(), "NIGHTPRESS_API_KEY")
    try:
        return Found(settings.key_file.read_text().strip(), str(settings.key_file))
    except FileNotFoundError:
        return Found(None, f"no NIGHTPRESS_API_KEY and no {settings.key_file}")
    except OSError as error:
        raise ClientError(
            f"The key file {settings.key_file} cannot be read: {error.strerror}.",
            hint="Set NIGHTPRESS_API_KEY, or run as the person who started the stack.",
        ) from error


def read_devstack(settings: Settings) -> dict[str, object]:
    """What a running embedded stack says of itself; empty where there is none."""
    try:
        raw = json.loads((settings.data_dir / DEVSTACK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _clean_url(url: str) -> str:
    url = url.strip().rstrip("/")
    return url if "://" in url else f"http://{url}"


def options_from(api_url: str | None, api_key: str | None, timeout_s: float, retries: int) -> Options:
    """Fill what the caller left open from the environment and the embedded stack's folder."""
    settings = load_settings()
    url = find_api_url(settings, api_url).value
    return Options(str(url), find_api_key(settings, api_key).value, timeout_s=timeout_s, retries=retries)

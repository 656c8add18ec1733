"""Several servers under names, with their keys: a small TOML file that only its owner can read."""

import json
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from nightpress.client.errors import ClientError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Server:
    api_url: str
    api_key: str | None = None


@dataclass
class Servers:
    """What the file says. `default`: the one that is meant where none is named."""

    known: dict[str, Server] = field(default_factory=dict)
    default: str | None = None

    def get(self, name: str) -> Server:
        """Raises ClientError for a name that isn't there."""
        if name not in self.known:
            there = ", ".join(sorted(self.known)) or "none"
            raise ClientError(
                f"There is no server called {name!r} in {servers_file()}.",
                hint=f"Known: {there}. `nightpress servers add {name} URL` adds it.",
            )
        return self.known[name]


def servers_file() -> Path:
    """In the user's configuration folder, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "nightpress" / "config.toml"


def read_servers() -> Servers:
    """Raises ClientError for a file that isn't what `save_servers` writes."""
    path = servers_file()
    try:
        raw = tomllib.loads(path.read_text())
        known = {name: Server(str(one["api_url"]), one.get("api_key")) for name, one in raw.get("servers", {}).items()}
    except FileNotFoundError:
        return Servers()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ClientError(
            f"{path} can't be read: {error}.", hint="Mend it, or move it away and add the servers again."
        ) from error
    return Servers(known, raw.get("default"))


def save_servers(servers: Servers) -> Path:
    """Write the file whole or not at all, readable by its owner alone: it holds keys."""
    lines = [f"default = {json.dumps(servers.default)}\n"] if servers.default else []
    for name, one in sorted(servers.known.items()):
        # A JSON string of printable ASCII is a TOML basic string.
        lines.append(f"\n[servers.{name}]\napi_url = {json.dumps(one.api_url)}\n")
        if one.api_key:
            lines.append(f"api_key = {json.dumps(one.api_key)}\n")
    path = servers_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp makes it 0600
    with os.fdopen(descriptor, "w") as stream:
        stream.write("".join(lines))
    Path(temporary).replace(path)
    return path


def check_name(name: str) -> str:
    """Raises ClientError for what can't be a name in the file."""
    if not _NAME.fullmatch(name):
        raise ClientError(f"{name!r} is no name for a server.", hint="Letters, digits, - and _; at most 63.")
    return name

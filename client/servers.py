"""The file of named servers with their keys: TOML, readable by its owner only."""

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
class KnownServer:
    api_url: str
    api_key: str | None = None


@dataclass
class Servers:
    """The content of the file. `default`: the server to use where none is named."""

    known: dict[str, KnownServer] = field(default_factory=dict)
    default: str | None = None

    def get(self, name: str) -> KnownServer:
        """The server of this name. Raises ClientError where there is none."""
        if name not in self.known:
            there = ", ".join(sorted(self.known)) or "none"
            raise ClientError(
                f"There is no server called {name!r} in {servers_file()}.",
                hint=f"Known: {there}. `nightpress servers add {name} URL` adds it.",
            )
        return self.known[name]


def servers_file() -> Path:
    """The file's path, by the XDG base directory specification: ~/.config/nightpress/config.toml by default."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "nightpress" / "config.toml"


def read_servers() -> Servers:
    """The servers of the file; none where there is no file. Raises ClientError for a file that can't be read."""
    path = servers_file()
    try:
        raw = tomllib.loads(path.read_text())
        known = {
            name: KnownServer(str(entry["api_url"]), entry.get("api_key"))
            for name, entry in raw.get("servers", {}).items()
        }
    except FileNotFoundError:
        return Servers()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ClientError(
            f"{path} can't be read: {error}.", hint="Correct it, or move it away and add the servers again."
        ) from error
    return Servers(known, raw.get("default"))


def save_servers(servers: Servers) -> Path:
    """Write the file atomically, readable by its owner only because it holds keys. Returns its path."""
    lines = [f"default = {json.dumps(servers.default)}\n"] if servers.default else []
    for name, server in sorted(servers.known.items()):
        # A JSON string of printable ASCII is a TOML basic string.
        lines.append(f"\n[servers.{name}]\napi_url = {json.dumps(server.api_url)}\n")
        if server.api_key:
            lines.append(f"api_key = {json.dumps(server.api_key)}\n")
    path = servers_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp makes it 0600
    with os.fdopen(descriptor, "w") as stream:
        stream.write("".join(lines))
    Path(temporary).replace(path)
    return path


def check_name(name: str) -> str:
    """Return the name. Raises ClientError where it can't be a server's name."""
    if not _NAME.fullmatch(name):
        raise ClientError(
            f"{name!r} is not a valid name for a server.", hint="Use letters, digits, - and _; at most 63 characters."
        )
    return name

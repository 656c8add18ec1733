"""The installed version, as the API, the worker and the client report it."""

import hashlib
import importlib.metadata
from collections.abc import Iterable

VERSION = importlib.metadata.version("nightpress")

#: Besides model, recipe, data and device, this decides the bytes of an artifact. The number after the slash is raised whenever the bytes
#: that come out change within a version.
ENGINE = f"{VERSION}/3"


def engine_with(engine: str, packages: Iterable[object]) -> str:
    """The engine plus a digest of the packages (name and version) whose passes a job uses; `engine` unchanged if there are none."""
    named = "\n".join(sorted({str(package) for package in packages}))
    return f"{engine}+{hashlib.sha256(named.encode()).hexdigest()[:12]}" if named else engine

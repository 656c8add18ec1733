"""The installed version: what the API, the worker and the client say of themselves."""

import hashlib
import importlib.metadata
from collections.abc import Iterable

VERSION = importlib.metadata.version("nightpress")

#: What decides, beside model, recipe, data and device, which bytes come out. The revision is raised whenever that changes within a version.
ENGINE = f"{VERSION}/2"


def engine_with(engine: str, packages: Iterable[object]) -> str:
    """The engine, together with the packages whose passes a job uses, each as its name and version. Without any, the engine as it is."""
    named = "\n".join(sorted({str(package) for package in packages}))
    return f"{engine}+{hashlib.sha256(named.encode()).hexdigest()[:12]}" if named else engine

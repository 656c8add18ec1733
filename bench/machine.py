"""The line above a table that says where its figures were taken."""

from typing import Any


def machine_of(environment: dict[str, Any]) -> str:
    """E.g. `AMD EPYC (avx2), 2 threads`, from a report's environment."""
    features = ", ".join(environment["cpu_features"])
    return f"{environment['cpu']}{f' ({features})' if features else ''}, {environment['threads']} threads"

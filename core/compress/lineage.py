"""Reads a model's licence and origin from its model card. They are copied into the card of the pressed model."""

from pathlib import Path
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.yamlfile import read_yaml

_CARD = "README.md"
_LICENSES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md")
_READ = 256 * 1024

#: (words at the beginning of a licence's text, the Hub's name for the licence)
_OPENINGS = (
    ("apache license version 2.0", "apache-2.0"),
    ("mit license", "mit"),
    ("bsd 3-clause", "bsd-3-clause"),
    ("bsd 2-clause", "bsd-2-clause"),
    ("gnu general public license version 3", "gpl-3.0"),
    ("creative commons attribution 4.0", "cc-by-4.0"),
)
_CARRIED = ("license", "license_name", "license_link", "base_model", "datasets", "language")


def read_lineage(folder: Path) -> dict[str, Any]:
    """Read license, license_name, license_link, base_model, datasets and language, as far as the card or the licence file states them.

    The files are untrusted. A value that can't be read, or that is neither text nor a list of texts, is left out.
    """
    said = {key: value for key in _CARRIED if (value := _plain(_front(folder / _CARD).get(key))) is not None}
    if "license" not in said and (found := _license_of(folder)):
        said["license"] = found
    return said


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_READ).decode(errors="replace")
    except OSError:
        return ""


def _front(card: Path) -> dict[str, Any]:
    """The YAML front matter of a model card: the part between its first two lines of dashes."""
    text = _read(card).replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    body, end, _ = text[4:].partition("\n---")
    if not end:
        return {}
    try:
        found = read_yaml(body, max_characters=_READ, max_nodes=_READ)
    except NightpressError:
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: object) -> str | list[str] | None:
    if isinstance(value, str) and value.strip():
        return value.strip()[:500]
    if isinstance(value, list):
        return [text.strip()[:500] for text in value[:50] if isinstance(text, str) and text.strip()] or None
    return None


def _license_of(folder: Path) -> str | None:
    for name in _LICENSES:
        opening = " ".join(_read(folder / name)[:600].lower().replace(",", " ").split())
        for words, known in _OPENINGS:
            if words in opening:
                return known
        if opening:
            return "other"
    return None

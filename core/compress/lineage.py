"""What a model's own card says of where it comes from, to be carried over to what is made of it."""

from pathlib import Path
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.yamlfile import read_yaml

_CARD = "README.md"
_LICENSES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md")
_READ = 256 * 1024

#: how a licence's text begins → the Hub's name for it
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
    """license, license_name, license_link, base_model, datasets and language, as far as the card or the licence's file says them.

    The files are a stranger's: what can't be read, or isn't text or a list of texts, counts as not said.
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
    """The YAML between the card's first two lines of dashes."""
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

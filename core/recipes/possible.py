"""Which passes and exports a model can have, and why not the others, from its header alone."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.checks import check_pass
from nightpress.core.recipes.classes import why_not_measured
from nightpress.core.recipes.exports import TYPES, Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import PassOptions, catalog

#: Tried in turn for a pass: its defaults, then what suits narrow layers. A pass is possible if it is with any of them.
_TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"group_size": None},
    {"group_size": None, "symmetric": True},
    {"pattern": "unstructured"},
)


class Possibility(BaseModel):
    """A pass or an export, and whether a model can have it."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    kind: Literal["pass", "export"]
    name: str
    why_not: str | None  #: the reason of whatever can't carry or compute the model; None: it is possible


def possibilities(header: ModelHeader) -> tuple[Possibility, ...]:
    """Return all passes that can be tried without options of their own, then all exports.

    A reason is found in the header, and in what is known of the class. Of a class that nobody has tried, the worker may find others.
    """
    never = why_not_measured(header.architecture, header.model_type)
    if never is None and not header.has_tokenizer and not header.sees_images:
        never = "it has no tokenizer, so nothing can be measured on text", ""
    found = []
    for options in catalog.pass_types():
        name = str(options.model_fields["pass_"].default)
        forms = list(_forms(options))
        if forms:
            found.append(Possibility(kind="pass", name=name, why_not=never[0] if never else _why_not(forms, header)))
    for format_ in ("safetensors", *TYPES):
        export = Export.model_validate({"format": format_})
        found.append(Possibility(kind="export", name=format_, why_not=never[0] if never else _refusal(export, header)))
    return tuple(found)


def _forms(options: type[PassOptions]) -> Iterator[PassOptions]:
    """Yield the pass with each of the options that it knows."""
    for extra in _TRIED:
        if extra.keys() <= options.model_fields.keys():
            try:
                yield options.model_validate(extra)
            except ValidationError:  # the pass needs options that only its user can name
                continue


def _why_not(forms: list[PassOptions], header: ModelHeader) -> str | None:
    refused: str | None = None
    for form in forms:
        if (why := _refusal(form, header)) is None:
            return None
        refused = refused or why
    return refused


def _refusal(asked: PassOptions | Export, header: ModelHeader) -> str | None:
    try:
        asked.check(header) if isinstance(asked, Export) else check_pass(asked, header)
    except NightpressError as error:
        return error.message
    return None

"""A pass as a recipe names it: `{pass: gptq, bits: 4}`."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions

#: Context of pydantic with which a recipe is read that another process has checked: passes unknown here are read as `ForeignPass`.
CHECKED_ELSEWHERE = {"passes": "checked elsewhere"}


class ForeignPass(PassOptions):
    """A pass of a package that this process doesn't have, as a client may meet it in a service's answer. It is shown, never run."""

    model_config = ConfigDict(extra="allow")

    exports = frozenset[ExportFormat]()

    pass_: str = Field(alias="pass")

    @property
    def name(self) -> str:
        return self.pass_


class _ByName:
    """Reads a pass by the types that are known when it is read: a package may be allowed after a model with a recipe was built."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(_read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(catalog.adapter().core_schema)


def _read(raw: Any, info: ValidationInfo) -> PassOptions:
    name = raw.get("pass") if isinstance(raw, dict) else None
    if info.context == CHECKED_ELSEWHERE and isinstance(name, str) and catalog.pass_type(name) is None:
        return ForeignPass.model_validate(raw)
    return catalog.adapter().validate_python(raw)


Pass = Annotated[PassOptions, _ByName()]

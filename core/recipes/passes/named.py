"""The pydantic type of a pass in a recipe, e.g. `{pass: gptq, bits: 4}`."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions

#: Pydantic context for a recipe that another process has already checked: passes that are unknown here become `ForeignPass`.
CHECKED_ELSEWHERE = {"passes": "checked elsewhere"}


class ForeignPass(PassOptions):
    """A pass of a package that this process doesn't have. A client can receive it from a service. It is shown, and never run."""

    model_config = ConfigDict(extra="allow")

    exports = frozenset[ExportFormat]()

    pass_: str = Field(alias="pass")

    @property
    def name(self) -> str:
        return self.pass_


class _ByName:
    """Validates a pass against the types known at that moment: a package may be allowed after pydantic has built the schema."""

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

"""Packages with passes, as pip installs them into a folder on Python's path, for tests in this process."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

#: The source of the options class of a pass that copies the model.
OPTIONS = """
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, stream_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions


class Copy(PassOptions):
    \"\"\"Copy the model as it is.

    With a second paragraph.
    \"\"\"

    implementation: ClassVar[str] = "copying.function"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors"})

    pass_: Literal["copy"] = Field("copy", alias="pass")
    times: int = Field(1, ge=1)

    def describe(self) -> str:
        return "as it is"

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header)
"""
FUNCTION = """
import shutil
from pathlib import Path

from copying.options import Copy
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.handoff.report import PassRecord


@folder_pass(Copy)
def copy(source: Path, target: Path, options: Copy, context: PassContext) -> PassRecord:
    shutil.copytree(source, target)
    return PassRecord(index=context.index, name=options.name, seconds=0.0, summary={})
"""
RECIPE = {"name": "copied", "passes": [{"pass": "copy"}], "exports": ["safetensors"]}


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    package: str = "nightpress-copy",
    version: str = "1.0",
    offers: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
) -> None:
    """Put a package on Python's path.

    `offers`: pass → `module:class` of its options. `modules`: file name → source, in the package `copying`.
    """
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in (offers or {"copy": "copying.options:Copy"}).items()]
    (info / "entry_points.txt").write_text("\n".join(["[nightpress.passes]", *lines, ""]))
    for name, text in ({"options.py": OPTIONS, "function.py": FUNCTION} if modules is None else modules).items():
        (folder / "copying").mkdir(exist_ok=True)
        (folder / "copying" / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def forget() -> None:
    """Remove the modules of these packages from sys.modules, so that the next test imports its own."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "copying"]:
        del sys.modules[name]

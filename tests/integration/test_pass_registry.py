"""Which function runs for which options, and the error for a package whose function can't run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.compress.passes import registry
from nightpress.core.compress.passes.calibrated import gptq
from nightpress.core.compress.stages.job import naming_the_package
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import DynamicInt8, Gptq, PassOptions, Profiling, StaticInt8, catalog
from tests.packages import FUNCTION, OPTIONS, RECIPE, forget, install


@pytest.fixture(autouse=True)
def _nothing_allowed_afterwards() -> Iterator[None]:
    yield
    catalog.allow(())
    registry.MODEL_PASSES.pop("copy", None)
    forget()


def test_every_pass_has_a_function_for_its_stage() -> None:
    tables = {
        "folder": set(registry.MODEL_PASSES),
        "graph": set(registry.GRAPH_PASSES),
        "measure": set(registry.MEASURE_PASSES),
        "runtime": {name for name, _ in registry.RUNTIME_PASSES},
    }
    for stage, names in tables.items():
        assert names == {
            pass_type.model_fields["pass_"].default for pass_type in catalog.pass_types() if pass_type.stage == stage
        }
    assert registry.model_pass(Gptq()) is gptq
    assert {options.stage for options in (StaticInt8, DynamicInt8, Profiling)} == {"graph", "runtime", "measure"}


def test_a_function_is_registered_once_and_for_the_stage_of_its_options() -> None:
    with pytest.raises(TypeError, match="StaticInt8 is of the stage graph, and gptq is for the stage folder"):
        registry.folder_pass(StaticInt8)(gptq)
    with pytest.raises(TypeError, match=r"calibrated\.gptq does what Gptq says already"):
        registry.folder_pass(Gptq)(gptq)


def _copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> PassOptions:
    install(tmp_path, monkeypatch, modules={"options.py": OPTIONS, "function.py": function})
    assert catalog.allow(["nightpress-copy"]) == ()
    [options] = parse_recipe(RECIPE).passes
    return options


def test_a_package_s_function_is_imported_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _copy(tmp_path, monkeypatch, FUNCTION)
    assert "copy" not in registry.MODEL_PASSES
    assert registry.model_pass(options).__module__ == "copying.function"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raise RuntimeError('no luck')", "copying.function: RuntimeError: no luck"),
        ("import not_installed_here", "No module named 'not_installed_here'"),
        ("'''It registers nothing.'''", "has no function: copying.function registers none for its stage, folder"),
        (FUNCTION.replace("folder_pass", "graph_pass"), "Copy is of the stage folder, and copy is for the stage graph"),
    ],
)
def test_a_function_that_can_t_be_used_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, said: str
) -> None:
    options = _copy(tmp_path, monkeypatch, function)
    with pytest.raises(NightpressError) as error:
        registry.model_pass(options)
    assert error.value.code is ErrorCode.INTERNAL
    assert "The pass `copy` of the package nightpress-copy 1.0 " in error.value.message
    assert said in error.value.message


def test_an_error_of_a_package_s_function_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _copy(tmp_path, monkeypatch, FUNCTION)
    with (
        pytest.raises(NightpressError, match=r"`copy` of the package nightpress-copy 1\.0 failed: KeyError: 'x'"),
        naming_the_package(options),
    ):
        raise KeyError("x")
    for own in (MemoryError("full"), OSError(28, "full"), NightpressError(ErrorCode.NUMERICAL_FAILURE, "NaN")):
        with pytest.raises(type(own)) as error, naming_the_package(options):
            raise own
        assert error.value is own, "what has a code of its own keeps it"
    with pytest.raises(KeyError), naming_the_package(Gptq()):
        raise KeyError("a built-in pass's error is its own")

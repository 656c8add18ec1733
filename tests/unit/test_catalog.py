"""Passes of other packages: which are imported, which are refused, and the error for those that can't be used."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.checkpoints import prefix_digests
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.passes.catalog import Provider
from nightpress.core.recipes.passes.named import CHECKED_ELSEWHERE
from nightpress.core.version import ENGINE, engine_with
from tests.packages import OPTIONS, RECIPE, forget, install


@pytest.fixture(autouse=True)
def _nothing_allowed_afterwards() -> Iterator[None]:
    yield
    catalog.allow(())
    forget()


def _refused(recipe: object = RECIPE) -> NightpressError:
    with pytest.raises(NightpressError) as refused:
        parse_recipe(recipe)
    assert refused.value.code is ErrorCode.INVALID_RECIPE
    return refused.value


def test_a_package_that_is_not_allowed_is_never_imported_and_the_hint_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    assert catalog.allow(()) == ()
    error = _refused()
    assert "nightpress-copy 1.0" in error.message
    assert error.hint is not None
    assert "NIGHTPRESS_PASSES='[\"nightpress-copy\"]'" in error.hint
    assert not [name for name in sys.modules if name.startswith("copying")]


def test_a_pass_that_no_package_has_is_told_with_those_that_there_are() -> None:
    error = _refused({**RECIPE, "passes": [{"pass": "kopy"}]})
    assert "there is no pass 'kopy'; there are 'awq', " in error.message
    assert "NIGHTPRESS_PASSES" not in str(error.hint)


@pytest.mark.parametrize("allowed", ["nightpress-copy", "Nightpress_Copy", "copy"])
def test_an_allowed_pass_is_read_by_the_package_s_name_or_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    install(tmp_path, monkeypatch)
    assert catalog.allow([allowed]) == ()
    recipe = parse_recipe({**RECIPE, "passes": [{"pass": "magnitude"}, {"pass": "copy", "times": 2}]})
    assert [options.name for options in recipe.passes] == ["magnitude", "copy"]
    assert recipe.model_dump(mode="json")["passes"][1] == {"pass": "copy", "times": 2}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert catalog.providers_of(["magnitude", "copy"]) == {"copy": Provider(package="nightpress-copy", version="1.0")}
    assert "copying.function" not in sys.modules, "what needs torch is imported where a job runs"
    assert _refused({**RECIPE, "passes": [{"pass": "copy", "times": 0}]}).details["faults"][0]["at"] == (
        "passes.0.copy.times"
    )
    assert "copy" in json.dumps(Recipe.model_json_schema(by_alias=True)["properties"]["passes"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("from typing", "raise RuntimeError('no luck')\nfrom typing"), "RuntimeError: no luck"),
        (("from typing", "raise SystemExit(3)\nfrom typing"), "SystemExit: 3"),
        (("from typing", "from nowhere import typing\nfrom typing"), "No module named 'nowhere'"),
        (("class Copy(PassOptions)", "class Another(PassOptions)"), "has no attribute 'Copy'"),
        (("class Copy(PassOptions)", "class Copy"), "is no subclass of PassOptions"),
        (('Literal["copy"] = Field("copy"', 'Literal["cp"] = Field("cp"'), "as its entry point is called"),
        (('pass_: Literal["copy"]', "pass_: str"), "PydanticUserError"),
        (("    implementation", "    implemented"), "doesn't say implementation"),
        (("    exports", "    exported"), "doesn't say exports"),
        (("    def describe", "    def describes"), "doesn't say describe"),
        (("    def cost", "    def costs"), "doesn't say cost"),
        (("times: int", "times: 'Nothing'"), "Nothing"),
    ],
)
def test_a_broken_package_is_told_in_a_sentence_and_everything_else_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], said: str
) -> None:
    assert OPTIONS.count(change[0]) == 1
    install(tmp_path, monkeypatch, modules={"options.py": OPTIONS.replace(*change)})
    [fault] = catalog.allow(["nightpress-copy"])
    assert fault.startswith("The pass `copy` of the package nightpress-copy 1.0 can't be used: ")
    assert said in fault
    assert _refused().message.count(fault.removesuffix(".")) == 1
    assert parse_recipe({**RECIPE, "passes": [{"pass": "magnitude"}]}).passes[0].name == "magnitude"


def test_a_built_in_pass_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, offers={"gptq": "copying.options:Copy", "copy": "copying.options:Copy"})
    [fault] = catalog.allow(["nightpress-copy"])
    assert "`gptq`" in fault
    assert "a built-in pass has that name" in fault
    recipe = {**RECIPE, "passes": [{"pass": "gptq"}], "exports": ["compressed-tensors"]}
    assert type(parse_recipe(recipe).passes[0]).__module__ == "nightpress.core.recipes.passes.gptq"
    assert catalog.provider_of("gptq") is None
    assert parse_recipe(RECIPE).passes[0].name == "copy", "the package's other pass is there"


def test_of_two_packages_with_a_pass_of_one_name_the_operator_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "a", monkeypatch)
    install(tmp_path / "b", monkeypatch, package="other-copy", version="2.0", modules={})
    [fault] = catalog.allow(["copy"])
    assert "nightpress-copy 1.0 and other-copy 2.0 both have a pass `copy`" in fault
    assert fault.removesuffix(".") in _refused().message
    assert catalog.allow(["other-copy"]) == ()
    assert str(catalog.provider_of("copy")) == "other-copy 2.0"


def test_what_is_allowed_and_not_installed_is_told() -> None:
    [fault] = catalog.allow(["nightpress-nothing"])
    assert "NIGHTPRESS_PASSES allows nightpress-nothing, and no package" in fault


def test_another_version_of_the_package_is_another_engine_and_other_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decided() -> tuple[str, list[str]]:
        assert catalog.allow(["nightpress-copy"]) == ()
        recipe = parse_recipe({**RECIPE, "passes": [{"pass": "magnitude"}, {"pass": "copy"}]})
        digests = prefix_digests(recipe, tenant_id="t", model_digest="sha256:0", data={}, device="cpu", engine=ENGINE)
        return engine_with(ENGINE, catalog.packages_of(recipe.model_dump(mode="json"))), digests

    install(tmp_path, monkeypatch)
    engine, digests = decided()
    assert decided() == (engine, digests)
    assert engine.startswith(f"{ENGINE}+")
    assert len(engine) <= 40, "jobs.engine holds no more"
    shutil.rmtree(tmp_path / "nightpress_copy-1.0.dist-info")
    install(tmp_path, monkeypatch, version="1.1")
    newer, others = decided()
    assert newer != engine
    assert others[0] == digests[0], "the pass before it is the same"
    assert set(others[1:]).isdisjoint(digests[1:])
    assert engine_with(ENGINE, catalog.packages_of({**RECIPE, "passes": [{"pass": "magnitude"}]})) == ENGINE


def _saved(folder: Path, version: str) -> Path:
    assert catalog.allow(["copy"]) == ()
    JobSpec(
        job_id="job_test",
        attempt=1,
        model_name="m",
        model_digest="sha256:0",
        recipe=parse_recipe(RECIPE),
        packages={"copy": Provider(package="nightpress-copy", version=version)},
    ).save(folder)
    assert catalog.allow(()) == ()
    return folder


def test_a_spec_names_the_packages_that_its_child_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "packages", monkeypatch)
    folder = _saved(tmp_path, "1.0")
    assert JobSpec.load(folder).recipe.passes[0].name == "copy"
    assert str(catalog.provider_of("copy")) == "nightpress-copy 1.0"


def test_a_child_refuses_another_version_than_its_worker_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "packages", monkeypatch)
    folder = _saved(tmp_path, "0.9")
    with pytest.raises(NightpressError, match=r"nightpress-copy 0\.9, and where the job runs version 1\.0") as refused:
        JobSpec.load(folder)
    assert refused.value.hint == "Restart the worker after each change of its packages."


def test_a_client_shows_a_pass_that_it_does_not_have() -> None:
    recipe = Recipe.model_validate({**RECIPE, "passes": [{"pass": "copy", "times": 3}]}, context=CHECKED_ELSEWHERE)
    assert recipe.passes[0].name == "copy"
    assert recipe.model_dump(mode="json")["passes"] == [{"pass": "copy", "times": 3}]
    with pytest.raises(ValueError, match="passes"):
        Recipe.model_validate({**RECIPE, "passes": [{"pass": "gptq", "bits": 99}]}, context=CHECKED_ELSEWHERE)

"""The table of schemes and consumers: its files know every scheme, and what they say is what comes out here."""

import json
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest

from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Quantizing
from tests.consumers.places import RESULTS, file_of, place_of
from tests.consumers.schemes import SCHEMES
from tests.consumers.tries import State, try_scheme

FILES = sorted(RESULTS.glob("*.json"))


def _columns() -> dict[str, str]:
    columns: dict[str, str] = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "reference.py"))["COLUMNS"]
    return columns


def test_every_file_is_a_column_of_the_page() -> None:
    assert FILES
    assert {file.stem for file in FILES} <= set(_columns())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_knows_every_scheme_that_we_write_and_says_why_not(file: Path) -> None:
    found: dict[str, Any] = json.loads(file.read_bytes())
    assert found["outcomes"].keys() == SCHEMES.keys()
    assert found["date"]
    assert found["versions"]
    for state, why in found["outcomes"].values():
        assert state in {"", *get_args(State)}
        assert bool(why) == (state not in {"", "works"})


def test_the_schemes_are_those_of_the_formats_that_we_write() -> None:
    found = set()
    for passes in SCHEMES.values():
        last = parse_recipe({"name": "t", "passes": passes, "exports": ["safetensors"], "evaluate": []}).passes[-1]
        if isinstance(last, Quantizing):
            found.add(last.scheme("model.layers.0.mlp.up_proj").format)
    assert found == {
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
    }


@pytest.mark.parametrize("scheme", ["int4 weights, groups", "nvfp4 weights and inputs"])
@pytest.mark.slow
def test_transformers_does_here_what_the_file_says(scheme: str) -> None:
    file = RESULTS / file_of("transformers", place_of("cpu"))
    if not file.exists():
        pytest.skip(f"nobody has run `python -m tests.consumers transformers` on {place_of('cpu')}")
    expected, _ = json.loads(file.read_bytes())["outcomes"][scheme]
    assert try_scheme(scheme, "transformers", "cpu").state == expected

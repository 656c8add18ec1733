"""Untrusted YAML: values are read by the core schema of YAML 1.2, and refusing hostile input costs almost nothing."""

import contextlib
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.builtins import builtin_recipes
from nightpress.core.recipes.models import load_recipe
from nightpress.core.recipes.yamlfile import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, read_yaml


def _merge_bomb(depth: int) -> str:
    levels = (f"a{at}: &a{at} {{<<: [{', '.join([f'*a{at - 1}'] * 9)}]}}" for at in range(1, depth + 1))
    return "\n".join(["a0: &a0 {x: 1}", *levels])


def _laughs(tail: str) -> str:
    levels = (f"x{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 12))
    return "\n".join(["name: x", "x: &a0 [1,1,1,1,1,1,1,1,1]", *levels, tail])


HOSTILE = {
    "merge keys of depth 5": _merge_bomb(5),
    "merge keys of depth 40": _merge_bomb(40),
    "a merge key without an alias": "name: x\n<<: {a: 1}",
    "aliases in passes": _laughs("passes: *a11"),
    "aliases in gates": _laughs("gates: {size: *a11}"),
    "an alias of itself": "a: &a [*a]\nname: x",
    "gates of themselves": "name: x\ngates: &a {size: *a}\n",
    "lists without end": "[" * MAX_CHARACTERS,
    "mappings without end": ("{a: " * MAX_CHARACTERS)[:MAX_CHARACTERS],
    "blocks without end": "\n".join(" " * at + "a:" for at in range(300)),
    "dashes without end": "- " * (MAX_CHARACTERS // 2),
    "questions without end": "? " * (MAX_CHARACTERS // 2),
    "too many values": "[" + "1," * MAX_NODES + "1]",
    "too many keys": "{" + ",".join(f"a{at}: 1" for at in range(MAX_NODES // 2 + 1))[: MAX_CHARACTERS - 2] + "}",
    "too many characters": "x" * (MAX_CHARACTERS + 1),
    "a long number": "name: x\nseed: " + "9" * 5000,
    "a long hexadecimal number": "name: x\nseed: 0x" + "f" * 60_000,
    "sexagesimal": "seed: " + ":".join(["1"] * 20_000),
    "a surrogate": 'name: "\\ud800"',
    "a raw surrogate": "name: \ud800",
    "a character that there is not": 'name: "\\UFFFFFFFF"',
    "a key that is null": "? \n: 1\n",
    "a key that is a list": "? [a]\n: 1\n",
    "a key twice": "name: x\nname: y\n",
    "not a number": "name: x\nseed: .nan",
    "a number without end": "name: x\nseed: 1e999",
    "NUL": 'name: x\ndescription: "a\\0b"\ntarget: auto',
    "a date that there is not": "name: 2026-13-45\n",
    "two documents": "name: x\n---\nname: y\n",
    "bytes": "name: !!binary '!!!'",
    "a set": "!!set {a, b}",
    "an ordered mapping": "!!omap [a]",
    "a float by its tag": "seed: !!float 'abc'",
    "an integer by its tag": "seed: !!int ''",
    "a time by its tag": "seed: !!timestamp 'abc'",
    "an object of Python": "!!python/object/apply:os.system ['true']",
    "a tag of its own": "!<tag:yaml.org,2002:str> x",
    "a directive": "%YAML 9.9\n---\nname: x",
    "nothing": "",
    "a tab": "name: x\n\tseed: 1",
    "quotes without end": "name: '" + "x" * 60_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(name: str):
    began = time.thread_time()
    with pytest.raises(NightpressError) as caught:
        load_recipe(HOSTILE[name])
    assert time.thread_time() - began < 1.0
    tracemalloc.start()  # in a second run, since it takes most of the time
    try:
        with pytest.raises(NightpressError):
            load_recipe(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024**2
    finally:
        tracemalloc.stop()
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert caught.value.hint
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", {"a": 1}),
        ("a: -0x1F", {"a": "-0x1F"}),
        ("a: 0o17", {"a": 15}),
        ("a: 0x1f", {"a": 31}),
        ("a: 010", {"a": 10}),
        ("a: 1e-4", {"a": 1e-4}),
        ("a: .5", {"a": 0.5}),
        ("a: 5.", {"a": 5.0}),
        ("a: ~", {"a": None}),
        ("a:", {"a": None}),
        ("a: [true, False, yes, off]", {"a": [True, False, "yes", "off"]}),
        ("a: 2026-01-02", {"a": "2026-01-02"}),
        ("a: '1'", {"a": "1"}),
        ("1: x", {"1": "x"}),
        ("a: |\n  one\n  two\n", {"a": "one\ntwo\n"}),
        ("# nothing but a remark", None),
        ('{"json": [1, 2.5, null, "ä"]}', {"json": [1, 2.5, None, "ä"]}),
    ],
)
def test_scalars_mean_what_the_core_schema_says(text: str, value: Any):
    assert read_yaml(text) == value


def test_what_is_just_within_the_bounds_is_read():
    assert read_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert len(read_yaml("[" + "1," * (MAX_NODES - 2) + "1]")) == MAX_NODES - 1
    with pytest.raises(NightpressError, match="deeper"):
        read_yaml("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))


def test_the_built_in_recipes_are_read():
    assert len(builtin_recipes()) > 5


@given(st.text(alphabet=st.sampled_from("ab{}[]:,-?&*!|>'\"%@`#\n\t \\ux0129.~<e\ufeff\u2028\ud800é"), max_size=60))
@pytest.mark.slow
def test_any_text_is_read_or_refused(text: str):
    with contextlib.suppress(NightpressError):
        read_yaml(text)

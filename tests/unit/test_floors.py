"""The layers of the code: no import cycle between files, and none between packages. import-linter's contracts name the layers."""

from pathlib import Path

import pytest

from bench.structure import Repeat, Structure, arrows_up, circles, import_graph, package_arrows, repeats, structure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout() -> Structure:
    return structure(ROOT)


@pytest.mark.slow
def test_no_files_import_each_other_in_a_circle():
    files = import_graph(ROOT)
    assert "nightpress.core.compress.pipeline" in files
    assert "nightpress.core.compress.model.checkpoint" in files["nightpress.core.compress.executors.stream"]
    assert "bench.train_cpu" in files["bench.train"]
    assert circles(files) == []


@pytest.mark.slow
def test_no_package_imports_a_package_that_imports_it(checkout: Structure):
    assert checkout.arrows_up == {}


def test_fewer_than_a_hundred_pairs_of_places_repeat_each_other(checkout: Structure):
    longest = sorted(checkout.repeats, key=lambda repeat: -repeat.lines)[:10]
    assert checkout.repeated < 100, f"`python -m bench.structure` lists all. The longest: {longest}"


def test_an_import_within_a_function_closes_a_circle_as_any_other(tmp_path: Path):
    for name, text in {
        "nightpress/__init__.py": "",
        "nightpress/a/__init__.py": "from nightpress.a.low import x\n",
        "nightpress/a/low.py": "x = 1\n",
        "nightpress/a/high.py": "def f():\n    import nightpress.b.low\n",
        "nightpress/b/__init__.py": "",
        "nightpress/b/low.py": "import nightpress.b.high\n",
        "nightpress/b/high.py": "import nightpress.a.high\n",
        "bench/nothing.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = structure(tmp_path)
    assert found.circles == [["nightpress.a.high", "nightpress.b.high", "nightpress.b.low"]]
    assert found.arrows_up == {"nightpress": 1}


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, 0),
        ({"a": {"b"}, "b": {"a"}}, 1),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, 1),
        ({"a": {"b", "c"}, "b": {"a", "c"}, "c": {"a", "b"}}, 3),
        ({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}, 2),
    ],
)
def test_arrows_up_are_the_fewest_of_any_order(graph: dict[str, set[str]], expected: int):
    assert arrows_up(graph) == expected


def test_arrows_are_between_packages_and_not_between_files_beside_them():
    files = {
        "p.a": {"p.a.x"},
        "p.a.x": {"p.b.y", "p.file"},
        "p.b": set(),
        "p.b.y": {"p.b"},
        "p.file": {"p.a.x"},
    }
    assert package_arrows(files, "p") == {"a": {"b"}, "b": set()}


def test_repeated_lines_are_found_whatever_their_indentation():
    lines = [f"line_{number}()" for number in range(8)]
    first = "\n".join(lines)
    second = "def f():\n" + "\n\n".join(f"    await {line}" for line in lines) + "\n    # end\n"
    assert repeats({"a.py": first, "b.py": second}) == [Repeat("a.py:1", "b.py:2", 8)]
    assert repeats({"a.py": first, "b.py": "\n".join([*lines[:5], "other()", *lines[5:]])}) == []

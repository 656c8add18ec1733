"""Every measured figure of the README and the guide comes from bench/results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record
from bench.__main__ import BENCHES, listing
from bench.record import Figure, Machine, Run
from bench.train_figures import figures_of
from docs import figures
from docs.figures import PAGES, ROOT, UnknownFigureError, written
from docs.stray_figures import unmarked, unsourced_prose

RESULTS = sorted(path.stem for path in (ROOT / "bench" / "results").glob("*.json"))
#: all pages except those that docs/reference.py writes from the code
MEASURED = [page for page in PAGES if "Written by docs/reference.py" not in page.read_text()]
PLACE = Machine("AMD EPYC", ("avx2",), 2, 24, None)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# The pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_says_what_was_measured(page: Path):
    text = page.read_text()
    blocks = list(figures.BLOCK.finditer(text))
    assert text.count("<!-- figures:") == text.count("<!-- end -->") == len(blocks)
    assert text == written(text), "run `make figures`"


@pytest.mark.parametrize("page", MEASURED, ids=name_of)
def test_no_measured_figure_stands_outside_of_markers(page: Path):
    text = page.read_text()
    assert unmarked(text) == [], "render the table from bench/results, or say `<!-- not measured: why -->` above it"
    assert unsourced_prose(text) == []


@pytest.mark.parametrize(
    ("names", "template"),
    [
        ("no-such-bench", "{/ours/rate}"),
        ("submit", "{/ours/no such figure}"),
        ("submit", "{storage/upload/ours}"),  # a bench that the marker doesn't name
        ("submit", "{/bare/rate@bar}"),  # a figure without a bar
        ("stream", "| {/cases/*} | {/cases/*/no such column} |"),
    ],
)
def test_a_page_cannot_name_what_was_not_measured(names: str, template: str):
    with pytest.raises(UnknownFigureError):
        written(f"<!-- figures: {names}\n{template}\n-->\n<!-- end -->")


@pytest.mark.parametrize(
    "row",
    ["| claim | 3.1 ms |", "| int8 | 0.34 GB/s |", "| early exit | 2.6× |", "| size | 26% |", "| peak | 519 MiB |"],
)
def test_a_table_of_measured_figures_is_told_by_its_units(row: str):
    table = f"| what | measured |\n|---|---|\n{row}\n"
    assert unmarked(table) == [row]
    assert unmarked(f"<!-- not measured: a bound -->\n{table}") == []
    assert unmarked(f"```\n{table}```\n") == []
    assert unmarked("| what | is |\n|---|---|\n| a gate | `size: <= 35%` |\n") == []


def test_a_table_of_measured_figures_is_told_by_its_head():
    assert unmarked("| method | seconds | note |\n|---|---|---|\n| gptq | 114 | 2 |\n") == ["| gptq | 114 | 2 |"]
    assert unmarked("| method | minus |\n|---|---|\n| gptq | 2 |\n") == []


def test_a_mark_above_a_table_is_for_that_table_alone():
    table = "| | MB |\n|---|---|\n| a | 1 |\n"
    assert unmarked(f"<!-- not measured: why -->\n{table}\n{table}") == ["| a | 1 |"]


def test_times_and_rates_in_prose_are_told():
    said = ["It took 74 ms.", "It reads 300 MB/s.", "So it is 2.6× faster."]
    assert unsourced_prose("\n".join([*said, "A block has 16 MiB and 2 × 128 tokens.", "`--wait 5 ms`"])) == said


# How a template is filled --------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of one bench, from two runs."""
    monkeypatch.setattr(figures, "read", lambda name: record.read(name, tmp_path))
    first = (Figure("forms/a/ms", 12.5, "ms", (12.0, 13.25), "< 20"), Figure("forms/a/size", 3, "MB"))
    record.add("speed", Run("2026-11-23", "abc", PLACE, {"torch": "2.13"}, first), tmp_path)
    second = (Figure("forms/b/ms", 1234.0, "ms", bar="< 20"), Figure("share", 0.264))
    gpu = Machine("", (), None, None, "NVIDIA H100")
    record.add("speed", Run("2026-11-26", "def", gpu, {}, second, note="alone"), tmp_path)
    return tmp_path


def shown(template: str) -> list[str]:
    page = written(f"before\n<!-- figures: speed\n{template}\n-->\nold\n<!-- end -->\nafter")
    found = re.fullmatch(r"before\n<!-- figures: .*?\n-->\n(.*)\n<!-- end -->\nafter", page, re.S)
    assert found
    return found[1].splitlines()


def test_a_figure_is_written_in_the_format_that_is_asked_for(results: Path):
    template = "{/forms/a/ms} {/forms/a/ms:.2f} {speed/forms/b/ms:,d} {/share:.0%} {/share:+.1%}"
    assert shown(template) == ["12.5 12.50 1,234 26% +26.4%"]


def test_bars_verdicts_and_spreads_are_written(results: Path):
    template = (
        "{/forms/a/ms@bar} {/forms/a/ms@verdict} {/forms/b/ms@verdict} {/forms/a/ms@spread:.1f}{/forms/b/ms@spread}"
    )
    assert shown(template) == ["< 20 PASS MISS  (12.0 to 13.2)"]


def test_a_line_is_repeated_for_each_row(results: Path):
    template = "| {/forms/*} | {/forms/*/ms:.1f} | {/forms/*/size:d} |"
    assert shown(template) == ["| a | 12.5 | 3 |", "| b | 1234.0 | – |"]


def test_rows_are_sorted_by_a_column(results: Path):
    figures_of_c = (Figure("forms/c/ms", 5.0),)
    record.add("speed", Run("2026-11-27", "fff", PLACE, {}, figures_of_c), results)
    assert shown("{/forms/* by ms}") == ["c", "a", "b"]


def test_sources_are_those_of_the_runs_that_were_used(results: Path):
    assert shown("{/forms/a/ms}{@sources}") == [
        "12.5*Taken by `bench.speed` on 23 November 2026: AMD EPYC (avx2), 2 cores, 24 GiB, torch 2.13.*"
    ]
    assert shown("{/share}{@sources}") == ["0.264*Taken by `bench.speed` on 26 November 2026: NVIDIA H100 (alone).*"]


# The results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_that_of_a_bench_and_names_no_figure_twice(name: str):
    assert name in BENCHES
    runs = record.read(name)
    names = [figure.name for run in runs for figure in run.figures]
    assert names
    assert len(names) == len(set(names))
    for run in runs:
        assert re.fullmatch(r"2\d{3}-\d\d-\d\d", run.date)
        assert run.commit
        assert run.machine.processor or run.machine.gpu


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_written_as_the_writer_writes_it(name: str, tmp_path: Path):
    written = record.write(name, record.read(name), tmp_path)
    assert written.read_text() == (ROOT / "bench" / "results" / f"{name}.json").read_text()


def test_later_figures_take_the_place_of_earlier_ones(tmp_path: Path):
    earlier = Run("2026-11-23", "abc", PLACE, {}, (Figure("a", 1), Figure("b", 2)))
    record.add("bench", earlier, tmp_path)
    later = Run("2026-11-26", "def", PLACE, {}, (Figure("b", 3),))
    record.add("bench", later, tmp_path)
    kept = record.read("bench", tmp_path)
    assert [(run.date, [(figure.name, figure.value) for figure in run.figures]) for run in kept] == [
        ("2026-11-23", [("a", 1)]),
        ("2026-11-26", [("b", 3)]),
    ]
    record.add("bench", Run("2026-11-27", "fff", PLACE, {}, (Figure("a", 4),)), tmp_path)
    assert [run.date for run in record.read("bench", tmp_path)] == ["2026-11-26", "2026-11-27"]


def test_a_run_cannot_give_a_figure_twice(tmp_path: Path):
    with pytest.raises(ValueError, match="the same name"):
        record.add("bench", Run("2026-11-26", "def", PLACE, {}, (Figure("a", 1), Figure("a", 2))), tmp_path)


@pytest.mark.parametrize(
    ("bar", "value", "met"), [("<= 2", 2, True), ("< 2", 2, False), (">= 0.8", 0.79, False), ("> 0.8", 0.81, True)]
)
def test_a_bar_is_a_comparison(bar: str, value: float, met: bool):
    assert Figure("a", value, bar=bar).meets_bar is met


def test_a_bar_that_is_no_comparison_is_refused():
    with pytest.raises(ValueError, match="must begin with"):
        Figure("a", 1, bar="about 2")


@pytest.mark.parametrize(
    ("arguments", "folder"), [([], "results"), (["--only", "a"], "results"), (["--rounds", "1"], "out")]
)
def test_only_a_run_with_the_usual_options_is_shown(
    arguments: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(record, "BENCH", tmp_path / "bench")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(record, "OUT", tmp_path / "bench" / "out")
    (tmp_path / "bench").mkdir()
    parser = record.make_parser("speed", "")
    parser.add_argument("--only")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    assert record.finish("speed", [Figure("a", 1, bar="< 2")], parser, options, choices=("only",)) == 0
    assert record.finish("speed", [Figure("b", 3, bar="< 2")], parser, options, choices=("only",)) == 1
    document = json.loads((tmp_path / "bench" / folder / "speed.json").read_text())
    last = document["runs"][-1]
    assert last["figures"] == [{"name": "b", "value": 3, "bar": "< 2"}]
    assert last["machine"]["cores"] >= 1
    assert "torch" in last["versions"]
    assert "transcribed" not in last


# The benches ---------------------------------------------------------------------------------------------------------


def test_every_bench_is_listed_with_its_usual_minutes():
    modules = {path.stem for path in (ROOT / "bench").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert set(BENCHES) == modules - {
        "__main__",
        "peer_llmcompressor",
        "peer_llmcompressor_run",
        "peer_autoround",
        "peer_nncf",
    }
    for name, bench in BENCHES.items():
        assert bench.measures.endswith(".")
        assert f"{bench.minutes:g} min" in next(line for line in listing().splitlines() if line.startswith(f"{name} "))


def test_no_bench_hides_a_module_of_the_standard_library():
    names = {path.stem for path in (ROOT / "bench").glob("*.py")} - {"__main__"}
    assert names & sys.stdlib_module_names == set()


def test_every_bench_that_is_named_is_there():
    files = [
        *PAGES,
        *(path for folder in ("core", "api", "worker", "client") for path in (ROOT / folder).rglob("*.py")),
    ]
    named = {name for file in files for name in re.findall(r"\bbench\.(\w+)", file.read_text())}
    assert len(named) > 5
    assert named - set(BENCHES) == set()


def test_an_unknown_bench_and_one_that_needs_arguments_are_refused():
    for name, says in (("queue", "no bench 'queue'"), ("train", "needs arguments")):
        done = subprocess.run([sys.executable, "-m", "bench", name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert says in done.stderr


def test_the_bench_of_training_names_its_figures_as_the_pages_do():
    times = {"speedup": 1.9, "source_mean_ms": 12.1, "mean_ms": 6.6, "source_p95_ms": 29.5, "p95_ms": 13.8}
    exits = [{"threshold": at / 10, "depth": 2.0 + at, "accuracy": 0.85, "lost": -0.005} | times for at in range(7)]
    beside = {"accuracy": 0.84, "of_the_source": 0.99, "onnxruntime": times, "torch": times}
    measured = {
        "source_accuracy": 0.845,
        "distill": beside,
        "prune": beside,
        "early-exit": {
            "thresholds": exits,
            "at_chosen": exits[2],
            "cross_chosen": {"depth": 2.1, "lost": 0.006},
        },
        "steps": {"ours": 2.7, "plain": 1.5},
    }
    trained = {"device": "NVIDIA H200", "source_accuracy": 0.845, "steps": {"ours": 38.6, "plain": 33.9}}
    found = [*figures_of(measured, "cpu"), *figures_of(trained, "cuda")]
    shown = {figure.name for run in record.read("train") for figure in run.figures}
    assert shown - {figure.name for figure in found} == set()
    by_name = {figure.name: figure for figure in found}
    assert by_name["classifiers/prune/lost"] == Figure("classifiers/prune/lost", 0.5, "points", bar="<= 2")
    assert by_name["thresholds/chosen/threshold"].value == 0.2
    assert by_name["thresholds/percentile 30/threshold"].value == 0.1

"""`nightpress press` and then `nightpress reproduce`: the same bytes and figures come out of the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nightpress.client.cli.exits import Exit
from nightpress.client.cli.main import app
from nightpress.client.errors import ClientError
from tests.models import bert_tiny_dir

RECIPE = """
name: twice
passes: [{pass: magnitude}]
exports: [safetensors]
evaluate: [{metric: fidelity, data: mine, samples: 6, length: 24}]
"""


def nightpress(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pressed")
    bert_tiny_dir(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "mine.txt").write_text(
        "\n\n".join(f"The {n} ships came home in the evening of day {n}." for n in range(60))
    )
    (folder / "bert-tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = nightpress(
        "press",
        folder / "bert-tiny",
        "-r",
        folder / "recipe.yaml",
        "-o",
        folder / "out",
        "--threads",
        1,
        "--data",
        f"mine={folder / 'mine.txt'}",
    )
    assert done.exit_code == Exit.OK, done.output
    return folder


@pytest.mark.slow
def test_the_same_files_give_the_same_bytes_and_figures(pressed: Path):
    data = f"mine={pressed / 'mine.txt'}"
    done = nightpress("reproduce", pressed / "out", "-m", pressed / "bert-tiny", "--data", data, "--json")
    assert done.exit_code == Exit.OK, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["outcome"] == "identical"
    assert all(item["same"] for item in found["bytes"])
    assert {figure["name"] for figure in found["figures"]} == {"top1_agreement", "kl_divergence", "centred_cosine"}
    assert found["versions"] == {}
    assert all(figure["same"] for figure in found["figures"])


def test_another_model_or_other_data_are_refused_before_anything_runs(pressed: Path, tmp_path: Path):
    other = tmp_path / "bert-tiny"
    shutil.copytree(pressed / "bert-tiny", other)
    (other / "README.md").write_text("another\n")
    done = nightpress("reproduce", pressed / "out", "-m", other, "--data", f"mine={pressed / 'mine.txt'}")
    assert isinstance(done.exception, ClientError)
    assert "not the model of the report" in str(done.exception)
    (tmp_path / "mine.txt").write_text("something else\n\nand more\n")
    done = nightpress(
        "reproduce", pressed / "out", "-m", pressed / "bert-tiny", "--data", f"mine={tmp_path / 'mine.txt'}"
    )
    assert isinstance(done.exception, ClientError)
    assert "mine" in str(done.exception)


def test_reports_on_disk_are_compared_without_a_service(pressed: Path, tmp_path: Path):
    done = nightpress("compare", pressed / "out", pressed / "out" / "report.json", "--html", tmp_path / "all.html")
    assert done.exit_code == Exit.OK, done.output
    assert "twice · safetensors" in done.stdout
    assert "2 jobs compared" in (tmp_path / "all.html").read_text()


def test_the_report_names_licence_data_and_digests(pressed: Path):
    report = json.loads((pressed / "out" / "report.json").read_text())
    assert report["model"]["license"] == "apache-2.0"
    assert [item["ref"] for item in report["data"]] == ["mine"]
    assert report["artifacts"][0]["digest"].startswith("sha256:")
    assert sum(report["phases"].values()) > 0

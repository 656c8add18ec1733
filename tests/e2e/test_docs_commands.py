"""Runs every command of README.md and the guide, page by page, as a reader would type it, with one embedded service.

In a ```console block, lines that begin with `$ ` are commands, which may continue with `\\` or a here-document. The lines after a command
must appear in its output, where `…` matches anything. A ```python block is a program. Each command and program must end with status 0.
A block that can't run here has `<!-- not run: why -->` before it. A command written in another way is an error, so that none is missed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forked_command import forked_command
from tests.servers import free_port
from tests.service import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
_HERE_DOCUMENT = re.compile(r"<<-?\s*'?(\w+)'?")
#: Kinds of block that hold no command.
_DATA = {"", "yaml", "json", "text", "ini"}
#: (shown, run): tracing an encoder takes half a minute a page, and tests/integration/test_pipeline_encoder.py tests it.
#: So all pages share one quick job. tests/e2e/test_search.py has a whole search.
_QUICKER = (
    ("submit ./my-model --recipe int8-encoder", "submit ./my-model --recipe sparse-half --reuse"),
    (
        "--gate 'centred_cosine >= 0.9' --trials 24",
        "--gate 'centred_cosine >= 0.9' --trials 1 --samples 8 --length 16 --space <(echo '[{passes: [{pass: weight-only, bits: 8}], exports: [compressed-tensors]}]')",
    ),
)


@dataclass(frozen=True)
class Command:
    """A reader's command, and the output that the page shows for it."""

    text: str
    output: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    why: str | None  #: why the block isn't run; None: it is run


def blocks_of(page: str) -> list[Block]:
    return [Block(match["kind"], match["body"], match["why"]) for match in _BLOCK.finditer(page)]


def commands_of(block: Block) -> list[Command]:
    """The commands of a block. Raises ValueError for a console block that doesn't begin with a command, or an unfinished here-document."""
    if block.kind == "python":
        return [Command(f"python - <<'END_OF_PROGRAM'\n{block.body}END_OF_PROGRAM", ())]
    commands: list[Command] = []
    lines = iter(block.body.splitlines())
    for line in lines:
        if line.startswith("$ "):
            text = line[2:]
            here = _HERE_DOCUMENT.search(text)
            while text.endswith("\\") or (here and text.splitlines()[-1] != here[1]):
                following = next(lines, None)
                if following is None:
                    raise ValueError(f"{text!r} has no end")
                text += "\n" + following
            commands.append(Command(text, ()))
        elif not commands:
            raise ValueError(f"{line!r} stands before any command; commands begin with `$ `")
        elif line.strip():
            commands[-1] = Command(commands[-1].text, (*commands[-1].output, line))
    return commands


def shows(expected: str, output: str) -> bool:
    """Whether a line of the output contains the fixed parts of the expected line, in the same order."""
    pattern = ".*".join(r"\s+".join(map(re.escape, part.split())) for part in expected.split("…"))
    return any(re.search(pattern, line) for line in output.splitlines())


def runnable(page: Path) -> list[Command]:
    blocks = [block for block in blocks_of(page.read_text()) if block.why is None]
    return [command for block in blocks if block.kind in {"console", "python"} for command in commands_of(block)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path):
    text = page.read_text()
    blocks = blocks_of(text)
    assert text.count("<!-- not run:") == sum(block.why is not None for block in blocks), (
        "a marker stands before its block"
    )
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(blocks)
    for block in blocks:
        if block.why is not None:
            continue
        assert block.kind in _DATA | {"console", "python"}, f"```{block.kind}: commands are written as ```console"
        if block.kind in _DATA:
            assert not re.search(r"^\$ ", block.body, re.M), "commands are written as ```console"
        else:
            assert commands_of(block)


@pytest.fixture(scope="module")
def service() -> Iterator[dict[str, str]]:
    """The environment of a reader's shell: an empty home folder, in which a service runs."""
    home = tempfile.mkdtemp(prefix="np-")  # a unix socket's path must be short; pytest's folders are too long
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
    environment |= {"HOME": home, "NIGHTPRESS_API_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    environment.pop("XDG_CONFIG_HOME", None)
    environment["NIGHTPRESS_DRAIN_S"] = "1"  # the last page leaves a running job
    environment["NIGHTPRESS_WORKER_SPARE"] = "false"  # the last spare would import torch in vain
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    nightpress = [sys.executable, "-m", "nightpress.client.cli.main"]
    up = subprocess.run([*nightpress, "up", "--detach"], env=environment, cwd=home, capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    (command := Path(home) / "command").mkdir()
    with forked_command(command, environment) as commands:
        yield environment | {"PATH": f"{commands}:{environment['PATH']}"}
    subprocess.run([*nightpress, "down"], env=environment, cwd=home, check=True, capture_output=True)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def checkout(tmp_path: Path, bert_tiny: Path) -> Path:
    """The reader's folder as the pages assume it: with a model, and with the virtual environment that `make` made."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    shutil.copytree(bert_tiny, tmp_path / "my-model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name_of)
def test_what_a_page_tells_to_type_works(page: Path, service: dict[str, str], checkout: Path):
    commands = runnable(page)
    # One shell runs a whole page, so that variables and the current folder carry over from block to block.
    script = "".join(
        f"printf '\\036'\n{command.text}\nstatus=$?; printf '\\037%d' $status; [ $status = 0 ] || exit 0\n"
        for command in commands
    )
    script = script.replace("127.0.0.1:8790", f"127.0.0.1:{service['NIGHTPRESS_API_PORT']}")
    for shown, run in _QUICKER:
        script = script.replace(shown, run)
    (checkout / "page.sh").write_text(script)
    done = subprocess.run(
        ["bash", "page.sh"],
        stdin=subprocess.DEVNULL,
        env=service,
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    answers = [answer.rpartition("\037") for answer in done.stdout.split("\036")[1:]]
    for command, (output, _, status) in zip(commands, answers, strict=False):
        assert status == "0", f"$ {command.text}\n{output}"
        for expected in command.output:
            assert shows(expected, output), f"$ {command.text}\nthe page shows {expected!r}, but it printed:\n{output}"
    assert len(answers) == len(commands), done.stdout


def test_a_newcomer_has_a_nightly_job_after_five_commands():
    """The test above runs the page. This test makes sure that it stays so short."""
    section = (ROOT / "docs" / "how-to" / "nightly.md").read_text().split("\n## ")[1]
    commands = [command.text for block in blocks_of(section) for command in commands_of(block)]
    assert len(commands) == 5
    assert commands[0] == "make demo"
    assert commands[-1].startswith("nightpress schedule add")
    readme = (ROOT / "README.md").read_text().split("\n## In five commands\n")[1].split("\n## ")[0]
    shown = [command.text for command in commands_of(blocks_of(readme)[0])]
    assert "the first is `make demo`" in readme
    assert len(shown) == 4
    assert shown[-1].startswith("nightpress schedule add")


def test_a_line_of_output_may_leave_something_open():
    assert shows("ok    API   … at http://…", "ok   API version 1 at http://here\n")
    assert not shows("verdict: accepted", "verdict: rejected")

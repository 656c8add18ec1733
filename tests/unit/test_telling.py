"""Calls that say nothing themselves: loading a model, and tracing it into a graph."""

import re
from pathlib import Path

import pytest

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.telling import telling
from nightpress.core.compress.runners import measure
from tests.headers import encoder
from tests.service import eventually


def test_a_runner_goes_on_telling_while_it_loads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_TELL_EVERY_S", 0.02)
    said = ""

    def heard() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return said.count("\n") >= 3

    with measure.every_few_seconds(lambda spent: measure._say(0.0, f"{measure.LOADING} for {spent:.0f} s")):
        eventually(heard)
    capsys.readouterr()
    assert all(re.fullmatch(r"@progress 0\.0000 loading for \d+ s", line) for line in said.splitlines())
    with pytest.raises(AssertionError):
        eventually(lambda: capsys.readouterr().out, within=0.2)


def test_a_pass_goes_on_telling_while_a_library_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_TELL_EVERY_S", 0.02)
    told: list[tuple[float, str]] = []
    passing = PassContext(encoder(384, 12, 6), tmp_path, progress=lambda fraction, what: told.append((fraction, what)))
    with telling(passing, 0.2, "tracing"):
        eventually(lambda: len(told) >= 3)
    heard = len(told)
    assert told[0] == (0.2, "tracing")
    assert all(fraction == 0.2 and what.startswith("tracing, for ") for fraction, what in told[1:])
    with pytest.raises(AssertionError):
        eventually(lambda: len(told) > heard, within=0.2)


def test_what_hangs_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a call that hangs would never be stopped as stalled."""
    monkeypatch.setattr(measure, "_TELL_EVERY_S", 0.01)
    monkeypatch.setattr(measure, "_TOLD_S", 0.05)
    told: list[str] = []
    passing = PassContext(encoder(384, 12, 6), tmp_path, progress=lambda _fraction, what: told.append(what))
    with telling(passing, 0.2, "tracing"):
        with pytest.raises(AssertionError):
            eventually(lambda: len(told) > 20, within=0.5)
        assert len(told) < 10

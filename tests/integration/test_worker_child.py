"""The pipes between a supervisor and its child."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nightpress.core.handoff.frames import Log, Result, parse_frame
from nightpress.worker import process
from nightpress.worker.process import ChildProcess
from tests.patience import slowness
from tests.service import RECIPE, behaving, eventually, pids_said, running


def frames_of(child: ChildProcess) -> list[object]:
    with open(child.frames, "rb", closefd=False) as stream:
        return [parse_frame(line) for line in stream]


@pytest.mark.slow
def test_a_beat_before_the_job_begins_does_not_confuse_the_child(tmp_path: Path) -> None:
    """Staging from a slow store may take longer than a lease's renewal. The spare child must not mistake the beat for its first line."""
    child = ChildProcess(tmp_path, threads=1, network=True)
    try:
        child.beat()
        child.begin(patience_s=60)
        (result,) = frames_of(child)
        assert isinstance(result, Result)
        assert result.error is not None, "there is no spec.json in its folder"
        assert child.wait(30 * slowness()) is not None
    finally:
        child.kill()
        child.remove()


@pytest.mark.slow
def test_a_spare_child_has_what_loads_models_ready_and_counts_their_libraries_once(tmp_path: Path) -> None:
    """The inner process imports the libraries, and forks a nursery from which runners are forked."""
    child = ChildProcess(tmp_path, threads=1, network=True)

    def forks() -> list[psutil.Process]:
        """The nursery, once the inner process has forked it."""
        with contextlib.suppress(psutil.Error):
            inner = [process for process in psutil.Process(child.pid).children() if process.children()]
            return [process for parent in inner for process in parent.children()]
        return []

    try:
        eventually(forks, within=60)
        (nursery,) = forks()
        inner = psutil.Process(nursery.pid).parent()
        assert inner is not None
        eventually(lambda: time.time() - nursery.create_time() > 3, within=60)
        libraries, all_of_inner = nursery.memory_info().rss, inner.memory_info().rss
        assert child.anonymous_memory() < all_of_inner + libraries / 2
    finally:
        child.kill()
        child.remove()
    eventually(lambda: not running([nursery.pid]), within=5)


@pytest.mark.slow
def test_a_child_that_nobody_hears_ends_with_all_it_started(tmp_path: Path) -> None:
    """When a supervisor is killed, all its pipes close at once. It must not matter which of them the child notices first."""
    child = ChildProcess(tmp_path, threads=1, network=True, command=behaving("endless"))
    try:
        spec = {"job_id": "job_1", "attempt": 1, "model_name": "m", "model_digest": "d", "recipe": RECIPE}
        (child.job_dir / "spec.json").write_text(json.dumps(spec))
        child.begin(patience_s=60)
        with open(child.frames, "rb", closefd=False) as stream:
            said = next(frame for frame in map(parse_frame, stream) if isinstance(frame, Log))
        started = pids_said(said.text)
        assert len(running(started)) == 3
        os.close(child.frames)
        eventually(lambda: not running(started), within=5)
    finally:
        child.kill()
        child.remove()


@pytest.mark.slow
def test_a_child_that_is_told_nonsense_ends_instead_of_waiting(tmp_path: Path) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-m", "nightpress.worker.child", "--frames", str(write), "--keep-network", str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(write,))
    try:
        assert child.stdin is not None
        child.stdin.write(b".nonsense\n")
        child.stdin.flush()
        assert child.wait(60 * slowness()) != 0
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        os.close(read)
        os.close(write)


HOLDS = """
import os, sys
if os.fork() == 0:
    held = bytearray(os.urandom(1) * (200 * 1024**2))
    if os.fork() == 0:
        if "write" in sys.argv:
            held[::4096] = os.urandom(1) * len(held[::4096])
        print("forked", flush=True)
sys.stdin.buffer.read()
"""


def test_a_fork_does_not_count_its_parents_memory_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that has just been forked shows all its parent's memory as its own, and later what it has not written to."""
    child = ChildProcess(tmp_path, threads=1, network=True, command=(sys.executable, "-c", HOLDS))
    try:
        assert os.read(child.chatter, 100).startswith(b"forked")
        for young_s in (3600.0, -3600.0):
            monkeypatch.setattr(process, "_FORKED_S", young_s)
            assert 200e6 < child.anonymous_memory() < 300e6
    finally:
        child.kill()
        child.remove()


def test_what_a_fork_has_written_to_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = ChildProcess(tmp_path, threads=1, network=True, command=(sys.executable, "-c", HOLDS, "write"))
    try:
        assert os.read(child.chatter, 100).startswith(b"forked")
        monkeypatch.setattr(process, "_FORKED_S", -3600.0)
        assert 400e6 < child.anonymous_memory() < 500e6
    finally:
        child.kill()
        child.remove()

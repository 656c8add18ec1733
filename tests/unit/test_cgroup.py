"""The kernel's count of processes that it killed for lack of memory, in this process's control group."""

from pathlib import Path

import pytest

from nightpress.worker.cgroup import oom_kills


@pytest.mark.parametrize(
    ("membership", "file", "text"),
    [
        ("0::/system.slice/worker\n", "system.slice/worker/memory.events", "low 0\noom 4\noom_kill 3\n"),
        ("0::/\n", "memory.events", "oom_kill 3\noom_group_kill 0\n"),
        ("4:memory:/docker/ab\n0::/\n", "memory/docker/ab/memory.oom_control", "under_oom 0\noom_kill 3\n"),
        ("2:cpu,cpuacct:/x\n4:hugetlb,memory:/a:b\n", "memory/a:b/memory.oom_control", "oom_kill 3\n"),
    ],
)
def test_the_groups_own_count_is_read_in_both_versions(tmp_path: Path, membership: str, file: str, text: str):
    (tmp_path / "membership").write_text(membership)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert oom_kills(tmp_path, tmp_path / "membership") == 3


@pytest.mark.parametrize("membership", ["", "0::/\n", "4:memory:/gone\n", None])
def test_where_nothing_is_counted_nothing_was_killed(tmp_path: Path, membership: str | None):
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert oom_kills(tmp_path, tmp_path / "membership") == 0

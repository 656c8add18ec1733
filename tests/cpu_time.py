"""Prints the files whose tests took the most processor time: their own, and that of the processes that they started and waited for.

With more workers than processors, a test's duration tells how busy the machine was. The suite takes as long as its processor time does.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests import forked_process

_SHOWN = 15
_PROPERTY = "cpu_s"
_BEFORE = pytest.StashKey[float]()


def _cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + forked_process.cpu_s()


class CpuTime:
    """Adds up what the reports of tests say, in the process that has the reports of all workers."""

    def __init__(self) -> None:
        self.of_files: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.of_files[report.nodeid.partition("::")[0]] += dict(report.user_properties).get(_PROPERTY, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"{self.of_files.total():.0f} CPU seconds in tests, most in these files")
        for path, seconds in self.of_files.most_common(_SHOWN):
            terminalreporter.write_line(f"{seconds:7.1f}  {path}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.durations and not hasattr(config, "workerinput"):
        config.pluginmanager.register(CpuTime())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEFORE] = _cpu_s()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.when == "teardown":
        item.user_properties.append((_PROPERTY, _cpu_s() - item.stash[_BEFORE]))
    return (yield)

"""Virtual environments whose packages are taken from the test's own environment: nothing is downloaded, unpacked or compiled again."""

import csv
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path) -> Path:
    """Make an environment without any package. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    return folder / "bin" / "python"


def packages_of(python: Path) -> Path:
    [folder] = python.parents[1].glob("lib/python*/site-packages")
    return folder


def required_by(asked: Distribution, extras: set[str]) -> list[Distribution]:
    """What a distribution with these extras needs: what its metadata ask for, and what their metadata ask for, to the end.

    Raises PackageNotFoundError for a distribution that is not installed here, and AssertionError for a version that was not asked for.
    """
    found: dict[str, Distribution] = {}
    extras_of: dict[str, set[str]] = {}
    open_: list[tuple[Distribution, set[str]]] = [(asked, {"", *extras})]
    while open_:
        asking, asking_for = open_.pop()
        for line in asking.requires or ():
            needed = Requirement(line)
            if needed.marker is not None and not any(needed.marker.evaluate({"extra": extra}) for extra in asking_for):
                continue
            if needed.name not in found:
                found[needed.name] = distribution(needed.name)
            there = found[needed.name]
            assert needed.specifier.contains(there.version, prereleases=True), f"{asking.name} asks for {line}"
            known = extras_of.setdefault(needed.name, set())
            if new := {"", *needed.extras} - known:
                known |= new
                open_.append((there, new))
    return list({there.name: there for there in found.values()}.values())


def add_packages(python: Path, *packages: Distribution) -> None:
    """Put distributions into an environment, with the bytecode that pip compiled, but without their commands."""
    target = packages_of(python)
    for package in packages:
        for path, *_ in csv.reader((package.read_text("RECORD") or "").splitlines()):
            if not path.startswith(("..", "/")):
                to = target / path
                to.parent.mkdir(parents=True, exist_ok=True)
                _link(Path(str(package.locate_file(path))), to)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or files of another user
        shutil.copy2(source, target)

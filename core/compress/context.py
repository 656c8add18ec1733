"""What a pass is given beside its folders and options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.recipes.calibration import Calibration
from core.recipes.header import ModelHeader


def _no_progress(_fraction: float, _message: str) -> None:
    pass


def _no_metric(_name: str, _value: float, _step: int) -> None:
    pass


def _no_checkpoint(_path: str, _step: int) -> None:
    pass


@dataclass(frozen=True)
class PassContext:
    header: ModelHeader  #: of the model the pass reads
    work_dir: Path  #: kept between attempts of one job: finished shards are found there again
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    index: int = 0  #: the pass's place in the recipe
    calibration: Calibration = field(default=Calibration())  #: what text the pass may look at
    data_files: Mapping[str, Path] = field(
        default_factory=dict
    )  #: the data sets people brought, by what the recipe calls them
    progress: Callable[[float, str], None] = field(default=_no_progress)  #: fraction of this pass, what is being done
    metric: Callable[[str, float, int], None] = field(
        default=_no_metric
    )  #: name, value and step of a curve as it grows
    checkpoint: Callable[[str, int], None] = field(default=_no_checkpoint)  #: a file from which another attempt goes on

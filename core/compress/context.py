"""What a pass is given beside its folders and options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader


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
    origin: Path | None = None  #: the model that the job came with; None: the one the pass reads
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
    #: (path below work_dir, step): the file is whole, and another attempt finds it there again. The same path again replaces it.
    checkpoint: Callable[[str, int], None] = field(default=_no_checkpoint)

    def whole(self, step: int, *files: Path) -> None:
        """Checkpoint files that belong together, the one that vouches for the others last. One outside work_dir is the caller's own."""
        for file in files:
            if file.is_relative_to(self.work_dir):
                self.checkpoint(file.relative_to(self.work_dir).as_posix(), step)

"""The results of a job so far: what its stages hand to each other."""

import dataclasses
from pathlib import Path

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.evaluate.quality import Trial
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.companions import family_member
from nightpress.core.compress.stages.baseline import Baseline
from nightpress.core.compress.stages.renumbering import Renumbering
from nightpress.core.handoff.report import PassRecord, Screening, Subject
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.profile import Profile


@dataclasses.dataclass(frozen=True)
class Exported:
    """An artifact that is written, but not verified yet."""

    export: Export
    folder: Path
    runner: Path  #: the script that loads the artifact in a process of its own


@dataclasses.dataclass
class State:
    """The results of a job so far. Each stage reads the results of the earlier stages and adds its own."""

    source_header: ModelHeader
    trial: Trial  #: the examples and timings that all models are measured with
    baseline: Baseline  #: the source's outputs and timed runs
    source: Subject  #: the source's figures; its timings only after the stage `measure`
    folder: Path  #: the model as the passes so far have written it
    header: ModelHeader  #: of that model; after a pass that must be last, of the model before that pass
    records: list[PassRecord] = dataclasses.field(default_factory=list)
    #: speed of a family's model, None for the pressed model → its graph, if an export needs one
    traced: dict[float | None, Traced] = dataclasses.field(default_factory=dict)
    exported: list[Exported] = dataclasses.field(default_factory=list)
    #: format → the uncompressed model in that format, to be timed beside the artifacts of its runtime
    uncompressed: dict[str, Exported] = dataclasses.field(default_factory=dict)
    artifacts: list[Subject] = dataclasses.field(default_factory=list)
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  #: for the report
    screening: Screening | None = None  #: set if the job ends right after its passes
    runner: Path | None = (
        None  #: loads the pressed folder in place of its format's runner, because a pass has left no transformer
    )
    renumbering: Renumbering | None = None  #: of the source's token ids, if a pass has cut the vocabulary
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  #: of the libraries in the consumers' processes

    def pressed(self, export: Export) -> Path:
        """The folder of the model from which an export is made."""
        member = self.folder if export.speed is None else family_member(self.folder, export.speed)
        return member if member.is_dir() else self.folder  # the fastest of a family lies in the pressed folder itself

    def parameters(self, export: Export) -> int:
        """The number of parameters of that model."""
        folder = self.pressed(export)
        return (self.header if folder == self.folder else inspect_model(FolderFiles(folder))).parameters

    @property
    def check(self) -> Sequences:
        """The check texts by the pressed model's token ids."""
        texts = self.trial.task.sets[0]
        if self.renumbering is None:
            return texts.sequences
        return self.renumbering.sequences(texts.sequences, aligned=texts.kind not in {"pooled", "logits"})

    def renumber_file(self, scratch: Path) -> Path | None:
        """The file that tells a runner of other token ids; None: the pressed model has the source's."""
        file = scratch / "renumbering.npz"
        if self.renumbering is None or file.is_file():
            return None if self.renumbering is None else file
        scratch.mkdir(parents=True, exist_ok=True)
        return self.renumbering.save(file)

"""Measures the candidates of a pass that searches within a gate: each is loaded in a fresh process, on the half of the data that chooses."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nightpress.core.compress.context import Judged
from nightpress.core.compress.evaluate import gates, quality
from nightpress.core.compress.evaluate.view import Evaluation, without_interval
from nightpress.core.compress.export import onnx, safetensors
from nightpress.core.compress.export.consumer import Observed, run_consumer
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.compress.stages.state import State
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import GateResult, Measurement, Subject
from nightpress.core.recipes.anatomy import OWN_SHAPES
from nightpress.core.recipes.gates import Gate
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import PassOptions


def judge_of(job: PressJob, state: State, options: PassOptions) -> "CandidateJudge | None":
    """The judge for a pass with `within`; None for other passes."""
    return None if options.gate_within is None else CandidateJudge(job, state, options.gate_within)


class CandidateJudge:
    """Decides one gate for candidates, as the recipe's gates are decided: by the unfavourable end of the figure's interval."""

    def __init__(self, job: PressJob, state: State, gate: Gate) -> None:
        self._job, self._state = job, state
        self._scratch = job.scratch / "within"
        self._numbers = itertools.count()
        self._gate, self.note = gate, ""
        #: those that give the gate's figure; other figures compare with the source, and each evaluation has them
        chosen = [
            evaluation
            for evaluation in state.trial.choose
            if gates.measured(gate, self._subject("source", [evaluation], None))
        ]
        if not chosen and gate.metric == "accuracy":
            self._stand_in(gate)
        self._evaluations = chosen or list(state.trial.choose)
        self._source = self._subject("source", self._evaluations, None)

    def _stand_in(self, gate: Gate) -> None:
        """Without labels, agreement with the source bounds the accuracy: answers that don't change lose none."""
        if gate.relative != "change" or gate.value > 0 or gate.operator not in {">=", ">"}:
            return
        self._gate = gate.model_copy(
            update={"metric": "top1_agreement", "value": 1 + gate.value, "relative": "absolute"}
        )
        self.note = f"The data has no labels: {self._gate} stands in for {gate}. A model that gives the source's answer on {1 + gate.value:.1%} of the texts loses at most {-gate.value:.1%} of them."
        self._job.log(self.note)

    @property
    def gate(self) -> str:
        return str(self._gate)

    @property
    def data(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(evaluation.ref for evaluation in self._evaluations))

    @property
    def examples(self) -> int:
        return min(len(evaluation.scorer.examples.sequences.ids) for evaluation in self._evaluations)

    def model(self, folder: Path) -> Judged:
        """Decide the gate for a model's folder. What only graphs can carry is traced, and measured as a graph."""
        header = inspect_model(FolderFiles(folder))
        if OWN_SHAPES not in header.config:
            return self._decide(safetensors.CONSUMER, folder, self._job.device_of(None))
        work = self._scratch / "traced"
        shutil.rmtree(work, ignore_errors=True)
        context = self._job.context(header, lambda _fraction, _text: None, index=0)
        context = replace(context, work_dir=work, checkpoint=lambda _path, _step: None)
        traced = tracing.trace(folder, header, self._state.trial.task.sets[0].sequences, context)
        onnx.save(folder, work / "onnx", traced, [])
        return self.graph(work / "onnx")

    def graph(self, folder: Path) -> Judged:
        """Decide the gate for the folder of an ONNX graph."""
        return self._decide(onnx.CONSUMER, folder, "cpu")

    def _decide(self, runner: Path, folder: Path, device: Device) -> Judged:
        trial, baseline = self._state.trial, self._state.baseline
        observed = run_consumer(
            runner,
            folder,
            trial.only(self._evaluations),
            name=f"candidate {next(self._numbers) + 1}",
            stem="candidate",
            scratch=self._scratch,
            device=device,
            parts=1 if device == "cpu" else self._job.parts_of(None, folder),
            reference=baseline.observed.outputs_file,
        )
        candidate = self._subject("candidate", self._evaluations, observed)
        decided = Judged(self._decided(candidate), self._decided(_by_value(candidate)))
        if decided.by_end.observed is None:
            raise NightpressError(
                ErrorCode.INVALID_RECIPE,
                f"`within`: {decided.by_end.explanation}.",
                hint="Name a figure that this recipe measures for this model, or bring a data set that has it.",
            )
        return decided

    def _decided(self, candidate: Subject) -> GateResult:
        return gates.decide_quality(self._gate, self._source, candidate)

    def _subject(self, name: str, evaluations: Sequence[Evaluation], observed: Observed | None) -> Subject:
        """The figures that the gate may be on; of the source alone if `observed` is None."""
        seed, source = self._state.trial.seed, self._state.baseline.observed
        return Subject(
            name=name,
            format="",
            size_bytes=0,
            measurements=quality.figures_of(evaluations, seed, source, observed),
            slices=quality.slice_figures(evaluations, seed, source, observed) if self._gate.slice else (),
        )


def _by_value(subject: Subject) -> Subject:
    """The same figures, of which the value decides and not the end of the interval."""
    slices = (
        part.model_copy(update={"measurements": tuple(map(_without_width, part.measurements))})
        for part in subject.slices
    )
    measurements = tuple(map(without_interval, subject.measurements))
    return subject.model_copy(update={"measurements": measurements, "slices": tuple(slices)})


def _without_width(figure: Measurement) -> Measurement:
    """A figure of a slice with both ends at its value. Without ends it would count as a figure of too few examples."""
    if figure.low is None:
        return figure
    ends = {"low": figure.value, "high": figure.value, "change_low": figure.change, "change_high": figure.change}
    return figure.model_copy(update=ends)

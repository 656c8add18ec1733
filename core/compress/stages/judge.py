"""Measures the candidates of a pass that searches within a gate: each is loaded in a fresh process, on the half of the data that chooses."""

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nightpress.core.compress.context import Judged
from nightpress.core.compress.evaluate import gates, quality
from nightpress.core.compress.export import onnx, safetensors
from nightpress.core.compress.export.consumer import run_consumer
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
        alone = [
            (evaluation, quality.figures_of([evaluation], state.trial.seed, state.baseline.observed, None))
            for evaluation in state.trial.choose
        ]
        #: those that give the gate's figure; other figures compare with the source, and each evaluation has them
        chosen = [pair for pair in alone if gate.metric in {found.name for found in pair[1]}]
        if not chosen and gate.metric == "accuracy":
            self._stand_in(gate)
        self._evaluations = [evaluation for evaluation, _ in chosen or alone]
        self._source = [figure for _, figures in chosen or alone for figure in figures]

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
            reference=baseline.observed.outputs_file,
        )
        figures = quality.figures_of(self._evaluations, trial.seed, baseline.observed, observed)
        decided = Judged(self._decided(figures), self._decided(map(_without_interval, figures)))
        if decided.by_end.observed is None:
            raise NightpressError(
                ErrorCode.INVALID_RECIPE,
                f"`within`: {decided.by_end.explanation}.",
                hint="Name a figure that this recipe measures for this model, or bring a data set that has it.",
            )
        return decided

    def _decided(self, figures: Iterable[Measurement]) -> GateResult:
        return gates.decide_quality(self._gate, _subject("source", self._source), _subject("candidate", figures))


def _without_interval(figure: Measurement) -> Measurement:
    ends = ("low", "high", "change_low", "change_high")
    return figure.model_copy(update=dict.fromkeys(ends))


def _subject(name: str, figures: Iterable[Measurement]) -> Subject:
    return Subject(name=name, format="", size_bytes=0, measurements=tuple(figures))

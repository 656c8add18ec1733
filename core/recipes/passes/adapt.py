"""Passes that use fewer blocks for easy inputs."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration, ReadRef
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.depth import depth
from nightpress.core.recipes.header import SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, Need, PassOptions, Scope
from nightpress.core.recipes.passes.lessons import Blocks
from nightpress.core.recipes.passes.training import Training

Policy = Literal["confidence", "entropy", "patience", "length"]


class EarlyExit(PassOptions):
    """Let easy inputs leave a model early.

    A classifier gets a small head after each of some blocks, and becomes one ONNX graph: when a head's score reaches the threshold, the
    graph skips the blocks that follow. The threshold is chosen on held-out rows, so that accuracy falls by at most `max_loss`. A causal
    language model drafts tokens with its first blocks and checks them with all blocks (self-speculative decoding): its greedy output is
    unchanged.
    """

    needs: ClassVar[Need] = "training"
    scope: ClassVar[Scope] = "train"
    spreads: ClassVar[bool] = True
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"onnx", "safetensors"})
    last: ClassVar[bool] = True
    early_exits: ClassVar[bool] = True

    pass_: Literal["early-exit"] = Field("early-exit", alias="pass")
    train: Training = Training(validation=0.1)
    exits: Blocks | None = Field(
        None,
        description="Exits follow these blocks, counted from 0. Default: every one but the last; for a language model the best of a few.",
    )
    policy: Policy = Field(
        "confidence",
        description="An input leaves at the first exit where its `confidence` (largest probability) or its certainty (one minus normalised `entropy`, BranchyNet, "
        "arXiv 1709.01686) reaches the threshold; where as many heads in a row agree (`patience`, arXiv 2006.04152); or by its `length` alone: "
        "then the threshold is the number of blocks with a head to pass, for each token.",
    )
    threshold: float | None = Field(None, ge=0, le=1000, description="Default: chosen on held-out rows.")
    choose_on: ReadRef | None = Field(
        None,
        description="Rows on which the threshold is chosen, best rows that the model was not trained on. Default: the validation rows.",
    )
    max_loss: float = Field(
        0.01, ge=0, le=1, description="Accuracy that may be lost on the held-out rows: 0.01 is one point."
    )
    thaw: bool = Field(
        True,
        description="Also train the blocks. false: only the heads are trained, and the whole model answers as before.",
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="Weight of the source's answers in the loss; the rest is for the labels."
    )
    temperature: float = Field(2.0, gt=0, le=100)

    def describe(self) -> str:
        return f"by {self.policy}, at most {self.max_loss:.1%} lost, {self.train.describe()}"

    def data_refs(self) -> frozenset[str]:
        return frozenset({self.train.data, self.choose_on or self.train.data})

    def wants_labels(self, header: ModelHeader | None) -> bool:
        return self.alpha < 1 and (header is None or header.task == "classification")

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        if header is None:
            return self.exports
        return frozenset({"safetensors"}) if header.is_decoder else frozenset({"onnx"})

    def why_not(self, header: ModelHeader | None) -> str:
        if header is not None and header.is_decoder:
            return "a language model that exits early is its own checkpoint with another generation_config.json"
        return "only a graph can skip blocks without code of its own"

    def exit_blocks(self, header: ModelHeader) -> tuple[int, ...]:
        """Return the blocks that have a head after them."""
        return self.exits or tuple(range(depth(header) - 1))

    def check(self, header: ModelHeader) -> None:
        blocks = depth(header)
        if header.task not in {"classification", "causal-lm"}:
            raise invalid(
                f"`early-exit` can't take a model for {header.task}: there is no answer that could be sure.",
                "It takes classifiers and causal language models.",
            )
        if header.model_type in SHARED_BLOCKS:
            raise invalid(
                f"`early-exit` can't take a {header.model_type}: its blocks share their weights.", "Distil it first."
            )
        if blocks < 2:
            raise invalid("`early-exit` needs a model of two blocks at least.", "Take a deeper one.")
        if self.exits is not None and (list(self.exits) != sorted(set(self.exits)) or max(self.exits) >= blocks - 1):
            raise invalid(
                f"`early-exit`: exits {list(self.exits)} are out of range or order; there is none behind the last of {blocks} blocks.",
                f"Name blocks from 0 to {blocks - 2}, each once, in order.",
            )
        self.train.check(self.name, header)
        if header.is_decoder:
            return
        if self.wants_labels(header) and self.train.is_unlabelled():
            raise invalid(
                f"`early-exit`: `alpha` {self.alpha:g} learns from labels, and {self.train.data} has none.",
                "Name a data set of rows with `text` and `label` in `train.data`, or use `alpha: 1`.",
            )
        if not self.train.validation and self.threshold is None and self.choose_on is None:
            raise invalid(
                "`early-exit` chooses its threshold on held-apart rows.",
                "Give train.validation a share, name rows to `choose_on`, or give the threshold itself.",
            )

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        if not all(options.cache_cuts_back for options in passes):
            raise invalid(
                "`early-exit` drafts tokens and takes wrong ones back, which needs a cache that can be cut back.",
                "Use `generation-cache` with `mode: dynamic`, or give the two their own recipes.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if self.policy == "length":
            yield "`early-exit` by length trusts that short texts are easy; `confidence` looks at the text itself."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return self.train.cost(header, trained=1.0 if self.thaw else 0.05)

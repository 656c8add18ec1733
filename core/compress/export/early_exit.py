"""A classifier with early exits as one ONNX graph: `If` nodes skip the blocks that are not needed.

The model is traced once with all its heads. The nodes that the first head needs become the graph. The further nodes that the second head
needs become a branch, which runs if the first head was not sure of every input. The later heads follow in the same way. Any runtime with
ONNX's `If` can run this graph, without our code. See docs/decisions/0031.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.graph.modules import encoder_signature, example_ids, takes_types
from nightpress.core.compress.graph.restated import restate
from nightpress.core.compress.graph.telling import telling
from nightpress.core.compress.graph.tracing import Traced, content_digest, export_graph, without_notes
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.exits import ExitModel, ExitPlan, load_exits
from nightpress.core.recipes.header import ModelHeader


def trace_exits(model_dir: Path, header: ModelHeader, check: Sequences, context: PassContext) -> Traced:
    """Return the graph, and the module's own logits for the check texts. This takes seconds, so another attempt does it again."""
    context.progress(0.05, "loading the model to trace it")
    torch.set_num_threads(context.threads)
    model, plan = load_exits(model_dir, header, attention="eager")
    with torch.inference_mode():
        expected, _ = model.answer(torch.from_numpy(check.ids), torch.from_numpy(check.mask), plan)
    restate(model.model)
    key = hashlib.sha256(f"{content_digest(model_dir)}\n{header.model_dump_json()}\n{plan.model_dump_json()}".encode())
    folder = context.work_dir / "graph" / f"exits-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    types = takes_types(model.model, header)
    signature = encoder_signature(example_ids(header), types=types, outputs=_names(plan))
    with telling(context, 0.3, "tracing the model into a graph"):
        program = export_graph(_Flat(model).eval(), header, signature)
    without_notes(program.model.graph)
    with disk_errors():
        onnx.save(with_exits(program.model_proto, plan), folder / "model.onnx")
    return Traced(folder / "model.onnx", expected.float().numpy().astype(np.float32), {})


def _names(plan: ExitPlan) -> list[str]:
    heads = range(len(plan.blocks))
    return [*(f"logits.{at}" for at in range(len(plan.blocks) + 1)), *(f"score.{at}" for at in heads)]


class _Flat(nn.Module):
    """A module with the logits and the scores of all heads as separate outputs."""

    def __init__(self, model: ExitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        heads = self.model(input_ids, attention_mask, token_type_ids)
        return (*heads.logits, *heads.scores)


def with_exits(flat: onnx.ModelProto, plan: ExitPlan) -> onnx.ModelProto:
    """Sort a graph with the outputs logits.0 … logits.E, score.0 … score.E−1 into nested `If`s.

    The new outputs are `logits` [B, C] and `depth` int64 [B], the number of blocks used for each input. The new input `threshold` is
    optional. A batch goes on until the heads were sure of all its inputs. An input keeps the answer of the first head that was sure of it.
    """
    graph = flat.graph
    made = {name: node for node in graph.node for name in node.output if name}
    placed: set[int] = set()

    def needed(names: list[str]) -> list[onnx.NodeProto]:
        """The nodes that compute these values and have no place yet, in the graph's order."""
        open_, chosen = list(names), set()
        while open_:
            node = made.get(open_.pop())
            if node is None or id(node) in chosen or id(node) in placed:
                continue
            chosen.add(id(node))
            open_ += [name for name in node.input if name]
            for attribute in node.attribute:  # values that the branches of the model's own `If` nodes read
                for inner in [attribute.g, *attribute.graphs]:
                    open_ += [name for node in inner.node for name in node.input if name]
        placed.update(chosen)
        return [node for node in graph.node if id(node) in chosen]

    heads = len(plan.blocks)
    readers = Counter(name for node in graph.node for name in node.input)
    constants = {initializer.name: initializer for initializer in graph.initializer}

    def only_of(nodes: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """The constants that only these nodes read.

        They go into the same branch as the nodes: runtimes don't fuse or pack a node whose weights are outside its branch.
        """
        read = Counter(name for node in nodes for name in node.input)
        return [constants[name] for name in read if name in constants and read[name] == readers[name]]

    def build(at: int) -> tuple[list[onnx.NodeProto], str, str]:
        """Return the nodes from head `at` on, the name of the logits, and the name of the depths."""
        logits, depth = f"logits.{at}", f"depth.{at}"
        if at == heads:
            return [*needed([logits]), *_depth(logits, depth, plan.depths[at])], logits, depth
        nodes = [*needed([logits, f"score.{at}"]), *_depth(logits, depth, plan.depths[at])]
        sure, rows = f"sure.{at}", f"sure.{at}.rows"
        nodes += [
            helper.make_node("GreaterOrEqual", [f"score.{at}", "threshold"], [sure], name=sure),
            helper.make_node("Cast", [sure], [f"{sure}.number"], to=TensorProto.INT32, name=f"{sure}.number"),
            helper.make_node("ReduceMin", [f"{sure}.number"], [f"{sure}.least"], keepdims=0, name=f"{sure}.least"),
            helper.make_node("Cast", [f"{sure}.least"], [f"{sure}.all"], to=TensorProto.BOOL, name=f"{sure}.all"),
            helper.make_node("Unsqueeze", [sure, "last_axis"], [rows], name=rows),
        ]
        inner, rest_logits, rest_depth = build(at + 1)
        own = only_of(inner)
        inner += [
            helper.make_node("Where", [rows, logits, rest_logits], [f"merged.{at}"], name=f"merged.{at}"),
            helper.make_node("Where", [sure, depth, rest_depth], [f"merged.{at}.depth"], name=f"merged.{at}.depth"),
        ]
        leave = [
            helper.make_node("Identity", [logits], [f"left.{at}"], name=f"left.{at}"),
            helper.make_node("Identity", [depth], [f"left.{at}.depth"], name=f"left.{at}.depth"),
        ]
        nodes.append(
            helper.make_node(
                "If",
                [f"{sure}.all"],
                [f"answer.{at}", f"answer.{at}.depth"],
                name=f"exit.{at}",
                then_branch=_branch(f"leave.{at}", leave, f"left.{at}", f"left.{at}.depth"),
                else_branch=_branch(f"go_on.{at}", inner, f"merged.{at}", f"merged.{at}.depth", own),
            )
        )
        return nodes, f"answer.{at}", f"answer.{at}.depth"

    nodes, logits, depth = build(0)
    inside = {constant.name for constant in _constants_inside(nodes)}
    nodes += [
        helper.make_node("Identity", [logits], ["logits"], name="logits"),
        helper.make_node("Identity", [depth], ["depth"], name="depth"),
    ]
    threshold = helper.make_tensor("threshold", TensorProto.FLOAT, [], [plan.threshold])
    axis = helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1])
    whole = helper.make_graph(
        nodes,
        "early_exit",
        [*graph.input, helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None]),
            helper.make_tensor_value_info("depth", TensorProto.INT64, ["batch"]),
        ],
        initializer=[
            *(initializer for initializer in graph.initializer if initializer.name not in inside),
            threshold,
            axis,
        ],
    )
    model = helper.make_model(whole, opset_imports=list(flat.opset_import), functions=list(flat.functions))
    model.ir_version = flat.ir_version
    return model


def _constants_inside(nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.g.initializer
            yield from _constants_inside(list(attribute.g.node))


def _branch(
    name: str, nodes: list[onnx.NodeProto], logits: str, depth: str, constants: Sequence[onnx.TensorProto] = ()
) -> onnx.GraphProto:
    outputs = [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, None),
        helper.make_tensor_value_info(depth, TensorProto.INT64, None),
    ]
    return helper.make_graph(nodes, name, [], outputs, initializer=constants)


def _depth(logits: str, out: str, blocks: int) -> list[onnx.NodeProto]:
    """Nodes that give the number of blocks once for each row of the logits."""
    value = helper.make_tensor("value", TensorProto.INT64, [1], [blocks])
    return [
        helper.make_node("Shape", [logits], [f"{out}.rows"], start=0, end=1, name=f"{out}.rows"),
        helper.make_node("ConstantOfShape", [f"{out}.rows"], [out], value=value, name=out),
    ]

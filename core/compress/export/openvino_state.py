"""A decoder's key/value caches as the state of an OpenVINO model: it keeps them between calls, and `reset_state` empties them."""

from typing import Any

import numpy as np

_PAST, _PRESENT = "past_key_values.", "present."
_HEARD = ".encoder."  #: in the names of keys and values of an encoder's answer


def keep_cache(model: Any) -> None:
    """Make the model keep its key/value cache between calls and reorder it by `beam_idx`, as OpenVINO's generation libraries expect.

    After `reset_state` the cache is empty. Its batch size is then that of the next call's `input_ids`.
    """
    from openvino import Dimension, PartialShape, Type
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = ops.parameter(PartialShape([Dimension()]), Type.i32, name="beam_idx")
    beams.output(0).set_names({"beam_idx"})
    model.add_parameters([beams])
    pairs = {}
    for port in model.inputs:
        name = port.get_any_name()
        if not name.startswith(_PAST) or _HEARD in name:
            continue
        users = port.get_target_inputs()
        chosen = ops.gather(port, beams, ops.constant(np.int64(0)))
        for user in users:
            user.replace_source_output(chosen.output(0))
        pairs[name] = _PRESENT + name.removeprefix(_PAST)
    apply_make_stateful_transformation(model, pairs)
    batch = ops.gather(
        ops.shape_of(model.input("input_ids"), output_type="i64"), ops.constant([0]), ops.constant(np.int64(0))
    )
    for node in model.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        # [batch, heads, 0, width]
        known = [size.get_length() if size.is_static else 0 for size in node.get_output_partial_shape(0)]
        shape = ops.concat([batch, ops.constant(np.array(known[1:], np.int64))], axis=0)
        empty = ops.broadcast(ops.constant(0.0, dtype=node.get_output_element_type(0)), shape)
        node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def keep_heard(model: Any) -> None:
    """Make a decoder project the encoder's answer at the first call after `reset_state` alone, and keep the keys and values.

    They are states whose first value is the projection of all of `encoder_hidden_states`: OpenVINO computes it only while the state is
    empty. Their inputs and outputs are removed from the model.
    """
    from openvino import opset13 as ops
    from openvino.op import assign, read_value
    from openvino.op.util import Variable

    taken = []
    for port in list(model.inputs):
        name = port.get_any_name()
        if not name.startswith(_PAST) or _HEARD not in name:
            continue
        taken.append(port.get_node())
        shape = port.get_partial_shape()
        # Nothing is cached yet: what asks for the cache's length gets 0.
        empty = [size.get_length() if size.is_static else 0 for size in shape]
        for user in port.get_target_inputs():
            node = user.get_node()
            if node.get_type_name() == "ShapeOf":
                known = ops.constant(np.array(empty, np.int64))
                if node.get_output_element_type(0) != known.get_element_type():
                    known = ops.convert(known, node.get_output_element_type(0))
                node.output(0).replace(known.output(0))
            elif node.get_type_name() == "Concat":
                new = node.input_value(1)
                variable = Variable(_told(name, port.get_element_type()))
                kept = read_value(new, variable)
                node.output(0).replace(kept.output(0))
                model.add_variables([variable])
                model.add_sinks([assign(kept, variable)])
            else:
                raise ValueError(f"the cache of the encoder's answer goes into a {node.get_type_name()}")
    for result in list(model.get_results()):
        names = result.input_value(0).get_names() | result.output(0).get_names()
        if any(_HEARD in known and known.startswith(_PRESENT) for known in names):
            model.remove_result(result)
    for parameter in taken:
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _told(name: str, kind: Any) -> Any:
    """A state's description, with all dimensions open: those of its first value are not always known before the graph runs."""
    from openvino import Dimension, PartialShape
    from openvino.op.util import VariableInfo

    told = VariableInfo()
    told.data_shape, told.data_type, told.variable_id = PartialShape([Dimension()] * 4), kind, name
    return told

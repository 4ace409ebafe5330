"""What a UNet makes of its latents before they meet a prompt or a person: made once for all rows that have the same latents.

Guidance draws every picture in two rows that differ in text and identity alone, so all up to the first cross-attention, the self-attention
of the most tokens in it, is the same in both.
"""

import numpy as np

ROWS = "rows"


def share_rows(model):
    """Let `latents` have fewer rows than the other inputs, in place: a new input `rows` int64 [B] says which of theirs each row is drawn from.

    Returns whether that was done; not where something else than tensors and their shapes goes from one part to the other.
    """
    from openvino import opset13 as ops

    crossing = _crossing(model)
    if not all(_is_tensor(output) or _is_shape(output) for output, _ in crossing) or not any(_is_tensor(output) for output, _ in crossing):
        return False
    rows = ops.parameter([-1], np.int64, name=ROWS)
    rows.output(0).set_names({ROWS})
    count, axis = ops.shape_of(rows), np.array(0, np.int64)
    for output, readers in crossing:
        if _is_tensor(output):
            every = ops.gather(output, rows, axis)
        else:
            every = ops.concat([count.output(0), *output.get_node().input_values()[1:]], 0)
        for reader in readers:
            reader.replace_source_output(every.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
    return True


def _crossing(model):
    """Return (output, readers) of what depends on the latents and nothing that differs between rows, for readers that do."""
    latents, rows = set(), set()
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_name() for value in node.input_values()]
        name = node.get_name()
        if node.get_type_name() == "Parameter" and "time_row" not in node.output(0).get_names():
            (latents if "latents" in node.output(0).get_names() else rows).add(name)
        for group in (latents, rows):
            if not group.isdisjoint(sources):
                group.add(name)
    found = []
    for node in model.get_ordered_ops():
        if node.get_name() in latents - rows:
            for output in node.outputs():
                readers = [r for r in output.get_target_inputs() if r.get_node().get_name() in rows]
                if readers:
                    found.append((output, readers))
    return found


def _is_tensor(output):
    """Whether it is something with a row for each of the latents'."""
    return output.get_element_type().is_real() and output.get_partial_shape().rank.get_length() >= 3


def _is_shape(output):
    """Whether it is a shape that is put together from a number of rows and more."""
    return output.get_element_type().is_integral() and output.get_node().get_type_name() == "Concat" and output.get_node().get_input_size() >= 3

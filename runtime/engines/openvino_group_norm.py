"""Group normalisation in OpenVINO graphs by our own kernel, with what comes right before and after it.

OpenVINO's convolutions in bfloat16 keep channels together, its normalisation wants them apart: two copies of every picture, around
three nodes that each read and write it. Where shapes are known, a transposition to and from what the kernel reads costs nothing.
"""

import functools

import numpy as np

from .openvino_node import channels_first, channels_last, kernel_node, reader, readers, values, with_constant


@functools.cache
def group_norm():
    """Return the class of the node: x [B,H,W,C], shift [1 or B,C] or nothing -> [B,H,W,C] (csrc/kernels/group_norm.h)."""
    from pidiff import _C

    def kernel(x, *shift_and_out, **how):
        *shift, out = shift_and_out
        x, out = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, out))
        _C.group_norm(x, shift=shift[0] if shift else None, out=out, **how)

    return kernel_node("GroupNorm", kernel)


def use_group_norm(model, kernels):
    """Give group normalisation of pictures whose shape is known to the kernel, in place, with an addition per channel before it and SiLU
    after it. kernels: Kernels."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        found = _found(node) if node.get_type_name() == "MVN" else None
        if found is None:
            continue
        last, source, shift, how = found
        inputs = [channels_last(source)]
        if shift is not None:
            inputs.append(ops.reshape(shift, np.array([0, -1]), True).output(0))
        normed = group_norm()(inputs, kernels, **how)
        last.output(0).replace(channels_first(normed.output(0)))
    model.validate_nodes_and_infer_types()


def _found(mvn):
    """Return (last node, first output [B,C,H,W], what is added to it [1 or B,C,1,1] or None, arguments of the kernel) of the normalisation
    around a node, None where it is of another kind.

    It is PyTorch's in ONNX: the groups in a row, InstanceNormalization (here MVN, * 1, + 0), the picture again, * weight, + bias.
    """
    rows, how = mvn.input_value(0).get_node(), mvn.get_attributes()
    source = rows.input_value(0) if rows.get_type_name() == "Reshape" else None
    shape = source and source.get_partial_shape()
    axes = values(mvn.input_value(1))
    plain = how["normalize_variance"] and how["eps_mode"].upper() == "INSIDE_SQRT" and axes is not None and list(axes) == [2]
    if not (plain and shape and len(shape) == 4 and all(n.is_static for n in list(shape)[1:])):
        return None
    ones, by_one = with_constant(mvn, "Multiply")
    zeros, to_zero = with_constant(by_one, "Add")
    picture = reader(to_zero)
    if picture is None or picture.get_type_name() != "Reshape" or list(picture.get_output_partial_shape(0)) != list(shape) or (ones != 1).any() or zeros.any():
        return None
    weight, weighted = with_constant(picture, "Multiply")
    bias, last = with_constant(weighted, "Add")
    channels = shape[1].get_length()
    if last is None or weight.size != channels or bias.size != channels:
        return None
    first, shift = _shifted(source, channels)
    silu = _silu(last)
    return silu or last, first, shift, {"weight": weight, "bias": bias, "num_groups": rows.get_output_partial_shape(0)[1].get_length(), "silu": silu is not None,
                                        "epsilon": how["eps"]}


def _shifted(source, channels):
    """Return (x, shift) where an output is x plus something per channel and nothing else reads it, else (output, None)."""
    add = source.get_node()
    if add.get_type_name() == "Add" and reader(add) is not None:
        for x, shift in (add.input_values(), add.input_values()[::-1]):
            shapes = x.get_partial_shape(), shift.get_partial_shape()
            if list(shapes[0]) == list(source.get_partial_shape()) and list(shapes[1])[1:] == [channels, 1, 1] and shapes[1][0] in (1, shapes[0][0]):
                return x, shift
    return source, None


def _silu(node):
    """Return the product of a node with its own sigmoid, None where something else reads it."""
    kinds = {one.get_type_name(): one for one in readers(node)}
    gate, product = kinds.get("Sigmoid"), kinds.get("Multiply")
    return product if len(kinds) == 2 and gate and product and reader(gate) == product else None

"""3 x 3 convolution in OpenVINO graphs by our own kernel, where it takes half of OpenVINO's time, with what comes before and after it.

Winograd's way needs 16 products for 36, which tells where arithmetic is the limit: in float32, and in bfloat16 on AMD's processors.
"""

import functools

import numpy as np

from .openvino_node import channels_first, channels_last, constant, kernel_node, reader, values, with_constant

PIXELS = 256            # of a picture, from here on; for fewer, reading the larger weights takes what is gained
MORE = (0.26, 0.13)     # bytes more than OpenVINO packs, per byte of all weights in float32: of Stable Diffusion's UNet in float32, in bfloat16
FASTER = (("avx2", "avx512"), ("avx512bf16",))      # than OpenVINO's, in float32 and in bfloat16


@functools.cache
def faster_kernel(rounding):
    """Return which implementation is faster than OpenVINO's on this processor, in bfloat16 (`rounding`) or float32; None if none is."""
    from pidiff import _C

    found = _C.implementation_of("low" if rounding else "auto")
    return found if found in FASTER[rounding] else None


@functools.cache
def convolution():
    """Return the class of the node: x [B,H,W,C] (or [B,H/2,W/2,C]), residual [B,H,W,O] or nothing -> [B,H,W,O] (csrc/kernels/convolution_params.h)."""
    from pidiff import _C

    def kernel(x, *residual_and_out, packed, bias, **how):
        *residual, out = residual_and_out
        _C.convolution(x, packed, bias, *residual, out=out, **how)

    return kernel_node("Convolution3x3", kernel)


def use_convolution(model, rounding, kernels, packed):
    """Give 3 x 3 convolution of pictures whose shape is known, with its bias, to the kernel, in place, where it is the faster; with a
    doubling of pixels before it and the addition of another picture after it.

    rounding: what is multiplied may be rounded to bfloat16. kernels: Kernels. packed: PackedWeights.
    """
    from pidiff import _C

    which = faster_kernel(rounding)
    for node in model.get_ordered_ops() if which else ():
        found = _found(node) if node.get_type_name() == "Convolution" else None
        if found is None:
            continue
        weight, bias, last = found
        pack = lambda: _C.pack_convolution(values(weight).reshape(weight.get_shape()), which)  # noqa: B023, E731
        how = {"packed": packed.get(node.get_friendly_name(), constant(weight).data, pack, which), "bias": bias, "implementation": which}
        small = _doubled(node.input_value(0))
        residual, last = _residual(last)
        inputs = [channels_last(x) for x in (small or node.input_value(0), residual) if x is not None]
        height, width = node.get_output_shape(0)[2:]
        made = convolution()(inputs, kernels, (height, width, len(bias)), upsample=small is not None, **how)
        last.output(0).replace(channels_first(made.output(0)))
    model.validate_nodes_and_infer_types()


def _found(node):
    """Return (output that is its weight [O,C,3,3], bias [O], last node) of a convolution that the kernel can do, with the addition of its
    bias, else None."""
    shape, how = node.get_input_partial_shape(0), node.get_attributes()
    plain = how["strides"] == how["dilations"] == how["pads_begin"] == how["pads_end"] == [1, 1] and how["auto_pad"] == "explicit"
    if not (plain and shape.is_static and len(shape) == 4 and list(node.get_input_shape(1))[2:] == [3, 3]):
        return None
    (out_channels, channels), (height, width) = list(node.get_input_shape(1))[:2], list(shape.to_shape())[2:]
    if out_channels % 64 or channels % 32 or height % 2 or width % 2 or height * width < PIXELS:
        return None
    bias, last = with_constant(node, "Add")
    if constant(node.input_value(1)) is None or last is None or not any(list(x.get_partial_shape())[-3:] == [out_channels, 1, 1] for x in last.input_values()):
        return None
    return node.input_value(1), bias, last


def _doubled(x):
    """Return the picture whose pixels an output repeats in twos, along both axes, None if it does something else."""
    node = x.get_node()
    if node.get_type_name() != "Interpolate":
        return None
    how, (small, large) = node.get_attributes(), (list(node.input_value(0).get_shape()), list(x.get_shape()))
    nearest = how["mode"], how["coordinate_transformation_mode"], how["nearest_mode"]
    doubled = [*small[:2], *(2 * n for n in small[2:])] == large and not any((*how["pads_begin"], *how["pads_end"]))
    return node.input_value(0) if doubled and nearest == ("nearest", "asymmetric", "floor") else None


def _residual(last):
    """Return (what is added to a node's picture or None, the last node of that, a division by one included)."""
    add = reader(last)
    if add is None or add.get_type_name() != "Add":
        return None, last
    others = [x for x in add.input_values() if x.get_node() != last and x.get_partial_shape() == last.get_output_partial_shape(0)]
    if len(others) != 1:
        return None, last
    ones, divided = with_constant(add, "Divide")
    return others[0], divided if ones is not None and (ones == 1).all() and divided.input_value(0).get_node() == add else add

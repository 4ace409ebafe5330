"""3 x 3 convolution in OpenVINO graphs by our own kernel, on processors where it takes half of OpenVINO's time, with what comes before and after it.

Those are AMD's with AVX-512-BF16, whose arithmetic is the limit there: Winograd's way needs 16 products for 36.
"""

import functools

import numpy as np

from .openvino_node import channels_first, channels_last, kernel_node, reader, values, with_constant

PIXELS = 256    # of a picture, from here on; for fewer, reading the larger weights takes what is gained
MORE = 0.13     # bytes more than OpenVINO packs, per byte of all weights in float32: of Stable Diffusion's UNet


@functools.cache
def is_faster():
    """Whether the kernel is faster than OpenVINO's on this processor."""
    from pidiff import _C

    weight = np.zeros((64, 32, 3, 3), np.float32)
    return _C.Convolution(weight, weight[:, 0, 0, 0].copy(), "low").implementation == "avx512bf16"


@functools.cache
def convolution():
    """Return the class of the node: x [B,H,W,C] (or [B,H/2,W/2,C]), residual [B,H,W,O] or nothing -> [B,H,W,O] (csrc/kernels/convolution_params.h)."""

    def kernel(x, *residual_and_out, convolution, threads, **how):
        *residual, out = residual_and_out
        convolution(x, *residual, out=out, threads=threads.count, **how)

    return kernel_node("Convolution3x3", kernel)


def use_convolution(model, threads, packed):
    """Give 3 x 3 convolution of pictures whose shape is known, with its bias, to the kernel, in place, where it is the faster; with a
    doubling of pixels before it and the addition of another picture after it.

    threads: KernelThreads. packed: name of a convolution -> _C.Convolution, for other compiled graphs of the same model.
    """
    from pidiff import _C

    for node in model.get_ordered_ops() if is_faster() else ():
        found = _found(node) if node.get_type_name() == "Convolution" else None
        if found is None:
            continue
        weight, bias, last = found
        name = node.get_friendly_name()
        if name not in packed:
            packed[name] = _C.Convolution(weight, bias, "low")
        small = _doubled(node.input_value(0))
        residual, last = _residual(last)
        inputs = [channels_last(x) for x in (small or node.input_value(0), residual) if x is not None]
        height, width = node.get_output_shape(0)[2:]
        made = convolution()(inputs, shape=(height, width, len(bias)), convolution=packed[name], threads=threads, upsample=small is not None)
        last.output(0).replace(channels_first(made.output(0)))
    model.validate_nodes_and_infer_types()


def _found(node):
    """Return (weight [O,C,3,3], bias [O], last node) of a convolution that the kernel can do, with the addition of its bias, else None."""
    shape, how = node.get_input_partial_shape(0), node.get_attributes()
    plain = how["strides"] == how["dilations"] == how["pads_begin"] == how["pads_end"] == [1, 1] and how["auto_pad"] == "explicit"
    if not (plain and shape.is_static and len(shape) == 4 and list(node.get_input_shape(1))[2:] == [3, 3]):
        return None
    (out_channels, channels), (height, width) = list(node.get_input_shape(1))[:2], list(shape.to_shape())[2:]
    if out_channels % 64 or channels % 32 or height % 2 or width % 2 or height * width < PIXELS:
        return None
    weight = values(node.input_value(1))
    bias, last = with_constant(node, "Add")
    if weight is None or last is None or not any(list(x.get_partial_shape())[-3:] == [out_channels, 1, 1] for x in last.input_values()):
        return None
    return weight.reshape(out_channels, channels, 3, 3), bias, last


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

"""Convolution in OpenVINO graphs by our own kernel, with what comes before and after it.

Winograd's way needs 16 products for 36 and half of OpenVINO's time, where arithmetic is the limit: in float32, and in bfloat16 on AMD's
processors. Where it cannot be had, ours takes as long as OpenVINO's; but OpenVINO packs its weights for every graph of every process anew,
and ours are mapped.
"""

import functools
from dataclasses import dataclass

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
    """Return the class of the node: x [B,H,W,C], residual [B,H',W',O] or nothing -> [B,H',W',O] (csrc/kernels/convolution_params.h)."""
    from pidiff import _C

    def kernel(x, *residual_and_out, packed, bias, **how):
        *residual, out = residual_and_out
        _C.convolution(x, packed, bias, *residual, out=out, **how)

    return kernel_node("OwnConvolution", kernel)


def use_convolution(model, rounding, kernels, packed, lean=False):
    """Give convolution of pictures whose size is known, with its bias, to the kernel, in place, where it does not take longer; with a
    doubling of pixels before it and the addition of another picture after it.

    rounding: what is multiplied may be rounded to bfloat16. kernels: Kernels. packed: PackedWeights. lean: by the way of the smaller weights.
    """
    from pidiff import _C

    which = faster_kernel(rounding)
    for node in model.get_ordered_ops() if which else ():
        found = _found(node, lean) if node.get_type_name() == "Convolution" else None
        if found is None or not rounding and found.method == "direct":
            continue
        pack = lambda: _C.pack_convolution(values(found.weight).reshape(found.weight.get_shape()), which, found.method)  # noqa: B023, E731
        weights = packed.get(node.get_friendly_name(), constant(found.weight).data, pack, which, found.method)
        small = _doubled(node.input_value(0))
        residual, last = added(found.last)
        inputs = [channels_last(x) for x in (small or node.input_value(0), residual) if x is not None]
        height, width = (n.get_length() for n in list(node.get_output_partial_shape(0))[2:])
        made = convolution()(inputs, kernels, (height, width, len(found.bias)), packed=weights, bias=found.bias, implementation=which,
                             upsample=small is not None, stride=found.stride)
        last.output(0).replace(channels_first(made.output(0)))
    model.validate_nodes_and_infer_types()


@dataclass
class _Found:
    weight: object      # output that is [O,C,K,K]
    bias: np.ndarray    # [O]
    last: object        # node, the addition of the bias
    method: str
    stride: int


def _found(node, lean):
    """Return the _Found of a convolution that the kernel can do, else None."""
    shape, how = node.get_input_partial_shape(0), node.get_attributes()
    if not (len(shape) == 4 and all(n.is_static for n in list(shape)[1:]) and how["auto_pad"] == "explicit" and how["dilations"] == [1, 1]):
        return None
    (outputs, channels, *kernel), (height, width), stride = list(node.get_input_shape(1)), (n.get_length() for n in list(shape)[2:]), how["strides"][0]
    pads = [kernel[0] // 2] * 2
    plain = kernel in ([1, 1], [3, 3]) and how["strides"] in ([1, 1], [2, 2]) and how["pads_begin"] == how["pads_end"] == pads
    if not plain or outputs % 64 or channels % 32 or stride == 2 and (height % 2 or width % 2):
        return None
    bias, last = with_constant(node, "Add")
    if constant(node.input_value(1)) is None or last is None or not any(list(x.get_partial_shape())[-3:] == [outputs, 1, 1] for x in last.input_values()):
        return None
    tiled = not lean and kernel == [3, 3] and stride == 1 and height % 2 == width % 2 == 0 and height * width >= PIXELS
    return _Found(node.input_value(1), bias, last, "winograd" if tiled else "direct", stride)


def _doubled(x):
    """Return the picture whose pixels an output repeats in twos, along both axes, None if it does something else."""
    node = x.get_node()
    if node.get_type_name() != "Interpolate":
        return None
    how, (small, large) = node.get_attributes(), (list(value.get_partial_shape()) for value in (node.input_value(0), x))
    nearest = how["mode"], how["coordinate_transformation_mode"], how["nearest_mode"]
    doubled = all(n.is_static for n in small[1:]) and [small[1], *(2 * n.get_length() for n in small[2:])] == large[1:] and not any((*how["pads_begin"], *how["pads_end"]))
    return node.input_value(0) if doubled and nearest == ("nearest", "asymmetric", "floor") else None


def added(last):
    """Return (what is added to a node's picture or None, the last node of that, a division by one included)."""
    add = reader(last)
    if add is None or add.get_type_name() != "Add":
        return None, last
    others = [x for x in add.input_values() if x.get_node() != last and x.get_partial_shape() == last.get_output_partial_shape(0)]
    if len(others) != 1:
        return None, last
    ones, divided = with_constant(add, "Divide")
    return others[0], divided if ones is not None and (ones == 1).all() and divided.input_value(0).get_node() == add else add

"""Linear layers in OpenVINO graphs by our own kernel, with the addition of bias and of another tensor after it.

It takes as long as OpenVINO's; but OpenVINO packs its weights for every graph of every process anew, and ours are mapped.
"""

import functools

import numpy as np

from .openvino_convolution import added, faster_kernel
from .openvino_node import constant, kernel_node, values, with_constant


@functools.cache
def linear():
    """Return the class of the node: x [B,S,C], residual [B,S,O] or nothing -> [B,S,O] (csrc/kernels/convolution_params.h)."""
    from pidiff import _C

    def kernel(x, *residual_and_out, packed, bias, **how):
        x, *residual, out = (a.reshape(1, 1, -1, a.shape[-1]) for a in (x, *residual_and_out))
        _C.convolution(x, packed, bias, *residual, out=out, **how)

    return kernel_node("Linear", kernel)


def use_linear(model, rounding, kernels, packed):
    """Give linear layers of as many rows as are known to the kernel, in place, where it does not take longer.

    rounding: what is multiplied may be rounded to bfloat16. kernels: Kernels. packed: PackedWeights.
    """
    from pidiff import _C

    which = faster_kernel(rounding)
    for node in model.get_ordered_ops() if which and rounding else ():
        found = _found(node) if node.get_type_name() == "MatMul" else None
        if found is None:
            continue
        weight, turned, bias, last = found
        pack = lambda: _C.pack_convolution(_rows(weight, turned)[..., None, None], which, "direct")  # noqa: B023, E731
        how = {"packed": packed.get(node.get_friendly_name(), constant(weight).data, pack, which, "direct", turned), "implementation": which}
        residual, last = added(last)
        inputs = [x for x in (node.input_value(0), residual) if x is not None]
        made = linear()(inputs, kernels, (node.get_output_partial_shape(0)[1].get_length(), len(bias)), bias=bias, **how)
        last.output(0).replace(made.output(0))
    model.validate_nodes_and_infer_types()


def _found(node):
    """Return (output with the weights, whether they are [O,C] and not [C,O], bias [O], last node) of a product that the kernel can do, with the
    addition of its bias where it has one, else None."""
    x, how = node.get_input_partial_shape(0), node.get_attributes()
    weight, turned = node.input_value(1), how["transpose_b"]
    if weight.get_node().get_type_name() == "Transpose" and list(values(weight.get_node().input_value(1))) == [1, 0]:
        weight, turned = weight.get_node().input_value(0), not turned
    if constant(weight) is None or len(weight.get_partial_shape()) != 2 or len(x) != 3 or x[1].is_dynamic or how["transpose_a"]:
        return None
    outputs, channels = list(weight.get_shape())[::1 if turned else -1]
    if outputs % 64 or channels % 32:
        return None
    bias, last = with_constant(node, "Add")
    if last is None or bias.size != outputs or not any(list(one.get_partial_shape())[-1:] == [outputs] for one in last.input_values() if constant(one) is not None):
        bias, last = np.zeros(outputs, np.float32), node
    return weight, turned, bias, last


def _rows(weight, turned):
    """Return weights as [O,C] in float32."""
    whole = values(weight).reshape(weight.get_shape())
    return whole if turned else np.ascontiguousarray(whole.T)

"""Long self-attention in OpenVINO graphs by our own kernels: OpenVINO's own takes up to twice as long for thousands of keys."""

import functools
import platform

from .openvino_node import kernel_node

KEYS = 1024  # from here on; for fewer, handing tensors over costs as much as is gained


@functools.cache
def long_attention():
    """Return the class of the node: softmax(q k^T / sqrt(d)) v per head, q [B,S,C], k and v [B,T,C] -> [B,S,C] (csrc/kernels/attention.h)."""
    from pidiff import _C

    return kernel_node("LongAttention", lambda q, k, v, out, **how: _C.attention(q, k, v, out=out, **how))


def use_attention(model, rounding, kernels):
    """Give attention over `KEYS` keys and more, where their number is known, to the kernels, in place.

    rounding: operands may be rounded to bfloat16. kernels: Kernels.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return      # NEON's were never timed on such a processor
    implementation = "low" if rounding else "auto"
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and _long_and_plain(node):
            sources, joined = [_before_split(node.input_value(i)) for i in range(3)], _after_join(node)
            if joined is not None and None not in sources:
                heads = node.get_output_partial_shape(0)[1].get_length()
                made = long_attention()(sources, kernels, num_heads=heads, implementation=implementation)
                joined.output(0).replace(made.output(0))
    model.validate_nodes_and_infer_types()


def _long_and_plain(node):
    """Whether attention gains, and has neither a mask nor a scale of its own."""
    tokens = node.input_value(1).get_partial_shape()[2]
    return tokens.is_static and tokens.get_length() >= KEYS and node.get_input_size() == 3 and not node.get_attributes()["causal"]


def _before_split(heads):
    """Return the output [B,S,C] that was split into [B,H,S,d], None where that was done in another way."""
    swap = heads.get_node()
    split = swap.input_value(0).get_node() if _swaps(swap) else None
    return split.input_value(0) if split is not None and split.get_type_name() == "Reshape" else None


def _after_join(attention):
    """Return the node that joins the heads of attention's result to [B,S,C], None where something else is done with it."""
    swap = _only_reader(attention)
    joined = _only_reader(swap) if swap is not None and _swaps(swap) else None
    return joined if joined is not None and joined.get_type_name() == "Reshape" and len(joined.get_output_partial_shape(0)) == 3 else None


def _swaps(node):
    """Whether a node swaps the axes of tokens and heads."""
    if node.get_type_name() != "Transpose" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    return list(node.input_value(1).get_node().data) == [0, 2, 1, 3]


def _only_reader(node):
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None

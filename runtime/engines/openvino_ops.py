"""The nodes of the ONNX domain `pidiff` in OpenVINO's own operators, so that a fused bundle runs there as it is.

The formulas are those of csrc/kernels/attention.h; OpenVINO finds and fuses the attention in them. Shapes are computed
in the graph, so that one conversion serves every batch, picture size and number of people.
"""

import functools
import sys

import numpy as np

from ..errors import EngineError, require

MINIMUM = (2025, 2)  # 2025.1 computes wrong pictures, 2024 cannot read all graphs


@functools.cache
def core():
    """Return the process's openvino.Core, which reads these nodes and maps weights into memory instead of loading them."""
    # Importing openvino reports that to a web service, unless this package cannot be imported: nothing leaves the machine.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    version = openvino.__version__.split("-")[0]
    require(tuple(map(int, version.split(".")[:2])) >= MINIMUM, "openvino", "be version 2025.2 or newer", version, EngineError)
    made = openvino.Core()
    made.set_property({"ENABLE_MMAP": True})
    made.add_extension([ConversionExtension("Attention", "pidiff", _attention),
                        ConversionExtension("IdentityAttention", "pidiff", _identity_attention)])
    return made


def _attention(node):
    """q [B,S,C], k [B,T,C], v [B,T,C]; num_heads -> [B,S,C]"""
    return [_text_attention(node).output(0)]


def _identity_attention(node):
    """q, k, v, x [B,S,C], a [B,P,C,H*T'], v_id [B,P,T,C], mask [B,P,S], scale [B]; num_heads, has_null, residual
    -> out [B,S,C], id_mass [B,P,S]"""
    from openvino import opset13 as ops

    heads, has_null = node.get_attribute("num_heads"), node.get_attribute("has_null")
    x, a, v_id, mask, scale = (node.get_input(i) for i in range(3, 8))
    h = _text_attention(node)
    y = h if node.get_attribute("residual") else x
    # Positions come last, so that what is done to each of the few tokens is done to many positions at once.
    logits = ops.unsqueeze(ops.matmul(a, ops.unsqueeze(y, _ints(1)), True, True), _ints(2))           # [B,P,1,H*T',S]
    p = ops.softmax(ops.convert(_reshape(logits, 0, 0, heads, -1, 0), "f32"), 3)                      # [B,P,H,T',S]
    if has_null:
        p = ops.slice(p, _ints(0), _ints(-1), _ints(1), _ints(3))   # the null key, last, gives nothing
    p = ops.convert_like(p, y)
    mass = ops.reduce_mean(ops.reduce_sum(p, _ints(3), False), _ints(2), False)
    if not has_null:
        mass = ops.multiply(mass, ops.convert_like(ops.constant(0.0), mass))
    p = ops.multiply(p, ops.unsqueeze(ops.multiply(mask, ops.unsqueeze(scale, _ints(1, 2))), _ints(2, 3)))
    # All people's tokens in a row: the product with their values is the sum over people.
    p = _reshape(ops.transpose(p, _ints(0, 2, 1, 3, 4)), 0, 0, 1, -1, 0)                              # [B,H,1,P*T,S]
    v_id = ops.transpose(_reshape(v_id, 0, 0, 0, heads, -1), _ints(0, 3, 1, 2, 4))                    # [B,H,P,T,d]
    mix = ops.matmul(p, _reshape(v_id, 0, 0, 1, -1, 0), True, False)                                  # [B,H,1,S,d]
    mix = _reshape(ops.transpose(ops.squeeze(mix, _ints(2)), _ints(0, 2, 1, 3)), 0, 0, -1)            # [B,S,C]
    return [ops.add(h, mix).output(0), mass.output(0)]


def _text_attention(node):
    """softmax(q k^T / sqrt(d)) v per head, [B,S,C]."""
    from openvino import opset13 as ops

    heads = node.get_attribute("num_heads")
    q, k, v = (ops.transpose(_reshape(node.get_input(i), 0, 0, heads, -1), _ints(0, 2, 1, 3)) for i in range(3))
    return _reshape(ops.transpose(ops.scaled_dot_product_attention(q, k, v), _ints(0, 2, 1, 3)), 0, 0, -1)


def _reshape(x, *shape):
    """Reshape as ONNX does: 0 keeps the size of an axis."""
    from openvino import opset13 as ops

    return ops.reshape(x, _ints(*shape), True)


def _ints(*values):
    return np.array(values, np.int64)

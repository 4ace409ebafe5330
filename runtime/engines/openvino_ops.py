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
    logits = _reshape(ops.matmul(ops.unsqueeze(y, _ints(1)), a, False, False), 0, 0, 0, heads, -1)   # [B,P,S,H,T']
    p = ops.softmax(ops.convert(logits, "f32"), -1)
    if has_null:
        p = ops.slice(p, _ints(0), _ints(-1), _ints(1), _ints(-1))  # the null key, last, gives nothing
    p = ops.transpose(ops.convert_like(p, y), _ints(0, 1, 3, 2, 4))                                  # [B,P,H,S,T]
    v_id = ops.transpose(_reshape(v_id, 0, 0, 0, heads, -1), _ints(0, 1, 3, 2, 4))                   # [B,P,H,T,d]
    mix = ops.transpose(ops.matmul(p, v_id, False, False), _ints(0, 1, 3, 2, 4))
    mix = ops.multiply(_reshape(mix, 0, 0, 0, -1), ops.unsqueeze(mask, _ints(-1)))                   # [B,P,S,C]
    mix = ops.multiply(ops.reduce_sum(mix, _ints(1), False), ops.unsqueeze(scale, _ints(1, 2)))
    mass = ops.reduce_mean(ops.reduce_sum(p, _ints(-1), False), _ints(2), False)
    if not has_null:
        mass = ops.multiply(mass, ops.convert_like(ops.constant(0.0), mass))
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

"""OpenVINO IR networks in PyTorch against OpenVINO itself, on a network with every operation that is read."""

from xml.etree import ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ov = pytest.importorskip("openvino")

from pidiff.data.ir import OPERATIONS, IrNetwork


def constant(value, dtype=np.float32):
    return ov.opset13.constant(np.asarray(value, dtype))


def network(rng):
    """style [1, 6] -> [1, 4, 8, 8]: a modulated synthesis block in small, with shapes computed on the way."""
    o, f = ov.opset13, lambda *shape: constant(rng.standard_normal(shape))
    rows = o.parameter([1, 6], np.float32, name="style")
    norm = o.power(o.add(o.reduce_mean(o.power(rows, constant([[2.0]])), constant([1], np.int64), True), constant([[1e-3]])), constant([[-0.5]]))
    style = o.prelu(o.matmul(o.multiply(rows, norm), f(8, 6), False, True), constant([0.2]))
    style.set_friendly_name("style_layer")
    count = o.unsqueeze(o.gather(o.shape_of(rows, "i64"), constant(0, np.int64), constant(0, np.int64)), constant([0], np.int64))
    ones = constant([1], np.int64)
    shape = o.concat([count, ones, ones, ones], 0)
    base = o.broadcast(f(1, 8, 4, 4), o.concat([ones, ones, ones, ones], 0), broadcast_spec="BIDIRECTIONAL")
    x = o.multiply(o.tile(base, shape), o.reshape(style, o.concat([count, constant([8, 1, 1], np.int64)], 0), True))
    pad = dict(strides=[1, 1], pads_begin=[1, 1], pads_end=[1, 1], dilations=[1, 1])
    x = o.convolution(x, f(8, 8, 3, 3), **pad)
    left, right = o.variadic_split(x, constant(1, np.int64), constant([4, 4], np.int64)).outputs()
    up = o.group_convolution_backprop_data(left, f(4, 1, 1, 2, 1), strides=[2, 1], pads_begin=[0, 0], pads_end=[0, 0], dilations=[1, 1],
                                           output_padding=[0, 0])
    up = o.group_convolution_backprop_data(up, f(4, 1, 1, 1, 2), strides=[1, 2], pads_begin=[0, 0], pads_end=[0, 0], dilations=[1, 1],
                                           output_padding=[0, 0])
    deep = o.group_convolution(up, f(4, 1, 1, 3, 3), **pad)
    mean = o.reduce_mean(right, constant([2, 3], np.int64), True)
    flat = o.squeeze(o.squeeze(mean, constant([3], np.int64)), constant([2], np.int64))
    back = o.reshape(flat, o.concat([count, constant([4, 1, 1], np.int64)], 0), True)
    return ov.Model([o.result(o.add(deep, back))], [rows], "block")


def test_ir_networks_give_what_openvino_gives(tmp_path, rng):
    model = network(rng)
    ov.save_model(model, tmp_path / "block.xml", compress_to_fp16=False)
    used = {layer.get("type") for layer in ElementTree.parse(tmp_path / "block.xml").getroot().find("layers")}
    assert used == set(OPERATIONS) | {"Parameter", "Const", "Result"}
    rows = rng.standard_normal((3, 6)).astype(np.float32)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    want = np.concatenate([compiled(row[None])[0] for row in rows])
    with torch.no_grad():
        got = IrNetwork(tmp_path / "block.xml")(torch.from_numpy(rows))
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-4, atol=1e-5)
        assert IrNetwork(tmp_path / "block.xml", "style_layer")(torch.from_numpy(rows)).shape == (3, 8)
    with pytest.raises(ValueError, match="block.xml must have a layer nowhere"):
        IrNetwork(tmp_path / "block.xml", "nowhere")


def test_operations_that_are_not_known_are_refused(tmp_path):
    x = ov.opset13.parameter([1, 6], np.float32)
    ov.save_model(ov.Model([ov.opset13.result(ov.opset13.erf(x))], [x], "other"), tmp_path / "other.xml")
    with pytest.raises(ValueError, match="operations of an IR network must be among .*, got Erf"):
        IrNetwork(tmp_path / "other.xml")

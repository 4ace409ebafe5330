"""int8 in QDQ form: QuantizeLinear and DequantizeLinear around the layers of a graph, which ONNX Runtime, OpenVINO and TensorRT
turn into integer arithmetic.

A layer is a Conv or MatMul whose weight lies in the bundle, named as its module in the checkpoint. Weights get one scale per
output channel; what goes into a layer, and what comes out of a Conv, gets one scale for all of it. All are symmetric with
zero point 0, because TensorRT takes no other; on `mini` that costs little. Attention stays as it is. In a float16 graph scales
are in float16, too, so that nothing is cast around a layer; its float32 islands stay as they are. (The quantisers of
ONNX Runtime 1.32 and NNCF 3.4 were tried: both stop at a graph with our custom nodes.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from .to_onnx import IR_TYPES
from .weights import stored_tensors, write_safetensors

INT8_FILE = "unet/int8.safetensors"
HIGHEST = 127
SWITCH = "quantized_layers"         # input of `with_switches`, bool [number of layers]
_TINY = 1e-5                        # divided by HIGHEST, float16 still holds it
OPSET_HALF = 19                    # the first in which scales may be in float16; what else the graphs hold means the same in it


@dataclass(frozen=True)
class Layer:
    """A node whose weight is stored: `weight` is the initializer, `transposed` tells that the node takes it transposed. half: it
    computes in float16, else in float32."""

    name: str
    node: ir.Node
    weight: ir.Value
    transposed: bool
    half: bool

    @property
    def axis(self) -> int:
        """Of the output channels, in the weight as the node takes it."""
        return 0 if self.node.op_type == "Conv" else 1

    def quantized(self) -> dict[str, torch.Tensor]:
        """The weight as the node takes it, in int8, and its scales in the node's type, under the names that they are stored by."""
        value = torch.from_numpy(self.weight.const_value.numpy().astype(np.float32))
        value = value.T if self.transposed else value
        largest = value.abs().amax([i for i in range(value.ndim) if i != self.axis], keepdim=True)
        scale = (largest.clamp_min(_TINY) / HIGHEST).to(torch.float16 if self.half else torch.float32)
        rounded = (value / scale.float()).round().clamp(-HIGHEST, HIGHEST)      # a scale in float16 may have been rounded down
        return {f"{self.name}.weight": rounded.to(torch.int8), f"{self.name}.scale": scale.flatten()}


def find_layers(model: ir.Model, root: Path, file: str, half: bool) -> dict[str, Layer]:
    """The layers of a graph whose weights lie in the bundle's safetensors file `file`, by name, in the order of the graph. half: those of a
    float16 graph that compute in float16."""
    keys = {tensor.offset: key for key, tensor in stored_tensors(root, file).items()}
    found = {}
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul") or node.domain:
            continue
        value, transposed, single = node.inputs[1], False, False
        while (producer := value.producer()) is not None and producer.op_type in ("Cast", "Transpose"):
            transposed ^= producer.op_type == "Transpose"
            single |= producer.op_type == "Cast"        # of what is stored in float16
            value = producer.inputs[0]
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == file and not (half and single):
            name = keys[tensor.offset].removesuffix(".weight")
            found[name] = Layer(name, node, value, transposed, half)
    return found


def store_weights(root: Path, layers: Iterable[Layer]) -> None:
    """Write the int8 weights of layers, and their scales, to INT8_FILE."""
    write_safetensors(root / INT8_FILE, {k: v for layer in layers for k, v in layer.quantized().items()}, None, "int8")


def with_largest(model: ir.Model, layers: dict[str, Layer]) -> dict[str, tuple[str, str]]:
    """Add outputs to a graph: the largest |x| in and out of each layer. Returns their names by layer."""
    made: dict[ir.Value, ir.Value] = {}

    def largest(x: ir.Value) -> str:
        if x not in made:
            wide = ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT)})
            absolute = ir.node("Abs", wide.outputs)
            made[x] = _output(ir.node("ReduceMax", absolute.outputs, {"keepdims": 0}), f"largest_{len(made)}")
            made[x].type, made[x].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            model.graph.extend([wide, absolute, made[x].producer()])
            model.graph.outputs.append(made[x])
        return made[x].name

    return {name: (largest(layer.node.inputs[0]), largest(layer.node.outputs[0])) for name, layer in layers.items()}


def quantize(model: ir.Model, root: Path, layers: dict[str, Layer], ranges: dict[str, tuple[float, float]], switches: bool = False):
    """Put layers of a graph into QDQ form, in place; `store_weights` has stored theirs.

    ranges: layer -> largest |x| in and out of it. switches: keep the float layers too, and let the bool input SWITCH choose layer
    by layer, in the order of `layers`; for measuring.
    """
    graph, stored = model.graph, stored_tensors(root, INT8_FILE)
    rounded: dict[ir.Value, ir.Node] = {}        # serves all layers that take the same tensor
    switch = ir.Value(name=SWITCH, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(layers)]))
    if switches:
        graph.inputs.append(switch)
    for index, (name, layer) in enumerate(layers.items()):
        node, y = layer.node, layer.node.outputs[0]
        before, after = [], []
        if node.inputs[0] not in rounded:
            rounded[node.inputs[0]] = _round(graph, node.inputs[0], ranges[name][0], f"{name}.input", layer.half)
            before.append(rounded[node.inputs[0]])
        # Each layer has a DequantizeLinear of its own: ONNX Runtime computes a MatMul that shares one in float.
        before += [_back(rounded[node.inputs[0]], f"{name}.input.float"), _weight(graph, root, layer, stored)]
        copy = ir.node(node.op_type, [*(n.outputs[0] for n in before[-2:]), *node.inputs[2:]], node.attributes, name=f"{name}.int8")
        after.append(copy)
        result = _output(copy, f"{name}.output")
        # ONNX Runtime has no integer Conv with a float result. Not at the graph's end, whose numbers are used as they are.
        if node.op_type == "Conv" and not y.is_graph_output():
            after.append(_round(graph, result, ranges[name][1], f"{name}.output", layer.half))
            after.append(_back(after[-1], f"{name}.output.float"))
            result = after[-1].outputs[0]
        if switches:
            at = _constant(graph, f"{name}.index", np.array(index, np.int64))
            chosen = ir.node("Gather", [switch, at])
            after += [chosen, ir.node("Where", [chosen.outputs[0], result, y])]
            result = after[-1].outputs[0]
        _take_place(graph, y, result, after)
        graph.insert_before(node, before)
        graph.insert_after(node, after)
    if any(layer.half for layer in layers.values()):
        model.opset_imports[""] = max(OPSET_HALF, model.opset_imports[""])
    common.RemoveUnusedNodesPass()(model)


def write_quantized(path: Path, root: Path, file: str, half: bool, ranges: dict[str, tuple[float, float]]) -> None:
    """Replace an .onnx file by the same graph with the layers of `ranges` in QDQ form; `file` and `half`: see `find_layers`."""
    model = ir.load(path)
    quantize(model, root, {n: layer for n, layer in find_layers(model, root, file, half).items() if n in ranges}, ranges)
    ir.save(model, path)


def _take_place(graph: ir.Graph, old: ir.Value, new: ir.Value, but: list[ir.Node]) -> None:
    """Give `new` to all that took `old`, the graph's outputs included, except the nodes in `but`."""
    for node, index in list(old.uses()):
        if node not in but:
            node.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is old:
            new.type, new.shape = old.type, old.shape
            name, old.name = old.name, f"{old.name}.float"
            new.name, graph.outputs[index] = name, new


def _weight(graph: ir.Graph, root: Path, layer: Layer, stored: dict) -> ir.Node:
    """The node that gives a layer its int8 weight as float."""
    values = []
    for key in (f"{layer.name}.weight", f"{layer.name}.scale"):
        entry = stored[key]
        tensor = ir.ExternalTensor(entry.file, entry.offset, entry.length, IR_TYPES[entry.dtype], shape=ir.Shape(entry.shape), name=f"{key}.int8",
                                   base_dir=root)
        values.append(_initializer(graph, tensor))
    return _named(ir.node("DequantizeLinear", values, {"axis": layer.axis}), f"{layer.name}.weight.float")


def _round(graph: ir.Graph, x: ir.Value, largest: float, name: str, half: bool) -> ir.Node:
    """The node that turns a tensor into int8."""
    scale = _constant(graph, f"{name}.scale", np.array(max(largest, _TINY) / HIGHEST, np.float16 if half else np.float32))
    zero = _constant(graph, f"{name}.zero", np.array(0, np.int8))
    return _named(ir.node("QuantizeLinear", [x, scale, zero]), f"{name}.int8")


def _back(rounded: ir.Node, name: str) -> ir.Node:
    """A node that turns it into float again."""
    return _named(ir.node("DequantizeLinear", [rounded.outputs[0], *rounded.inputs[1:]]), name)


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    return _initializer(graph, ir.tensor(value, name=name))


def _initializer(graph: ir.Graph, tensor) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _named(node: ir.Node, name: str) -> ir.Node:
    node.name = node.outputs[0].name = name
    return node


def _output(node: ir.Node, name: str) -> ir.Value:
    node.outputs[0].name = name
    return node.outputs[0]

"""Which layer a NaN or an infinity comes from: a graph that failed runs once more, in ONNX Runtime on the processor, with the
inputs that it had, and gives the result of every layer too. Where memory is short it gives those of blocks, and runs again for the
layers of the first bad one; a number that overflows inside a block and is small again at its end is missed then.

Layers are found by the names of their weights. A graph's file is read and extended as the protobuf message that it is (onnx.proto),
since the edge device has no package `onnx`: a second message appended to a first adds to its lists.
"""

import re

import numpy as np

from .engines.onnxruntime import run_for
from .errors import NotFinite, PidiffError
from .memory import MIB, Predictor, give_back

HALF_MAX = 65504.0
# Fields of onnx.proto: of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto and ValueInfoProto.
_GRAPH, _NODE, _INITIALIZER, _OUTPUT = 7, 1, 5, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_TYPE, _ATTRIBUTE, _INTEGER, _TENSOR_NAME, _VALUE_NAME = 1, 2, 4, 5, 3, 8, 1
_TO_FLOAT32 = 1
_MODEL = re.compile(r"^.*?\b(?:unet|vae)\.")                                        # the module that a graph is made of
_BLOCK = re.compile(r"((?:\w+\.)??(?:down_blocks\.\d+|up_blocks\.\d+|mid_block))(?:\.(\w+\.\d+))?")


def located(bundle, error, room, threads=None):
    """Return a NotFinite like `error` that names the layer where one is found, else says why none is. room(): bytes that this may
    take, None where that is not known. Never raises: the error itself is what matters."""
    # Tracebacks hold the loop, which holds its engine: without them its memory is free for the second session.
    error.with_traceback(None).__context__ = error.__cause__ = None
    try:
        reason = _find(bundle, error, room, threads)
    except Exception as e:
        reason = f"the layer is not known ({' '.join(str(e).split())[:200]})"
    return NotFinite(error.what, error.graph, error.inputs, f"{reason}: the model's weights or the inputs are damaged, or overflow "
                     "in half precision")


def _find(bundle, error, room, threads):
    if error.inputs is None:
        raise PidiffError("the inputs of the step are lost")
    bad = [name for name, array in error.inputs.items() if not np.isfinite(array).all()]
    if bad:
        return f"NaN or infinity is in the input {bad[0]} of {error.graph}"
    at_once = _fits(bundle, error, room)
    spec = bundle.graph(error.graph)
    data = bundle.file(spec.file).read_bytes()
    values, known = layer_values(data), {t.name for t in spec.outputs}

    def run(names):
        longer = with_outputs(data, [n for n in names if n not in known])
        return run_for(bundle.file(spec.file), longer, error.inputs, names, threads, bundle.manifest.attention == "fused")

    return first_layer(values, run, at_once)


def _fits(bundle, error, room):
    """Whether the results of all layers fit into memory together. PidiffError if those of the blocks do not."""
    rows, _, *size = error.inputs["latents"].shape
    people = error.inputs["id_fold"].shape[1] if "id_fold" in error.inputs else 1
    blocks, layers = (Predictor(bundle).diagnosis(error.graph, rows, people, size, whole) for whole in (False, True))
    give_back()
    free = room()
    if free is not None and blocks > free:
        raise PidiffError(f"finding it takes {blocks // MIB} MiB, {free // MIB} MiB are free")
    return free is None or layers <= free


def first_layer(values, run, at_once=True):
    """Return what to say about the first layer whose result is not finite. values: those of `layer_values`; run(names):
    arrays; at_once: one run for all layers."""
    part_of = lambda layer: split(layer)[:2]
    layer, result, largest = _first_bad(values, (lambda layer: layer) if at_once else part_of, run)
    if layer is None:
        value, (block, _, _) = largest[0], split(largest[1])
        return f"on the processor no layer overflows, the largest value is {value:.3g} in {block} (float16 ends at {HALF_MAX:.0f})"
    if not at_once:
        layer, result, _ = _first_bad([v for v in values if part_of(v[0]) == layer], lambda layer: layer, run)
    block, _, rest = split(layer)
    return f"{'numbers overflow' if np.isinf(result).any() else 'NaN comes'} first in {block}" + (f" ({rest})" if rest else "")


def _first_bad(values, key, run):
    """Return (the key of the first group of layers whose last value is not finite, that array, None), or (None, None, (largest
    value, its layer))."""
    ends = {}
    for layer, name in values:
        ends.pop(key(layer), None)
        ends[key(layer)] = layer, name      # in the order of their ends
    largest = 0.0, ""
    for group, array in zip(ends, run([name for _, name in ends.values()])):
        if not np.isfinite(array).all():
            return group, array, None
        largest = max(largest, (float(np.abs(array).max(initial=0)), ends[group][0]))
    return None, None, largest


def split(layer):
    """Return (block, part of it, layer without its block) of a layer: "down_blocks.0", "attentions.1", "attentions.1.proj_in"."""
    found = _BLOCK.match(layer)
    if found:
        return found[1], found[2] or layer, layer[found.end(1) + 1:]
    block = ".".join(layer.split(".")[:2])
    return block, "", layer[len(block) + 1:]


def layer_values(data):
    """Return (layer, name of a value) for everything that the nodes of a .onnx file compute from its inputs, in their order.

    A node belongs to the layer whose weight it reads, else to that of the node before it. But what a norm does before it reads its
    weight belongs to the norm: a cast to float32, where the processor still has what float16 has not, InstanceNormalization.
    Without named weights the layer is the value's own name, and what follows the first output is of the last one.
    """
    graph = b"".join(value for field, value in _fields(data) if field == _GRAPH)
    nodes, weights, ends = [], {}, []
    for field, value in _fields(graph):
        if field == _NODE:
            nodes.append(_strings(value))
        elif field == _INITIALIZER:
            name = next(v.decode() for f, v in _fields(value) if f == _TENSOR_NAME)
            weights[name] = _layer_of(name)
        elif field == _OUTPUT:
            ends.append(next(v.decode() for f, v in _fields(value) if f == _VALUE_NAME))
    found, current, ahead = [], "", []
    for inputs, outputs, kind in nodes:
        layers = [weights[i] for i in inputs if i in weights]
        if kind in ("Shape", "Size", "Constant") or len(layers) == len(inputs):      # nothing that depends on the inputs' numbers
            weights |= dict.fromkeys(outputs, next(filter(None, layers), ""))
            continue
        named = next(filter(None, layers), "")
        if not named and (ahead or kind in ("InstanceNormalization", "Cast to float32")):
            ahead += outputs
            continue
        current = named or current
        found += [(current or name, name) for name in (*ahead, *outputs)]
        ahead = []
        if set(outputs) & set(ends):
            current = ends[-1]
    return found + [(current or name, name) for name in ahead]


def with_outputs(data, names):
    """Return a .onnx file's bytes with more of its values as outputs."""
    values = b"".join(_field(_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return data + _field(_GRAPH, values)


def _layer_of(weight):
    """The layer of a weight: "unet.conv_in.weight" is of conv_in; "" for constants, which have no dotted names."""
    layer = _MODEL.sub("", weight).rpartition(".")[0]
    return layer.removesuffix(".input").removesuffix(".output")      # of int8 graphs: scales of what goes in and out


def _strings(node):
    """(inputs, outputs, type) of a NodeProto; a cast's type says whether it is one to float32."""
    inputs, outputs, kind, integers = [], [], "", []
    for field, value in _fields(node):
        if field == _NODE_TYPE:
            kind = value.decode()
        elif field == _ATTRIBUTE:
            integers += [v for f, v in _fields(value) if f == _INTEGER]
        elif field in (_NODE_INPUT, _NODE_OUTPUT) and value:
            (inputs if field == _NODE_INPUT else outputs).append(value.decode())
    return inputs, outputs, "Cast to float32" if kind == "Cast" and integers == [_TO_FLOAT32] else kind


def _fields(data):
    """Yield (field, bytes, or an integer) of a message's parts; numbers of a fixed width are passed over."""
    data, at = memoryview(data), 0
    while at < len(data):
        key, at = _varint(data, at)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
        elif key & 7 == 2:
            size, at = _varint(data, at)
            yield key >> 3, bytes(data[at:at + size])
        at += size


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _field(number, data):
    """A part of a message that has a length."""
    key, size = number << 3 | 2, len(data)
    head = bytearray()
    for value in (key, size):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head) + data

"""Nodes of OpenVINO graphs that our own kernels compute."""

import weakref

import numpy as np

_HANDLES = []
_VIEWS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}  # bfloat16 as its bits


def kernel_node(name, kernel):
    """Return a class of nodes, called `name`, whose result has the first input's element type and shape, behind the batch that of the argument
    `shape` where there is one.

    Made of inputs, the Kernels of its graph and keyword arguments, a node calls kernel(*inputs, out, threads=..., **arguments) with
    arrays; 16-bit floats come as they are.
    """
    from openvino import Op, PartialShape

    handle = type(name, (), {})()
    _HANDLES.extend([handle] * 1000)    # it is let go without the interpreter's lock: it must never be the last time, even if counts are lost

    class Node(Op):
        def __init__(self, inputs, kernels, shape=None, number=None, **arguments):
            super().__init__(handle)    # what the node's name comes from; see Kernels why it is not the node itself
            self._kernels, self._shape, self._arguments = weakref.ref(kernels), shape, arguments
            self._number = len(kernels.nodes) if number is None else number
            kernels.nodes.append(self)
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self):
            shape = self.get_input_partial_shape(0)
            self.set_output_type(0, self.get_input_element_type(0), PartialShape([shape[0], *self._shape]) if self._shape else shape)

        def visit_attributes(self, visitor):
            visitor.on_attributes({"number": self._number})     # OpenVINO takes nodes of the same inputs and attributes for one
            return True

        def clone_with_new_inputs(self, new_inputs):
            return Node(new_inputs, self._kernels(), self._shape, self._number, **self._arguments)

        def has_evaluate(self):
            return True

        def evaluate(self, outputs, inputs):
            arrays = (t.data.view(_VIEWS[t.element_type.get_type_name()]) for t in (*inputs, *outputs))
            kernel(*arrays, threads=self._kernels().count, **self._arguments)
            return True

    return Node


def readers(node):
    """Return the nodes that read a node's numbers, not its shape or type."""
    inputs = [one for one in node.output(0).get_target_inputs() if one.get_node().get_type_name() != "ShapeOf"]
    return [one.get_node() for one in inputs if one.get_node().get_type_name() != "ConvertLike" or one.get_index() == 0]


def reader(node):
    """Return the only one of `readers`, None where there is none or there are several, or no node."""
    found = readers(node) if node is not None else []
    return found[0] if len(found) == 1 else None


def with_constant(node, kind):
    """Return (numbers, reader) where a node's only reader, of this type, puts it together with constant numbers, else (None, None)."""
    found = reader(node)
    if found is not None and found.get_type_name() == kind:
        for value in found.input_values():
            numbers = values(value)
            if numbers is not None:
                return numbers, found
    return None, None


def constant(value):
    """Return the constant that an output is, through what changes only its shape or type; None if it is none."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "ConvertLike", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def values(value):
    """Return the numbers of a `constant` in a row, floats in float32; None if it is none."""
    node = constant(value)
    if node is None:
        return None
    if node.get_element_type().get_type_name() == "bf16":
        return (node.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).ravel()
    return node.data.ravel() if node.get_element_type().is_integral() else node.data.astype(np.float32).ravel()


def channels_last(x):
    """Return an output [B,C,H,W] as [B,H,W,C], which it comes from or a transposition makes; pictures one behind the other are put together
    that way for all who read them. OpenVINO takes two transpositions that undo each other away, but not where something else reads what is
    between them."""
    from openvino import opset13 as ops

    node = x.get_node()
    if node.get_type_name() == "Transpose" and list(values(node.input_value(1))) == [0, 3, 1, 2]:
        return node.input_value(0)
    if node.get_type_name() == "Concat" and node.get_attributes()["axis"] in (1, -3):
        joined = ops.concat([channels_last(one) for one in node.input_values()], 3).output(0)
        x.replace(channels_first(joined))
        return joined
    return ops.transpose(x, np.array([0, 2, 3, 1])).output(0)


def channels_first(x):
    """Return an output [B,H,W,C] transposed to [B,C,H,W]."""
    from openvino import opset13 as ops

    return ops.transpose(x, np.array([0, 3, 1, 2])).output(0)


class Kernels:
    """Those in one compiled graph: their nodes, and how many threads they use, `count`, at first 1. To be kept as long as the graph.

    An OpenVINO node made in Python keeps the Python object that it is given, as documented itself, which keeps the node: it would never be
    freed, nor what it multiplies by, nor the graph before it. Nodes are kept here in place of that.

    Making it starts the kernels' own threads: to be done before OpenVINO has bound the calling thread to a processor, as it does while
    it works.
    """

    def __init__(self):
        from pidiff import _C

        self.count, self._most, self.nodes = 1, _C.start_threads(), []

    def follow(self, compiled):
        """Use as many as OpenVINO does for the graph: by itself one for each core, and for latency's sake of one socket only."""
        self.count = min(self._most, compiled.get_property("INFERENCE_NUM_THREADS"))

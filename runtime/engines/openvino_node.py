"""Nodes of OpenVINO graphs that our own kernels compute."""

import numpy as np

_VIEWS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}  # bfloat16 as its bits


def kernel_node(name, kernel):
    """Return a class of nodes, called `name`, whose result has the first input's element type and shape.

    Made of inputs and keyword arguments, a node calls kernel(*inputs, out, **arguments) with arrays; 16-bit floats come as they are.
    """
    from openvino import Op

    class Node(Op):
        def __init__(self, inputs=None, **arguments):
            super().__init__(self)
            self._arguments = arguments
            if inputs is not None:
                self.set_arguments(inputs)
                self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self):
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, new_inputs):
            return Node(new_inputs, **self._arguments)

        def has_evaluate(self):
            return True

        def evaluate(self, outputs, inputs):
            kernel(*(t.data.view(_VIEWS[t.element_type.get_type_name()]) for t in (*inputs, *outputs)), **self._arguments)
            return True

    Node.__name__ = name    # OpenVINO's name of the type
    return Node


class KernelThreads:
    """How many threads the kernels of one compiled graph use: `count`, at first 1.

    Making it starts the kernels' own threads: to be done before OpenVINO has bound the calling thread to a processor, as it does while
    it works.
    """

    def __init__(self):
        from pidiff import _C

        self.count, self._most = 1, _C.start_threads()

    def follow(self, compiled):
        """Use as many as OpenVINO does for the graph: by itself one for each core, and for latency's sake of one socket only."""
        self.count = min(self._most, compiled.get_property("INFERENCE_NUM_THREADS"))

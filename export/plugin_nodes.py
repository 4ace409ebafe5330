"""A fused graph as TensorRT's ONNX parser reads it: the nodes of domain `pidiff` under the names of the plug-in.

The names are others than in the file because the parsers of TensorRT 10.14 and later take any node called Attention for
their own, whatever its domain. The namespace is an attribute because those before 10.10 do not look at the domain either.
Imports no torch.
"""

from pathlib import Path

NAMESPACE, VERSION = "pidiff", "1"      # those of csrc/plugins/tensorrt/plugin.h, as are the names
PREFIX = "Pidiff"


def read_for_plugins(path: Path) -> bytes:
    """Return a graph, without the weights beside it, with every node of domain `pidiff` named after its plug-in."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.domain == NAMESPACE:
            node.op_type = PREFIX + node.op_type
            node.attribute.extend([onnx.helper.make_attribute("plugin_namespace", NAMESPACE),
                                   onnx.helper.make_attribute("plugin_version", VERSION)])
    return model.SerializeToString()

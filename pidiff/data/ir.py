"""OpenVINO IR networks in PyTorch, so that they run in batches and on a GPU: the operations that `random-face`'s two have.

Format: docs.openvino.ai, "OpenVINO IR format"; operations as in its opset 1. Shapes are followed on the host as the graph
computes them, so that any number of rows goes through a graph that was traced with one.
"""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"f32": np.float32, "i64": np.int64, "i32": np.int32}


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []


def _convolve(x: Tensor, weight: Tensor, data: dict, grouped: bool = False) -> Tensor:
    groups, weight = (weight.shape[0], weight.flatten(0, 1)) if grouped else (1, weight)
    return F.conv2d(x, weight, stride=_numbers(data["strides"]), padding=_numbers(data["pads_begin"]), groups=groups)


def _convolve_back(x: Tensor, weight: Tensor, data: dict) -> Tensor:
    return F.conv_transpose2d(x, weight.flatten(0, 1), stride=_numbers(data["strides"]), padding=_numbers(data["pads_begin"]),
                              groups=weight.shape[0])


def _matmul(a: Tensor, b: Tensor, data: dict) -> Tensor:
    a, b = (x.transpose(-1, -2) if data[f"transpose_{n}"] == "true" else x for n, x in (("a", a), ("b", b)))
    return a @ b


def _split(x: Tensor, axis: Tensor, sizes: Tensor, data: dict) -> tuple[Tensor, ...]:
    return x.split(sizes.tolist(), int(axis))


def _reshape(x: Tensor, shape: Tensor, data: dict) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])


def _squeeze(x: Tensor, axes: Tensor, data: dict) -> Tensor:
    return x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor, data: dict) -> Tensor:
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


def _broadcast(x: Tensor, shape: Tensor, data: dict) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


OPERATIONS = {
    "Add": lambda a, b, data: a + b,
    "Broadcast": _broadcast,
    "Concat": lambda *parts, data: torch.cat(parts, int(data["axis"])),
    "Convolution": _convolve,
    "Gather": lambda x, index, axis, data: x.select(int(axis), int(index)),
    "GroupConvolution": lambda x, weight, data: _convolve(x, weight, data, grouped=True),
    "GroupConvolutionBackpropData": _convolve_back,
    "MatMul": _matmul,
    "Multiply": lambda a, b, data: a * b,
    "PReLU": lambda x, slope, data: torch.where(x >= 0, x, x * slope),
    "Power": lambda x, y, data: x ** y,
    "ReduceMean": lambda x, axes, data: x.mean(tuple(axes.tolist()), keepdim=data["keep_dims"] == "true"),
    "Reshape": _reshape,
    "ShapeOf": lambda x, data: torch.tensor(x.shape),
    "Squeeze": _squeeze,
    "Tile": lambda x, repeats, data: x.tile(repeats.tolist()),
    "Unsqueeze": _unsqueeze,
    "VariadicSplit": _split,
}


class IrNetwork(nn.Module):
    """A network of one input in an IR file: rows [N, ...] -> what layer `last` computes (default: the network's result).

    Raises ValueError for a file with other operations than OPERATIONS or without the layer.
    """

    def __init__(self, xml: Path, last: str | None = None):
        super().__init__()
        root, weights = ElementTree.parse(xml).getroot(), np.fromfile(Path(xml).with_suffix(".bin"), np.uint8)
        layers = {layer.get("id"): layer for layer in root.find("layers")}
        sources = {(e.get("to-layer"), int(e.get("to-port"))): (e.get("from-layer"), int(e.get("from-port"))) for e in root.find("edges")}
        ends = [i for i, layer in layers.items() if (layer.get("name") == last if last else layer.get("type") == "Result")]
        if not ends:
            raise ValueError(f"{Path(xml).name} must have a layer {last}, got a version without it")
        self._plan, self._shapes = [], {}                            # steps in order; constants that only shapes depend on
        self._collect(ends[0], layers, sources, weights)
        last_use = {source: step for step, (_, _, inputs, _, _) in enumerate(self._plan) for source in inputs}
        self._done_with = [[source for source in set(inputs) if last_use[source] == step]      # a picture's features take 30 MB a layer
                           for step, (_, _, inputs, _, _) in enumerate(self._plan)]

    def _collect(self, end: str, layers: dict, sources: dict, weights: np.ndarray) -> None:
        """Plan the steps that lead to a layer, in the file's order, which is that of computing."""
        inputs = {name: [sources[name, int(p.get("id"))] for p in layer.findall("input/port")] for name, layer in layers.items()}
        needed, stack = set(), [end]
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack += [source for source, _ in inputs[name]]
        for name in (n for n in layers if n in needed):
            layer, kind, data = layers[name], layers[name].get("type"), layers[name].find("data")
            data, outputs = {} if data is None else dict(data.attrib), [int(p.get("id")) for p in layer.findall("output/port")]
            if kind == "Const":
                self._constant(name, outputs[0], data, weights)
            elif kind not in OPERATIONS and kind not in ("Parameter", "Result"):
                raise ValueError(f"operations of an IR network must be among {', '.join(OPERATIONS)}, got {kind}")
            else:
                self._plan.append((kind, name, inputs[name], outputs, data))

    def _constant(self, name: str, port: int, data: dict, weights: np.ndarray) -> None:
        start = int(data["offset"])
        value = weights[start:start + int(data["size"])].view(DTYPES[data["element_type"]]).reshape(_numbers(data["shape"]))
        if value.dtype == np.float32:
            self.register_buffer(f"constant_{name}_{port}", torch.from_numpy(value.copy()))
        else:
            self._shapes[name, port] = torch.from_numpy(value.astype(np.int64))

    def forward(self, rows: Tensor) -> Tensor:
        known = dict(self._shapes)
        for name, buffer in self.named_buffers():
            layer, port = name.split("_")[1:]
            known[layer, int(port)] = buffer
        for (kind, name, inputs, outputs, data), done_with in zip(self._plan, self._done_with):
            if kind == "Parameter":
                result = rows
            elif kind == "Result":
                return known[inputs[0]]
            else:
                result = OPERATIONS[kind](*(known[i] for i in inputs), data=data)
            for port, value in zip(outputs, result if isinstance(result, tuple) else (result,)):
                known[name, port] = value
            for source in done_with:
                del known[source]
        return result

"""From a torch module to an .onnx file without weights: trace, tidy, point the weights into the bundle's safetensors."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch

from pidiff.runtime.bundle import GraphSpec, TensorSpec

from .attention import DOMAIN, DOMAIN_VERSION
from .graphs import Graph, norms_in_float32
from .weights import ExportError, StoredTensor, WeightIndex, stored_tensors, write_safetensors

MAX_INLINE_BYTES = 1 << 20           # constants that are no checkpoint tensor: inside the .onnx file up to this size
IR_TYPES = {torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64,
            torch.int32: ir.DataType.INT32, torch.int8: ir.DataType.INT8, torch.bool: ir.DataType.BOOL}


def write_graph(graph: Graph, example: dict[str, torch.Tensor], opset: int, weights: WeightIndex) -> GraphSpec:
    """Trace `graph.module` on `example` inputs and write NAME.onnx into the bundle; returns its interface.

    The example's free axes must have sizes that no fixed size of the graph follows from (2 and more).
    """
    model = _trace(graph, example, opset)
    stored = weights.names(graph.module)
    _fold_constants(model, set(stored))
    _reorder_gelu(model.graph)
    _point_to_stored(model.graph, weights, stored, graph.name)
    _move_large_constants(model, weights.root, graph.name)
    _name_axes(model.graph, graph)
    _strip(model, graph.name)
    ir.save(model, weights.root / f"{graph.name}.onnx")
    return GraphSpec(f"{graph.name}.onnx", _specs(model.graph.inputs), _specs(model.graph.outputs))


def _trace(graph: Graph, example: dict[str, torch.Tensor], opset: int) -> ir.Model:
    names = graph.inputs.names
    axes = tuple({i: torch.export.Dim.DYNAMIC for i, size in enumerate(shape) if isinstance(size, str)}
                 for shape in graph.inputs.shapes)
    arguments = tuple(example[n].to(graph.input_dtype(n)) for n in names)
    with torch.no_grad(), norms_in_float32(graph.module), _quiet():
        program = torch.onnx.export(
            graph.module, arguments, dynamo=True, opset_version=opset, optimize=False, verbose=False,
            input_names=list(names), output_names=list(graph.outputs.names), dynamic_shapes=axes)
    return program.model


@contextlib.contextmanager
def _quiet():
    """The exporter reports on missing packages and its own deprecations; neither is the user's business."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fold_constants(model: ir.Model, stored: set[str]) -> None:
    """Fold what is constant, but never a stored weight: a transposed or merged copy would be stored a second time.

    (The exporter's own optimiser merges batch norms into convolutions and transposes weights.)
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    def keep_weights(node: ir.Node) -> bool | None:
        if node.op_type in ("Shape", "Size"):
            return None
        return False if any(v is not None and v.name in stored for v in node.inputs) else None

    with _quiet():
        common.InlinePass()(model)
        for _ in range(2):
            optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=keep_weights)
            common.RemoveUnusedNodesPass()(model)
        Sequential(common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
                   common.IdentityEliminationPass(), common.NameFixPass())(model)


def _reorder_gelu(graph: ir.Graph) -> None:
    """x (0.5 (1 + erf(..))) as (x (1 + erf(..))) 0.5, the order in which ONNX Runtime knows it and makes one kernel of it."""
    for outer in [n for n in graph if n.op_type == "Mul"]:
        for i, value in enumerate(outer.inputs):
            inner = value.producer()
            if inner is None or inner.op_type != "Mul" or len(value.uses()) != 1:
                continue
            half, sum_ = sorted(inner.inputs, key=lambda v: v.producer() is not None)
            added = [v.producer() for v in sum_.producer().inputs] if sum_.producer() is not None else []
            if half.producer() is None and any(n is not None and n.op_type == "Erf" for n in added):
                inner.replace_input_with(0, outer.inputs[1 - i])
                inner.replace_input_with(1, sum_)
                outer.replace_input_with(0, value)
                outer.replace_input_with(1, half)
                graph.remove(inner)
                graph.insert_before(outer, inner)       # behind x, which may come late
                break


def _point_to_stored(graph: ir.Graph, weights: WeightIndex, stored: dict[str, StoredTensor], name: str) -> None:
    """Replace every initializer that is a checkpoint tensor by external data, with a Cast where the dtypes differ."""
    first, casts = next(iter(graph)), []
    for value in list(graph.initializers.values()):
        entry = stored.get(value.name)
        if entry is None:
            continue
        _check_same(value, entry, weights.root, name)
        tensor = ir.ExternalTensor(entry.file, entry.offset, entry.length, IR_TYPES[entry.dtype],
                                   shape=ir.Shape(entry.shape), name=value.name, base_dir=weights.root)
        if tensor.dtype == value.dtype:
            value.const_value = tensor
            continue
        uses = list(value.uses())
        cast = ir.node("Cast", [value], {"to": int(value.dtype)}, num_outputs=1)
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"{value.name}.cast", value.type, value.shape
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
        casts.append(cast)
    graph.insert_before(first, casts)


def _check_same(value: ir.Value, entry: StoredTensor, root: Path, name: str) -> None:
    """Compare the exporter's tensor with the stored bytes; ExportError names the first that differs."""
    raw = getattr(value.const_value, "raw", None)
    tensor = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(value.const_value.numpy())
    if tuple(tensor.shape) != entry.shape or not torch.equal(entry.read(root).to(tensor.dtype), tensor.detach()):
        raise ExportError(f"graph {name} must use the stored {entry.key} of {entry.file}, got a tensor with other values")


def _move_large_constants(model: ir.Model, root: Path, name: str) -> None:
    """Constants made by tracing stay in the file while they are small together, else go to extra/NAME.safetensors."""
    own = [v for v in model.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    if sum(v.const_value.nbytes for v in own) <= MAX_INLINE_BYTES:
        return
    file, large = f"extra/{name}.safetensors", {v.name: v for v in own if v.const_value.nbytes > 4096}
    write_safetensors(root / file, {k: torch.from_numpy(v.const_value.numpy().copy()) for k, v in large.items()}, None, name)
    for key, entry in stored_tensors(root, file).items():
        large[key].const_value = ir.ExternalTensor(file, entry.offset, entry.length, IR_TYPES[entry.dtype],
                                                   shape=ir.Shape(entry.shape), name=key, base_dir=root)


def _name_axes(graph: ir.Graph, interface: Graph) -> None:
    """Give the free axes of inputs and outputs their names, and drop the tracer's symbols everywhere else."""
    symbols, ends = {}, {}
    for values, tensors in ((graph.inputs, interface.inputs), (graph.outputs, interface.outputs)):
        for value, name, shape in zip(values, tensors.names, tensors.shapes, strict=True):
            if value.name != name:
                raise ExportError(f"graph {interface.name} must have the tensor {name}, got {value.name}")
            for have, want in zip(value.shape, shape, strict=True):
                if isinstance(want, int) and isinstance(have, int) and have != want:
                    raise ExportError(f"graph {interface.name} {name} must have shape {shape}, got {value.shape}")
                if isinstance(want, str) and isinstance(have, int):
                    raise ExportError(f"graph {interface.name} {name} must keep the axis {want} free, got {have}")
                symbols.setdefault(str(have), want)
            value.shape, ends[id(value)] = ir.Shape(shape), True
    for node in graph:
        for value in node.outputs:
            if value.shape is not None and id(value) not in ends:
                value.shape = ir.Shape([s if isinstance(s, int) else symbols.get(str(s)) for s in value.shape])


def _strip(model: ir.Model, name: str) -> None:
    """Drop notes that hold stack traces and paths of the exporting machine; declare our domain only where it is used."""
    graph = model.graph
    graph.name, graph.doc_string, model.producer_name = name, None, "pidiff"
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    used = {node.domain for node in graph}
    for domain in [d for d in model.opset_imports if d and d not in used]:
        del model.opset_imports[domain]
    if DOMAIN in used:
        model.opset_imports[DOMAIN] = DOMAIN_VERSION


def read_spec(path: Path) -> GraphSpec:
    """The interface of an .onnx file that is already there."""
    graph = ir.load(path).graph
    return GraphSpec(path.name, _specs(graph.inputs), _specs(graph.outputs))


def _specs(values) -> tuple[TensorSpec, ...]:
    types = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}
    return tuple(TensorSpec(v.name, types[v.dtype], tuple(s if isinstance(s, int) else s.value for s in v.shape))
                 for v in values)

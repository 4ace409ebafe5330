"""A graph whose weights are in a file in the number format that OpenVINO computes in, mapped instead of loaded.

Left to itself, OpenVINO widens 16-bit weights to float32 before it packs them, in bfloat16 or float32, and keeps both: 3.2 GB more than
Stable Diffusion's UNet needs in bfloat16, 1.1 GB more than its W+ encoder in float32.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from ..graph_files import cache_key

CHUNK = 1 << 22  # values rounded at once: a few times that in bytes is all the memory it takes
FLOATS = ("f16", "f32")


def rewritten(model, path, folder, kind):
    """Return the model of the graph at `path` with constants in `kind`: "bf16", then its arithmetic, too, or "f32". Inputs and outputs
    stay as they are.

    Its weights are mapped from a file in `folder`, the user's own, which is written when the graph is met for the first time. Without
    a folder (None, or a disk that is full) bfloat16 is held in memory. None where nothing is gained: in bfloat16 for a graph with int8
    weights, whose scales must not be rounded; in float32 for one that has its weights in it, or without a folder. Raises RuntimeError
    where OpenVINO does not take the rewritten graph.
    """
    import openvino

    kinds = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
    narrow = kind == "bf16"
    if narrow and kinds & {"i8", "u8", "i4", "u4"} or not narrow and (folder is None or "f16" not in kinds):
        return None
    kept = folder and folder / f"{kind}-{cache_key(Path(path).read_bytes(), Path(path).parent, 2, openvino.__version__)}.xml"
    mapped = kept and _mapped(kept)
    if mapped:
        return mapped
    _retype(model, kind)
    return (kept and _save(model, kept) and _mapped(kept)) or model


def _mapped(file):
    """Return the model in a file of the cache, None where there is none or it is torn."""
    from .openvino_ops import core

    with contextlib.suppress(RuntimeError):
        if file.is_file() and file.with_suffix(".bin").is_file():
            return core().read_model(file)
    return None


def _retype(model, to):
    """Constants and arithmetic between floats in `to`, in place."""
    import openvino
    from openvino import opset13 as ops

    for op in model.get_ordered_ops():
        kind, output = op.get_type_name(), op.output(0)
        if output.get_element_type().get_type_name() not in FLOATS:
            continue
        readers = [(reader, reader.get_node().get_type_name()) for reader in output.get_target_inputs()]
        if kind == "Constant" and "Interpolate" not in (reader for _, reader in readers):    # there it is a factor of a size
            if output.get_element_type().get_type_name() == to:
                continue
            data = _rounded(op.data) if to == "bf16" else op.data.astype(np.float32)
            retyped = openvino.op.Constant(data).output(0)
            for reader, reading in readers:
                if reading == "Convert":    # from the 16 bits of the file to the graph's float32
                    reader.get_node().output(0).replace(retyped)
                else:
                    reader.replace_source_output(retyped)
        elif kind == "Parameter":
            retyped = ops.convert(op, to).output(0)
            for reader, reading in readers:
                if reading != "ShapeOf":
                    reader.replace_source_output(retyped)
        elif kind == "Convert" and op.input_value(0).get_element_type().get_type_name() in (*FLOATS, "bf16"):
            output.replace(op.input_value(0))   # to float32 and back around what overflows in float16; bfloat16 has float32's range
        elif kind == "Result":
            source = op.input_value(0)
            names, promised = source.get_names(), ops.convert(source, output.get_element_type()).output(0)
            op.input(0).replace_source_output(promised)
            source.set_names(set())
            promised.set_names(names)
    model.validate_nodes_and_infer_types()


def _rounded(array):
    """Return an openvino.Tensor of bfloat16, each value rounded to the nearest (ties to even)."""
    import openvino

    flat, bits = array.ravel(), np.empty(array.size, np.uint16)
    for start in range(0, array.size, CHUNK):
        wide = flat[start:start + CHUNK].astype(np.float32).view(np.uint32)
        bits[start:start + CHUNK] = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16
    tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape(array.shape))
    np.copyto(tensor.data.view(np.uint16), bits.reshape(array.shape))
    return tensor


def _save(model, file):
    """Write a model and its weights beside it; returns whether that went well. What a kill leaves half-written goes when the cache is trimmed."""
    import openvino

    part = file.with_name(f".{file.stem}-{os.urandom(4).hex()}.xml")     # other threads, too, may be writing it
    try:
        openvino.save_model(model, part, compress_to_fp16=False)
        for end in (".bin", ".xml"):    # the graph last: where it is, its weights are
            os.replace(part.with_suffix(end), file.with_suffix(end))
        return True
    except (OSError, RuntimeError):
        return False
    finally:
        for end in (".bin", ".xml"):
            part.with_suffix(end).unlink(missing_ok=True)

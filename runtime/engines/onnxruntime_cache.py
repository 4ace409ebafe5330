"""Graphs as ONNX Runtime has optimised and packed them for the processor, in the user's cache: mapped the next time, not made again.

Making them takes most of the time and memory of loading a graph. Mapped weights are in memory once for all processes, and give way
where it is short. (ONNX Runtime's optimized_model_filepath and save_external_prepacked_constant_initializers.)
"""

import contextlib
import os
import platform
import shutil
from pathlib import Path

from ..files import trim_folder
from ..graph_files import cache_key, external_bytes
from ..memory import MIB, give_back

SMALLEST = MIB          # bytes of weights; a graph with less is made as fast as it is mapped
ROOM = 5                # free bytes of the disk per byte of weights, so that not all is taken: files have up to 2.4


def open_session(ort, path, options, folder):
    """Return an InferenceSession of the graph at `path` on the processor.

    options: a function that makes SessionOptions. folder: of the user's own, None for none. Raises ONNX Runtime's own exceptions.
    """
    made = lambda file, chosen: ort.InferenceSession(str(file), chosen, providers=["CPUExecutionProvider"])
    path = Path(path)
    graph = path.read_bytes() if folder else b""
    weights = external_bytes(graph)
    if weights < SMALLEST:
        return made(path, options())
    kept = folder / f"{cache_key(graph, path.parent, ort.__version__, _processor())}.onnx"
    session = _mapped(ort, kept, options, made)
    if session is None and shutil.disk_usage(folder).free >= ROOM * weights and _write(ort, path, kept, options, made):
        session = _mapped(ort, kept, options, made)
    return session or made(path, options())


def _mapped(ort, kept, options, made):
    """Return a session of a graph in the cache, None where there is none or it is torn."""
    if not kept.is_file():
        return None
    chosen = options()
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL        # that has been done
    try:
        session = made(kept, chosen)
    except Exception:                           # ONNX Runtime raises a dozen unrelated types
        return None
    for file in (kept, *_weights_of(kept)):     # trim_folder goes by the last use
        with contextlib.suppress(OSError):
            os.utime(file)
    return session


def _write(ort, path, kept, options, made):
    """Write the graph and, beside it, its weights; returns whether that went well.

    The graph names the file of its weights, which therefore has its last name from the start and another one for every process. What
    a kill leaves goes when the cache is trimmed.
    """
    weights = kept.with_name(f"{kept.stem}-{os.urandom(4).hex()}.bin")
    part = weights.with_suffix(".part")
    chosen = options()
    chosen.optimized_model_filepath = str(part)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights.name)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    chosen.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        made(path, chosen)
        os.replace(part, kept)
        for other in {*_weights_of(kept)} - {weights}:      # what it was torn from, or another process has just written
            other.unlink(missing_ok=True)
    except BaseException as e:
        weights.unlink(missing_ok=True)
        if not isinstance(e, Exception):
            raise
        return False                            # a full disk, or the graph is to blame, which is said without a cache
    finally:
        part.unlink(missing_ok=True)
        give_back()                             # packed weights that nobody mapped
    trim_folder(kept.parent)
    return True


def _weights_of(kept):
    """Return the files of weights that were written for a graph in the cache."""
    return list(kept.parent.glob(f"{kept.stem}-*.bin"))


def _processor():
    """Return what tells processors apart: weights are packed for its instructions."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = ("vendor_id", "cpu family", "model", "model name", "flags", "features", "cpu implementer", "cpu part")
        return platform.machine(), *(line for line in first if line.split(":")[0].strip().lower() in told)
    return platform.machine(), platform.processor()

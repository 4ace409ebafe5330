"""Memory: which graphs are in use together, what they are predicted to need, and a limit that is kept or refused.

The prediction is a rule of thumb for ONNX Runtime and OpenVINO on a CPU, checked against the peak resident memory of processes that run
`mini`: while a graph loads, its weights are there as they are multiplied (float32) and packed for that; a run needs its inputs
three times (those of the batch before, and the identity cut into layers), folded people in between, and activations.
"""

import ctypes
import math
import mmap
import re
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from . import control_group
from .errors import require
from .graph_files import external_bytes, external_files
from .strict import parse_json

MIB = 1 << 20
# Graphs that work together; the stages of a picture follow one another in this order.
STAGES = {
    "enroll": ("face_pnet", "face_rnet", "face_onet", "face_matting", "w_plus_encoder"),
    "text": ("text_encoder", "text_conditioner"), "identity": ("id_conditioner",), "plan": ("time_conditioner",),
    "denoise": ("unet", "unet_cached"), "decode": ("vae_decoder",),
}
STAGE_OF = {graph: stage for stage, graphs in STAGES.items() for graph in graphs}
# What OpenCV, the tokenizer and an engine's module add to a process when they are first used.
LIBRARIES = {"onnxruntime": 80 * MIB, "openvino": 130 * MIB}
PER_GRAPH = 12 * MIB
PACKED = 2.5                # bytes at the peak of loading per byte of float32 weights
COPIES = 3
DROP_SECONDS = 0.05
_MADV_DONTNEED = 4          # Linux's number
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text):
    """Return bytes of a size like 800M, 1.5G or 1073741824; the letters are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    require(found is not None, "max_memory", "be a size such as 800M or 1.5G", repr(text))
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def resident(peak=False):
    """Return the resident memory of this process in bytes, or its peak so far; 0 where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:" if peak else "VmRSS:"))
    return 0


def available_memory():
    """Return bytes that can be had without swapping: of the machine, or of the container's limit; None if neither is known."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    limited = control_group.available_bytes()
    found += [] if limited is None else [limited]
    return min(found, default=None)


def give_back():
    """Return freed memory to the system, where the C library can (glibc). Engines end with their last reference, in no cycle that Python's
    collector would have to find: in a large process it takes a second."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MappedPages:
    """Those of some NumPy arrays that lie in files mapped shared and read-only: their pages may be dropped, since nobody's changes are
    in them. They are held, so that nothing else can come to lie at their addresses. None where the system is not Linux.
    """

    def __init__(self, arrays):
        mapped = _mapped_read_only()
        self._held = [a for a in arrays if a.nbytes and any(first <= a.ctypes.data and a.ctypes.data + a.nbytes <= end for first, end in mapped)]

    @contextmanager
    def dropped(self):
        """While this runs, let go of the pages many times a second.

        An engine that packs mapped weights into its own layout reads each page once, and would be charged for all of them until it
        is done. The next reader of a page finds it in the system's file cache.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._drop_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _drop_until(self, done):
        madvise = ctypes.CDLL(None).madvise if self._held else None
        spans = [(ctypes.c_void_p(a.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE), a.ctypes.data % mmap.PAGESIZE + a.nbytes) for a in self._held]
        while True:
            for first, length in spans:
                madvise(first, ctypes.c_size_t(length), _MADV_DONTNEED)
            if done.wait(DROP_SECONDS):
                return


def _mapped_read_only():
    """Return [first, end) addresses of what this process maps shared and read-only."""
    with suppress(OSError):
        lines = [line.split(None, 2) for line in Path("/proc/self/maps").read_text().splitlines()]
        return [tuple(int(n, 16) for n in addresses.split("-")) for addresses, kind, _ in lines if kind == "r--s"]
    return []


class Predictor:
    """Predicted bytes for the graphs of a bundle; reads a graph's file at its first question.

    loading: (name of a graph, bytes of its weights in float32) -> bytes at the peak of loading it; ONNX Runtime's by default.
    """

    def __init__(self, bundle, loading=None):
        self._bundle, self._weights, self._loading = bundle, {}, loading or (lambda _, weights: PACKED * weights)

    def weights(self, graph):
        """Return bytes of a graph's weights in float32."""
        if graph not in self._weights:
            path = self._bundle.file(self._bundle.graph(graph).file)
            data = path.read_bytes()
            stored, files = external_bytes(data), external_files(data)
            wide = all(self._itemsize(f) == 4 for f in files)
            self._weights[graph] = stored * (1 if wide else 2) + (0 if files else len(data))
        return self._weights[graph]

    def graph(self, name, batch=1, people=1, steps=1, size=None):
        """Return bytes that a graph needs while it is loaded and run on `batch` rows; size: of latents (None: the model's own)."""
        model = self._bundle.manifest.model
        height, width = size or model.latent_shape[1:]
        scale = model.vae_scale_factor
        spec = self._bundle.graph(name)
        axes = {"B": batch, "P": people, "N": steps, "h": height, "w": width, "H": height * scale, "W": width * scale}
        sizes = [math.prod(axes.get(n, n if isinstance(n, int) else 1) for n in t.shape) for t in (*spec.inputs, *spec.outputs)]
        return int(PER_GRAPH + self._loading(name, self.weights(name)) + COPIES * 4 * sum(sizes)
                   + self._activations(name, batch, height, width))

    def stage(self, name, batch=1, people=1, steps=1, cached=False, size=None):
        """Return bytes for all graphs of a stage; batch: rows of the UNet, or pictures; size: of latents."""
        graphs = [g for g in STAGES[name] if g in self._bundle.manifest.graphs and (cached or g != "unet_cached")]
        need = sum(self.graph(g, batch, people, steps, size) for g in graphs)
        if name != "denoise":
            return need
        fold = self._bundle.graph("unet").tensor("id_fold").shape[-1]
        return need + COPIES * 4 * fold * (people + 1)

    def diagnosis(self, name, batch, people, size, layers):
        """Return bytes that it takes to run a graph once with the results of its blocks, or of all layers, kept (diagnosis.py)."""
        many = 3 if name == "vae_decoder" else 9        # about 350 layers, most of them smaller than the first
        return self.graph(name, batch, people, size=size) + (many if layers else 3) * self._activations(name, batch, *size)

    def _activations(self, name, batch, height, width):
        model = self._bundle.manifest.model
        if name in STAGES["denoise"]:
            return batch * 24 * 4 * height * width * model.unet.channels[0]
        if name == "vae_decoder":       # AutoencoderKL: its last block at full size, and ONNX Runtime's arena, which doubles
            config = self._bundle.json("vae/config.json") if "vae/config.json" in self._bundle.manifest.files else {}
            channels = sum(config.get("block_out_channels", (16,))[:2])
            return batch * 4 * 4 * height * width * model.vae_scale_factor**2 * channels
        return 0

    def _itemsize(self, file):
        """Bytes of an element of a weights file, by the first float tensor in its header."""
        with open(self._bundle.file(file), "rb") as handle:
            header = parse_json(handle.read(int.from_bytes(handle.read(8), "little")), file)
        kinds = [v.get("dtype") for k, v in header.items() if k != "__metadata__"]
        return 2 if next((k for k in kinds if k in ("F16", "F32")), "F32") == "F16" else 4


def fits(bundle, kept, loading):
    """Return whether the graphs of the stages `kept` may stay loaded while another stage works: False, and a warning, if that is predicted to
    take more memory than is available. loading: see Predictor."""
    room, predictor = available_memory(), Predictor(bundle, loading)
    need = {stage: sum(predictor.graph(g) for g in graphs if g in bundle.manifest.graphs) for stage, graphs in STAGES.items()}
    most = sum(need[stage] for stage in kept) + max(size for stage, size in need.items() if stage not in kept)
    if room is None or most <= room:
        return True
    warnings.warn(f"memory is short, {room // MIB} MiB of {most // MIB}: graphs are loaded anew for every picture and let go; keep=True keeps them, "
                  "keep=False says nothing", stacklevel=5)
    return False


def check_limit(limit):
    """Raise PidiffError if `max_memory` is neither a number of bytes nor None."""
    require(limit is None or type(limit) is int and limit > 0, "max_memory", "be a number of bytes or None", repr(limit))


class Budget:
    """`max_memory` bytes (None: no limit) for a Pipeline that keeps its graphs loaded, or only those of one stage.

    vendor: the module of its engine, which may still have to be imported. loading: see Predictor.
    """

    def __init__(self, bundle, limit, keep, vendor="onnxruntime", loading=None):
        self._limit, self._keep, self._predictor = limit, keep, Predictor(bundle, loading)
        self._base = resident() + (0 if vendor in sys.modules else LIBRARIES.get(vendor, 0))

    def check(self, **stages):
        """Raise PidiffError, one sentence with the predicted need, if stages (name -> sizes of Predictor.stage) do not fit."""
        need = self.need(**stages)
        require(self._limit is None or need <= self._limit, "max_memory",  # a few more: processes differ from run to run
                f"be at least {need // MIB + 4} MiB for this bundle and this work", f"{(self._limit or 0) // MIB} MiB")

    def need(self, **stages):
        """Return the predicted peak in bytes, 0 without a limit: nobody asked."""
        if self._limit is None:
            return 0
        return self._base + (sum if self._keep else max)(self._predictor.stage(n, **sizes) for n, sizes in stages.items())

    def options(self, graph):
        """Return arguments for the engine of a graph."""
        return {"lean": self._limit is not None}

    def room(self):
        """Return bytes that may still be taken, of the machine's and of the limit; None if neither is known."""
        known = [available_memory(), None if self._limit is None else max(0, self._limit - resident())]
        return min((n for n in known if n is not None), default=None)

    def batch(self, most, rows, people, steps, cached, size, tiles):
        """Return (how many pictures, up to `most`, can be denoised at once, rows of one run of the UNet or None for all of them,
        side of the decoder's tiles or None).

        rows: of the UNet for each picture; size: of latents; tiles: sides of tiles to decode by, None for all at once, the
        best first. Smaller batches come before single rows, and those before smaller tiles. Raises PidiffError.
        """
        ways = [(batch, None) for batch in range(most, 0, -1)] + [(1, 1)] * (rows > 1)
        for tile in tiles:
            for batch, at_once in ways:
                part = {"batch": batch, "size": size} if tile is None else {"size": [min(tile, n) for n in size]}
                stages = {"text": {}, "identity": {}, "plan": {"steps": steps}, "decode": part,
                          "denoise": {"batch": at_once or batch * rows, "people": people, "cached": cached, "size": size}}
                if self._limit is None or self.need(**stages) <= self._limit:
                    return batch, at_once, tile
        self.check(**stages)

"""`max_memory` where a GPU computes: bytes of its memory. What this process has on the processor is not limited then.

TensorRT: cuda.Device counts engines (by the size of their files), scratch memory and tensors, and refuses before it allocates.
ONNX Runtime: each session gets an arena of a fixed size out of the limit, and the step loop's tensors the rest. What CUDA and cuDNN
take for themselves is not counted.
"""

from .errors import require
from .memory import MIB, STAGE_OF, STAGES, Predictor, available_memory

LOOP_PART = 8           # one part in so many is for the tensors of the step loop around ONNX Runtime
# Bytes of a weight as it is computed with, of four in float32. In int8 some layers are wider: this is a lower bound.
_WIDTH = {"fp32": 4, "fp16": 2, "int8": 1, "int8-fp16": 1}


class DeviceBudget:
    """Takes the place of memory.Budget for a Pipeline whose UNet runs on a GPU. sessions: it runs in ONNX Runtime."""

    def __init__(self, bundle, limit, keep, sessions):
        self._bundle, self._limit, self._keep, self._sessions = bundle, limit, keep, sessions
        self._predictor = Predictor(bundle)

    def check(self, **stages):
        """Nothing is known before an engine or a session is asked for; each refuses by itself."""

    def batch(self, most, rows, people, steps, cached, size, tiles):
        """Return (most, None, the first of `tiles`); see memory.Budget."""
        return most, None, tiles[0]

    def room(self):
        """Return bytes of the machine's memory that may still be taken, None if they are not known."""
        return available_memory()

    def options(self, graph):
        """Return arguments for the engine of a graph: its limits. PidiffError if its weights alone are more."""
        if not self._sessions:
            return {}
        known = self._bundle.manifest.graphs
        beside = [g for g in known if g in STAGE_OF] if self._keep else [g for g in STAGES[STAGE_OF[graph]] if g in known]
        part = self._predictor.graph(graph) / sum(map(self._predictor.graph, beside))
        arena = int((self._limit - self._limit // LOOP_PART) * part)
        weights = self._predictor.weights(graph) * _WIDTH[self._bundle.manifest.precision] // 4
        require(weights <= arena, "max_memory", f"be at least {-(-int(weights * self._limit / arena) // MIB)} MiB of the GPU's memory for "
                f"the weights of {graph}, which get {arena / self._limit:.0%} of it", f"{self._limit // MIB} MiB")
        return {"limits": (arena, self._limit // LOOP_PART)}

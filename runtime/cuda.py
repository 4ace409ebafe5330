"""CUDA through its driver, by ctypes: what GPU is here, and memory, streams and graphs on it.

No CUDA toolkit and no vendor package. Asking what is here (`find_gpu`) makes no context. Everything else lives in the
primary context, the one that TensorRT uses too.
"""

import ctypes
import functools
import weakref
from dataclasses import dataclass

import numpy as np

from .errors import EngineError, require

LIBRARY = "libcuda.so.1"
_INTEGRATED, _COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 18, 75, 76      # CUdevice_attribute
_PORTABLE_AND_MAPPED, _NON_BLOCKING, _RELAXED, _NO_TIMING, _OUT_OF_MEMORY = 1 | 2, 1, 2, 2, 2
_INT, _UNSIGNED, _SIZE, _ADDRESS, _HANDLE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
_P = ctypes.POINTER
# What a Device calls, by the names that the library exports (cuda.h renames some). All return a CUresult.
_PROTOTYPES = {
    "cuInit": (_UNSIGNED,), "cuDeviceGet": (_P(_INT), _INT), "cuDeviceGetAttribute": (_P(_INT), _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_P(_HANDLE), _INT), "cuDevicePrimaryCtxRelease_v2": (_INT,), "cuCtxSetCurrent": (_HANDLE,),
    "cuGetErrorName": (_INT, _P(ctypes.c_char_p)),
    "cuMemAlloc_v2": (_P(_ADDRESS), _SIZE), "cuMemFree_v2": (_ADDRESS,), "cuMemHostAlloc": (_P(_HANDLE), _SIZE, _UNSIGNED),
    "cuMemFreeHost": (_HANDLE,), "cuMemHostGetDevicePointer_v2": (_P(_ADDRESS), _HANDLE, _UNSIGNED),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _HANDLE, _SIZE, _HANDLE), "cuMemcpyDtoHAsync_v2": (_HANDLE, _ADDRESS, _SIZE, _HANDLE),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _HANDLE),
    "cuStreamCreate": (_P(_HANDLE), _UNSIGNED), "cuStreamDestroy_v2": (_HANDLE,), "cuStreamSynchronize": (_HANDLE,),
    "cuEventCreate": (_P(_HANDLE), _UNSIGNED), "cuEventRecord": (_HANDLE, _HANDLE), "cuEventSynchronize": (_HANDLE,),
    "cuEventDestroy_v2": (_HANDLE,),
    "cuStreamBeginCapture_v2": (_HANDLE, _INT), "cuStreamEndCapture": (_HANDLE, _P(_HANDLE)),
    "cuGraphInstantiateWithFlags": (_P(_HANDLE), _HANDLE, ctypes.c_ulonglong), "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,), "cuGraphDestroy": (_HANDLE,),
}


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA would use: its name, its target ("sm89"), the CUDA version of the driver ("13.0"), and whether it
    shares the processor's memory (Jetson)."""

    name: str
    target: str
    driver: str
    integrated: bool = False


def find_gpu(library=None):
    """Return (Gpu, "") or (None, why there is none). Never raises: no driver is an ordinary answer."""
    try:
        cuda = ctypes.CDLL(library or LIBRARY)
    except OSError:
        return None, "no NVIDIA driver"
    try:
        return _first_gpu(cuda)
    except AttributeError as e:
        return None, f"an NVIDIA driver that cannot be asked ({e})"


def _first_gpu(cuda):
    if status := cuda.cuInit(0):
        return None, f"an NVIDIA driver without a usable GPU (error {status})"
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if count.value < 1:
        return None, "an NVIDIA driver without a usable GPU"
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    answers = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR, _INTEGRATED):
        answer = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(answer), attribute, device)
        answers.append(answer.value)
    major, minor, integrated = answers
    return Gpu(name.value.decode("utf-8", "replace"), f"sm{major}{minor}", f"{version.value // 1000}.{version.value % 1000 // 10}",
               bool(integrated)), ""


class Device:
    """The first GPU, in its primary context. What is made from it keeps it; the context is released after the last of them.

    integrated: GPU and processor share their memory (Jetson), so that host memory need not be copied. limit: bytes of its memory
    that may be in use, None for all; used: those that are. Raises EngineError.
    """

    def __init__(self, limit=None):
        self.limit, self.used = limit, 0
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
            for name, types in _PROTOTYPES.items():
                getattr(self._cuda, name).argtypes = types
        except (OSError, AttributeError) as e:
            raise EngineError(f"device must have an NVIDIA driver that PIDiff knows, got: {e}") from e
        number, context, integrated = _INT(), _HANDLE(), _INT()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", number, 0)
        self.call("cuDeviceGetAttribute", integrated, _INTEGRATED, number)
        self.call("cuDevicePrimaryCtxRetain", context, number)
        self.integrated, self._context = bool(integrated.value), context
        weakref.finalize(self, self._cuda.cuDevicePrimaryCtxRelease_v2, number).atexit = False

    def call(self, name, *args):
        """Call the driver; EngineError names the function and the error. Pointers to values are taken here."""
        args = [a if isinstance(a, int) or not issubclass(t, ctypes._Pointer) else ctypes.byref(a)
                for a, t in zip(args, _PROTOTYPES[name])]
        if status := getattr(self._cuda, name)(*args):
            if status == _OUT_OF_MEMORY:
                raise EngineError(f"the GPU must have enough free memory, got none left in {name}: close other programs, or "
                                  "make smaller or fewer pictures at once")
            word = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(word))
            raise EngineError(f"{name} must succeed, got {(word.value or b'an unknown error').decode()} ({status})")

    def use(self):
        """Make the context current in this thread; needed once before other calls in it."""
        self.call("cuCtxSetCurrent", self._context)

    def check(self, size, what):
        """Raise PidiffError if `size` more bytes for `what` would be more than the limit."""
        need, mib = self.used + size, lambda n: -(-n >> 20)
        require(self.limit is None or need <= self.limit, "max_memory", f"be at least {mib(need)} MiB of the GPU's memory ({mib(size)} for "
                f"{what}, {mib(self.used)} that are in use)", f"{(self.limit or 0) >> 20} MiB")

    def take(self, size, what):
        """Count `size` bytes as used from now on; raises as `check` does."""
        self.check(size, what)
        self.used += size

    def give(self, size):
        """Count `size` bytes as free again."""
        self.used -= size

    def finalize(self, owner, name, handle, size=0):
        """Call the driver's `name` on `handle` when `owner` is gone, and give `size` bytes back; errors are ignored, for nobody could
        act on them."""
        def release(device):
            device._cuda.cuCtxSetCurrent(device._context)
            getattr(device._cuda, name)(handle)
            device.give(size)

        found = weakref.finalize(owner, release, self)
        found.atexit = False        # a process that ends gives all back; what others still have on a stream must not lose it before
        return found


class DeviceMemory:
    """`size` bytes that only the GPU reads and writes, at `address`."""

    def __init__(self, device, size):
        device.use()
        address = _ADDRESS()
        device.check(size, "tensors")
        device.call("cuMemAlloc_v2", address, size)
        device.take(size, "tensors")
        self.address, self.size = address.value, size
        device.finalize(self, "cuMemFree_v2", address, size)


class HostMemory:
    """`size` bytes of page-locked host memory, at `host`; the GPU reads and writes them itself at `address`."""

    def __init__(self, device, size):
        device.use()
        host, address = _HANDLE(), _ADDRESS()
        counted = size if device.integrated else 0
        device.check(counted, "tensors")
        device.call("cuMemHostAlloc", host, size, _PORTABLE_AND_MAPPED)
        device.take(counted, "tensors")
        device.finalize(self, "cuMemFreeHost", host, counted)
        device.call("cuMemHostGetDevicePointer_v2", address, host, 0)
        self.host, self.address, self.size = host.value, address.value, size
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (self.host, False)}

    def array(self, shape, dtype, offset=0):
        """Return an array on this memory from byte `offset`, which it keeps."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.asarray(self)[offset:offset + count].view(dtype).reshape(shape)


class Layout:
    """Where tensors lie in one allocation: each begins at a multiple of 256 bytes, which is what engines and copies like best.

    tensors: name -> (shape, dtype). Attributes: `tensors`, `offsets` (name -> bytes), `size` of the whole.
    """

    def __init__(self, tensors):
        self.tensors, self.offsets, self.size = tensors, {}, 0
        for name in tensors:
            self.offsets[name] = self.size
            self.size += -(-self.nbytes(name) // 256) * 256

    def nbytes(self, name):
        """Return the bytes of a tensor."""
        shape, dtype = self.tensors[name]
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize

    def __eq__(self, other):
        return isinstance(other, Layout) and self.tensors == other.tensors


@dataclass(frozen=True)
class Region:
    """A part of device memory: what a Stream copies to and from."""

    address: int
    size: int


class Scratch:
    """Memory for intermediate results that several engines use one after the other: as large as the most demanding needs."""

    def __init__(self, device):
        self.device, self.memory = device, None

    def reserve(self, size):
        """Make sure of `size` bytes. The memory may move: compare its address before every use."""
        if size and (self.memory is None or self.memory.size < size):
            self.memory = None          # freed first: both at once may be too much
            self.memory = DeviceMemory(self.device, size)

    def growth(self, size):
        """Return how many bytes more than now `reserve(size)` would take."""
        return max(0, size - (self.memory.size if self.memory else 0))


class Stream:
    """A queue of work of our own, which does not wait for the default stream. handle: what vendors' calls take; device: its Device."""

    def __init__(self, device):
        device.use()
        handle = _HANDLE()
        device.call("cuStreamCreate", handle, _NON_BLOCKING)
        self.device, self.handle = device, handle.value
        device.finalize(self, "cuStreamDestroy_v2", handle)

    def upload(self, memory, array):
        """Queue a copy of a contiguous array to the start of a memory."""
        self.device.call("cuMemcpyHtoDAsync_v2", memory.address, array.ctypes.data, array.nbytes, self.handle)

    def download(self, array, memory):
        """Queue a copy from the start of a memory into an array in page-locked memory."""
        self.device.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, memory.address, array.nbytes, self.handle)

    def clear(self, memory):
        """Queue zeros into a memory."""
        self.device.call("cuMemsetD8Async", memory.address, 0, memory.size, self.handle)

    def synchronize(self):
        """Wait until all that was queued is done."""
        self.device.call("cuStreamSynchronize", self.handle)

    def capture(self, work):
        """Return a Graph of what `work()` queues here, without running it. Memory may be allocated in it, which is not captured: an
        engine's own allocator can run short once more. Raises EngineError, and what `work` raises."""
        self.device.call("cuStreamBeginCapture_v2", self.handle, _RELAXED)
        graph = _HANDLE()
        try:
            work()
        except BaseException:
            self.device._cuda.cuStreamEndCapture(self.handle, ctypes.byref(graph))     # an error of its own tells less
            if graph:
                self.device.call("cuGraphDestroy", graph)
            raise
        self.device.call("cuStreamEndCapture", self.handle, graph)
        return Graph(self.device, self, graph)


@functools.cache
def shared_stream():
    """Return the one Stream of engines that get theirs when they load. It stays for the life of the process, as they may."""
    return Stream(Device())


class Event:
    """A mark in a stream that can be waited for while work behind it goes on."""

    def __init__(self, device):
        device.use()
        self._device, self._handle = device, _HANDLE()
        device.call("cuEventCreate", self._handle, _NO_TIMING)
        device.finalize(self, "cuEventDestroy_v2", self._handle)

    def record(self, stream):
        """Set the mark behind all that is queued in a stream by now."""
        self._device.call("cuEventRecord", self._handle, stream.handle)

    def wait(self):
        """Wait until the stream has passed the mark; returns at once if none was set."""
        self._device.call("cuEventSynchronize", self._handle)


class Graph:
    """Captured work that is queued again by one call."""

    def __init__(self, device, stream, graph):
        self._device, self._stream, self._handle = device, stream, _HANDLE()
        try:
            device.call("cuGraphInstantiateWithFlags", self._handle, graph, 0)
        finally:
            device.call("cuGraphDestroy", graph)
        device.finalize(self, "cuGraphExecDestroy", self._handle)

    def launch(self):
        """Queue the work on the stream that it was captured on."""
        self._device.call("cuGraphLaunch", self._handle, self._stream.handle)

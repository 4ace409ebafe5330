"""What GPU is here, asked of the driver itself through ctypes: no CUDA toolkit, no vendor package, no context made."""

import ctypes
from dataclasses import dataclass

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76       # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA would use: its name, its target ("sm89") and the CUDA version of the driver ("13.0")."""

    name: str
    target: str
    driver: str


def find_gpu(library="libcuda.so.1"):
    """Return (Gpu, "") or (None, why there is none). Never raises: no driver is an ordinary answer."""
    try:
        cuda = ctypes.CDLL(library)
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
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode("utf-8", "replace"), f"sm{major.value}{minor.value}",
               f"{version.value // 1000}.{version.value % 1000 // 10}"), ""

"""What the control groups of this process leave it of the machine (Linux): `docker run --memory 4g --cpus 2` and the like."""

import math
import os
from contextlib import suppress
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes():
    """Return bytes of memory that may still be taken, None without a limit. The file cache counts as free: it gives way."""
    found = []
    for folder in _folders("memory"):
        for limit, used, cache in (("memory.max", "memory.current", "inactive_file"),                      # version 2, then 1
                                   ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
            with suppress(OSError, ValueError, KeyError):       # no such file, or no limit ("max")
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + int(counts[cache]))
    return min(found, default=None)


def granted_threads():
    """Return how many threads there is time for, where that is fewer than processors that may be used; else None.

    Such a limit leaves all processors visible. Engines would start a thread on each, and the system would stop all of them for most of
    the time (OpenVINO's issue 37838, oneTBB's issue 190). Parts of a processor count as one.
    """
    granted = []
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            granted.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            granted += [quota / period] * (quota > 0)
    threads = math.ceil(min(granted)) if granted else None
    return threads if threads and threads < len(os.sched_getaffinity(0)) else None


def _folders(controller):
    """Return the folders of this process's groups that may limit `controller`, of both versions, up to the roots.

    In a container the paths may be those of the host, which are not there: what limits the container lies at the roots.
    """
    found = {ROOT, ROOT / controller}
    with suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if not names or controller in names.split(","):
                own = (ROOT / names if names else ROOT) / path.lstrip("/")
                found |= {own, *(parent for parent in own.parents if parent.is_relative_to(ROOT))}
    return found

"""Control groups for tests: folders of the system in which a process is limited."""

import contextlib
import os
import time
from pathlib import Path

import pytest


@contextlib.contextmanager
def control_group(controller, limits):
    """A control group with limits (name of a file -> what it is to hold; those of the version that is not here are left out).

    Yields the file that takes process numbers, or skips the test where no such group can be made.
    """
    for parent in ("/sys/fs/cgroup", f"/sys/fs/cgroup/{controller}"):
        folder = Path(parent, f"pidiff-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            folder.mkdir()
            here = [name for name in limits if (folder / name).is_file()]       # none in a folder that is no control group
            for name in here:
                (folder / name).write_text(str(limits[name]))
            if here:
                break
        with contextlib.suppress(OSError):
            folder.rmdir()
    else:
        pytest.skip(f"no control group that limits {controller} can be made here")
    try:
        yield folder / "cgroup.procs"
    finally:
        for _ in range(100):                            # until the system has taken its processes away
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)

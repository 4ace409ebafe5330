"""Writing files so that a failure leaves either the old file or the new one, never half of one."""

import contextlib
import errno
import os
import stat
import tempfile
import warnings
from pathlib import Path

from .errors import PidiffError

CACHE_BYTES = 8 << 30        # of the user's disk for each engine
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit set for this process",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "the folder does not exist",
    errno.ENOTDIR: "part of the path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


def reason(error):
    """Say in a few words why an OSError happened."""
    return _REASONS.get(error.errno, (error.strerror or str(error)).lower())


def write_atomic(path, data, error=PidiffError):
    """Write bytes to `path` whole or not at all; see `write_all`."""
    write_all({path: data}, error)


def write_all(files, error=PidiffError):
    """Write a dict path -> bytes through temporary files beside the targets, flushed to disk and then renamed.

    Raises `error` in one sentence when a file cannot be written. Whatever interrupts it before the renames, Ctrl-C
    included, the temporary files are removed and older files of those names stay as they were.
    """
    pending = {}
    try:
        for path, data in files.items():
            path = Path(path)
            handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
            pending[name] = path
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~umask())
        for name, path in pending.items():
            os.replace(name, path)
    except BaseException as e:
        for name in pending:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if isinstance(e, OSError):
            raise error(f"{path} must be writable, got: {reason(e)}") from e
        raise


def check_writable(path, error=PidiffError):
    """Raise `error` now if `path` could not be created later, so that no minute of work is lost to a wrong folder."""
    path = Path(path)
    if path.is_dir():
        raise error(f"{path} must be a file to write, got a folder")
    if not path.parent.is_dir():
        raise error(f"{path} must be in a folder that exists, got {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise error(f"{path} must be in a folder that can be written to, got {path.parent}")


def umask():
    """Read the process's umask (mkstemp files are private; the result should have the usual permissions)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_private(found):
    """Whether what an `os.lstat` has found is this user's own, and nobody else can use it."""
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077


def private_cache(name):
    """Return the folder `name` in the user's cache, made with mode 700; None where there is none to trust.

    What lies there may be run, so it must be a folder of the user's own that nobody else can write to: a warning says
    when it is not. PIDIFF_CACHE is the cache's place (default: $XDG_CACHE_HOME/pidiff or ~/.cache/pidiff); "off" is none.
    """
    place = os.environ.get("PIDIFF_CACHE")
    if place == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(place) if place else (Path(home) if os.path.isabs(home) else Path("~/.cache")) / "pidiff") / name
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
        own = stat.S_ISDIR(found.st_mode) and is_private(found)
        problem = None if own else "it is another's, or others can use it"
    except (OSError, RuntimeError) as e:
        problem = reason(e) if isinstance(e, OSError) else str(e)
    if problem:
        warnings.warn(f"PIDIFF_CACHE must be a folder of the user's own with mode 700, or off, got {folder}: {problem}; "
                      "nothing is cached", stacklevel=2)
    return None if problem else folder


def trim_folder(folder, limit=CACHE_BYTES):
    """Remove the files of a folder that were not used for longest until at most `limit` bytes or one file are left."""
    with os.scandir(folder) as entries:
        files = [(max(e.stat().st_atime, e.stat().st_mtime), e.stat().st_size, e.path) for e in entries if e.is_file()]
    total = 0
    for rank, (_, size, path) in enumerate(sorted(files, reverse=True)):
        total += size
        if rank and total > limit:
            with contextlib.suppress(OSError):  # another process may be trimming too
                os.unlink(path)

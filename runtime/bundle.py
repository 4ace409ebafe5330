"""Bundles: a directory with everything that one model needs at run time. This module owns the format.

    BUNDLE/manifest.json            schema version, graphs, sizes, sha256 and size of every other file (manifest.py)
           manifest.sig             optional signature of manifest.json (signature.py)
           unet.onnx, ...           graphs without weights; external data points into weights/
           weights/*.safetensors    the weights under their PyTorch names, stored once
           tokenizer/, config/      text files of the tokenizer and the PyTorch configurations
           schedule.json            noise schedule; directions.safetensors: edit directions [L,512], one per name
           engines/NAME/*.engine    graphs compiled for certain GPUs (engine_specs.py); added later by engine_store.py

Reading: the tree is compared with the manifest and every file is hashed before any parser or engine sees it.
Writing: into a temporary directory beside the target, renamed when whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .engine_specs import ENGINE_FOLDER
from .errors import BundleError, require
from .files import reason, umask
from .manifest import (
    MANIFEST, MAX_FILES, MAX_MANIFEST_BYTES, REPORTS, SCHEMA_VERSION, SPACINGS, FileSpec, GraphSpec, IdentitySpec, Manifest, ModelSpec,
    TensorSpec, UNetSpec, check_path,
)
from .signature import SIGNATURE, check_signature, load_public_key, sign
from .strict import parse_json, to_plain

__all__ = ["Bundle", "BundleError", "BundleWriter", "FileSpec", "GraphSpec", "IdentitySpec", "Manifest", "ModelSpec",
           "TensorSpec", "UNetSpec", "REPORTS", "SCHEMA_VERSION", "shipped_bundle", "sha256_file"]

MAX_JSON_BYTES = 64 << 20
MAX_DIRECTIONS_BYTES = 64 << 20


def shipped_bundle():
    """Return the path of the `mini` bundle that comes with PIDiff.

    This file is pidiff/runtime/bundle.py in an installed package and runtime/bundle.py in a checkout; models/ lies
    beside the runtime folder in both.
    """
    return Path(__file__).resolve().parent.parent / "models" / "mini"


class Bundle:
    """An open bundle: `path`, `manifest`, and checked access to its files. Make one with `Bundle.open`."""

    def __init__(self, path, manifest):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path=None, verify=True, require_signature=None):
        """Open the bundle at `path` (None: the shipped `mini`) and check it.

        `verify=False` skips the hashes, not the comparison of names and sizes: for a caller that has just hashed the
        same bundle. `require_signature`: a public key, as a .pub file or its second line; the bundle's signature is then
        checked before anything of it is parsed. Raises BundleError in one sentence for anything wrong.
        """
        path = shipped_bundle() if path is None else Path(path)
        key = None if require_signature is None else load_public_key(require_signature)
        require(verify or key is None, "verify", "be True with require_signature", "False", BundleError)
        try:
            text = _read_limited(path / MANIFEST, MAX_MANIFEST_BYTES)
            if key is not None:
                check_signature(text, path / SIGNATURE, key)
            manifest = Manifest.from_json(text)
            _check_tree(path, manifest.files)
            if verify:
                _check_hashes(path, manifest.files)
        except BundleError as e:
            raise BundleError(f"bundle {path} cannot be used: {e}") from e
        except OSError as e:
            raise BundleError(_describe_missing(path, e)) from e
        return cls(path, manifest)

    def file(self, relative):
        """Return the path of a file that the manifest lists; BundleError if it does not, or if it is an engine."""
        if relative not in self.manifest.files:
            raise BundleError(f"bundle {self.path} must hold {relative}, got a bundle without it")
        if relative.startswith(f"{ENGINE_FOLDER}/"):
            raise BundleError(f"engines must be taken with Bundle.engine, which checks them first, got {relative}")
        return self.path / relative

    def engine(self, name, graph, limit=None):
        """Return the content of a compiled graph from the set of engines `name`, or its first `limit` bytes.

        An engine is code. It is hashed here, whatever `open` did, and what was hashed is what is returned. Raises
        BundleError if there is none, or if it is not what the manifest lists.
        """
        engines = self.manifest.engines.get(name)
        if engines is None or graph not in engines.graphs:
            raise BundleError(f"bundle {self.path} must hold an engine {name} of {graph}, got a bundle without it")
        relative = engines.graphs[graph].file
        digest, data = hashlib.sha256(), bytearray()
        try:
            with _open_regular(self.path / relative) as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    data += piece if limit is None else piece[:max(0, limit - len(data))]
        except OSError as e:
            raise BundleError(f"bundle {self.path} must hold {relative}, got: {reason(e)}") from e
        _check_digest(relative, digest.hexdigest(), self.manifest.files[relative].sha256)
        return data

    def graph(self, name):
        """Return the GraphSpec of a graph; BundleError if the bundle has none of that name."""
        if name not in self.manifest.graphs:
            raise BundleError(f"bundle {self.path} must hold the graph {name} for this, got a bundle without it")
        return self.manifest.graphs[name]

    def json(self, relative):
        """Return the content of a JSON file of the bundle."""
        return parse_json(_read_limited(self.file(relative), MAX_JSON_BYTES), relative)

    def directions(self):
        """Return the edit directions, name -> [L, w_plus_dim] float32 (one step = one standard deviation)."""
        name = "directions.safetensors"
        if name not in self.manifest.files:
            return {}
        from safetensors import SafetensorError
        from safetensors.numpy import load

        model = self.manifest.model
        try:
            tensors = load(_read_limited(self.file(name), MAX_DIRECTIONS_BYTES))
        except SafetensorError as e:
            raise BundleError(f"{name} must be a safetensors file, got: {e}") from e
        for key, value in tensors.items():
            if value.shape != (model.w_plus_layers, model.w_plus_dim) or value.dtype != "float32":
                raise BundleError(f"{name} {key} must be [{model.w_plus_layers}, {model.w_plus_dim}] float32, "
                                  f"got {list(value.shape)} {value.dtype}")
        return tensors

    def encoder_id(self):
        """Return a digest that names the W+ encoder: two bundles of one checkpoint share it, whatever their precision."""
        return self._digest("w_plus_encoder")

    def adapter_id(self):
        """Return a digest that names UNet and identity adapter, as `encoder_id` does the encoder."""
        return self._digest("unet", "adapter")

    def _digest(self, *names):
        """One digest of the source checkpoint's files, or else the bundle's own, that have one of the names in their path."""
        files = {k: v.sha256 for k, v in self.manifest.files.items() if not k.startswith(f"{ENGINE_FOLDER}/")}
        parts = next(filter(None, ([v for k, v in sorted(digests.items()) if any(name in k for name in names)]
                                   for digests in (self.manifest.sources, files))), [])
        return hashlib.sha256("".join(parts).encode()).hexdigest()


class BundleWriter:
    """Write a bundle whole or not at all.

        with BundleWriter(out) as writer:
            ...                                  write files under writer.path
            writer.commit(name="mini", family="sd1", ...)

    `out` must not exist or be an empty directory. Whatever leaves the block without a commit, Ctrl-C and a full disk
    included, removes every file again. A full disk is reported as BundleError.
    """

    def __init__(self, out):
        self.out = Path(os.path.abspath(out))
        self.path, self._hashed = None, {}

    def __enter__(self):
        out = self.out
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise BundleError(f"out must be a new or empty directory, got {out}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        except OSError as e:
            raise BundleError(f"out must be in a folder that can be written to, got {out}: {reason(e)}") from e
        return self

    def __exit__(self, kind, error, trace):
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
        if error is not None and is_disk_full(error):
            raise BundleError(f"out must be on a disk with enough room, got a full disk writing {self.out}") from error

    def draft(self, **fields):
        """Hash all files and return the Manifest that `commit` would write now, for a look at the bundle before that.

        `fields` are the manifest's but `files` and `schema_version`, as dataclasses or plain JSON values, checked by the
        reader's own parser. A file that is the same at the next call is not hashed again.
        """
        files = {}
        for relative in sorted(_list_files(self.path)):
            check_path(relative)
            path, found = self.path / relative, os.stat(self.path / relative)
            key = (relative, found.st_mtime_ns, found.st_size, found.st_ino)
            if key not in self._hashed:
                self._hashed[key] = {"sha256": sha256_file(path), "size": found.st_size}
                _fsync(path)
            files[relative] = self._hashed[key]
        empty = ("scheduler", "sources", "licences", "tools", "parity", "float32_layers", "engines")
        return Manifest.from_dict(to_plain({**{k: {} for k in empty}, **fields, "files": files, "schema_version": SCHEMA_VERSION}))

    def commit(self, secret=None, **fields):
        """Write the manifest of `draft`, signed with the SecretKey `secret` if there is one, flush everything and rename the
        directory to `out`. Returns the Manifest."""
        manifest = self.draft(**fields)
        target = self.path / MANIFEST
        target.write_text(json.dumps(manifest.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if target.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"manifest.json must be at most {MAX_MANIFEST_BYTES} bytes, got {target.stat().st_size}")
        _fsync(target)
        if secret is not None:
            (self.path / SIGNATURE).write_bytes(sign(target.read_bytes(), secret, signed_comment(manifest)))
            _fsync(self.path / SIGNATURE)
        os.chmod(self.path, 0o777 & ~umask())  # mkdtemp makes private directories
        try:
            os.rename(self.path, self.out)
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise BundleError(f"out must be a new or empty directory, got {self.out}") from e
            raise
        self.path = None
        _fsync(self.out.parent)
        return manifest


def signed_comment(manifest):
    """Return the line that is signed beside a manifest; names in it are plain ASCII."""
    return f"PIDiff bundle {manifest.name.encode('ascii', 'replace').decode()!r} file:{MANIFEST}"


def sha256_file(path):
    """Return the sha256 of a file as hex digits, reading it in pieces."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _open_regular(path):
    """Open a regular file for reading; never follows a link at the last step."""
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BundleError(f"{path.name} must be a regular file, got something else")
    return file


def _read_limited(path, limit):
    """Read a regular file of at most `limit` bytes."""
    with _open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BundleError(f"{path.name} must be at most {limit} bytes, got more")
    return data


def _list_files(root):
    """Return the relative paths of all files under `root`; links and special files are errors."""
    found, pending = [], [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(relative)
                elif entry.is_file(follow_symlinks=False):
                    found.append(relative)
                else:
                    raise BundleError(f"{relative} must be a regular file, got a link or a special file")
        if len(found) + len(pending) > 2 * MAX_FILES:
            raise BundleError(f"a bundle must hold at most {MAX_FILES} files, got more")
    return found


def _check_tree(root, files):
    """Compare names and sizes on disk with the manifest, before anything is read.

    Under engines/ a file may be there that is not listed: one that is being built, or whose build was killed. Nothing
    hands it out, and the next build removes it. So may a report that is being exchanged; a signed bundle lists its own.
    """
    files_here = set(_list_files(root))
    found = files_here - {MANIFEST, SIGNATURE} - (set() if SIGNATURE in files_here else set(REPORTS) - set(files))
    for relative in sorted(set(files) - found):
        raise BundleError(f"{relative} must be present, got a bundle without it")
    for relative in sorted(found - set(files)):
        if relative.startswith(f"{ENGINE_FOLDER}/"):
            continue
        raise BundleError(f"files must be listed in manifest.json, got the unlisted {relative}")
    for relative, spec in files.items():
        size = (root / relative).stat().st_size
        if size != spec.size:
            raise BundleError(f"{relative} must have {spec.size} bytes, got {size}")


def _check_hashes(root, files):
    """Hash every file, largest first, on as many threads as there are cores up to four (hashing frees the GIL)."""
    order = sorted(files, key=lambda p: -files[p].size)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for relative, digest in zip(order, pool.map(lambda p: sha256_file(root / p), order)):
            _check_digest(relative, digest, files[relative].sha256)


def _check_digest(relative, digest, expected):
    if digest != expected:
        raise BundleError(f"{relative} must have the sha256 {expected[:16]}..., got {digest[:16]}...: "
                          "the file was damaged or changed")


def _describe_missing(path, error):
    if not path.exists():
        return f"bundle must be a directory made by pidiff-export, got {path}, which does not exist"
    if not path.is_dir():
        return f"bundle must be a directory made by pidiff-export, got the file {path}"
    if isinstance(error, FileNotFoundError):
        return f"bundle must be a directory made by pidiff-export, got {path} without a manifest.json"
    return f"bundle {path} must be readable, got: {reason(error)}"


def is_disk_full(error):
    """Tell whether an exception means that no room was left; other libraries hide the errno in their text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return isinstance(error, Exception) and ("os error 28" in text or "No space left on device" in text)


def _fsync(path):
    """Flush a file or directory to disk; some file systems cannot flush directories, which is not an error."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if os.path.isdir(path) else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)

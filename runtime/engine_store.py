"""Adding engines to a bundle that is already there, so that it can be opened, and copied, at every moment in between.

An engine becomes visible in three steps, each of them atomic: the manifest forgets the old one, the new file takes its
place, the manifest lists it; a new report too. A process that is killed between them leaves a whole bundle with an unlisted file under
engines/, which nothing hands out and the next `EngineStore` removes. A signature is removed before the manifest changes.
"""

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .bundle import Bundle, is_disk_full, sha256_file, signed_comment
from .engine_specs import ENGINE_FOLDER, EngineSet, engine_path
from .errors import BundleError
from .files import reason
from .manifest import MANIFEST, REPORTS, FileSpec, Manifest
from .signature import SIGNATURE, sign


class EngineStore:
    """Exclusive right to add engines to a bundle.

        with EngineStore(path) as store:
            build(store.part(engines, "unet"))
            store.add(engines, "unet", engine)

    Attributes: path, manifest (the newest), lost_signature (whether the bundle was signed and now is not). Opening verifies
    the whole bundle, and its signature where `require_signature` gives a public key. Raises BundleError in one sentence.
    """

    def __init__(self, path, require_signature=None):
        self.path, self.manifest, self.lost_signature = Path(path), None, False
        self._lock, self._require_signature = None, require_signature

    def __enter__(self):
        if not (self.path / MANIFEST).is_file():
            Bundle.open(self.path)                   # says what it is instead
        if not os.access(self.path, os.W_OK):
            raise BundleError(f"bundle must be a folder that can be written to, got {self.path}")
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock)
            raise BundleError(f"bundle must not be in use by another export, got {self.path}: {reason(e)}") from e
        try:
            self.manifest = Bundle.open(self.path, require_signature=self._require_signature).manifest
        except BaseException:
            os.close(self._lock)
            raise
        self._sweep()
        return self

    def __exit__(self, kind, error, trace):
        self._sweep()
        os.close(self._lock)
        if error is not None and is_disk_full(error):
            raise BundleError(f"bundle must be on a disk with enough room, got a full disk writing {self.path}") from error

    def part(self, engines, graph):
        """Return the path to build an engine into; it is no part of the bundle until `add`."""
        path = self.path / (engine_path(engines.id, graph) + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, engines, graph, engine):
        """Take the file at `part(engines, graph)` into the bundle as the EngineFile `engine` of the EngineSet `engines`."""
        part = self.part(engines, graph)
        spec = FileSpec(sha256_file(part), part.stat().st_size)
        known = self.manifest.engines.get(engines.id, replace(engines, graphs={}))
        if graph in known.graphs:
            self._write({engines.id: _without(known, graph)})
            known = self.manifest.engines[engines.id]
        os.replace(part, self.path / engine.file)
        self._write({engines.id: replace(known, graphs={**known.graphs, graph: engine})}, {engine.file: spec})

    def drop_older(self, engines):
        """Remove the sets of the same backend and targets that another version built."""
        old = [e.id for e in self.manifest.engines.values()
               if (e.backend, e.targets) == (engines.backend, engines.targets) and e.id != engines.id]
        if old:
            self._write(dict.fromkeys(old))
            self._sweep()

    def report(self):
        """Return name -> bytes of the files that the verification report consists of."""
        return {name: (self.path / name).read_bytes() for name in REPORTS if (self.path / name).is_file()}

    def replace_report(self, contents):
        """Replace files of the report, name -> bytes, unless they are the same."""
        specs = {name: FileSpec(hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()}
        if specs.items() <= self.manifest.files.items():
            return
        self._write({}, forget=specs)
        for name, data in contents.items():
            self._replace(name, data)
        self._write({}, specs)

    def sign(self, secret):
        """Sign the bundle as it is now with a SecretKey."""
        text = (self.path / MANIFEST).read_bytes()
        if Manifest.from_json(text) != self.manifest:
            raise BundleError(f"bundle must not change while it is signed, got another manifest.json in {self.path}")
        self._replace(SIGNATURE, sign(text, secret, signed_comment(self.manifest)))
        self.lost_signature = False

    def _write(self, engines, files=(), forget=()):
        """Replace sets (None: drop) in the manifest, checked by the reader's own parser, and its file list with them; forget:
        other files that leave the list."""
        sets = {k: v for k, v in {**self.manifest.engines, **engines}.items() if v is not None}
        known = {**self.manifest.files, **dict(files)}
        listed = {e.file for s in sets.values() for e in s.graphs.values()}
        kept = {p: f for p, f in known.items() if p in listed or not p.startswith(f"{ENGINE_FOLDER}/") and p not in forget}
        manifest = Manifest.from_dict(replace(self.manifest, engines=sets, files=kept).to_dict())
        with suppress(FileNotFoundError):
            os.unlink(self.path / SIGNATURE)
            self.lost_signature = True
        self._replace(MANIFEST, (json.dumps(manifest.to_dict(), indent=1, allow_nan=False) + "\n").encode())
        self.manifest = manifest

    def _replace(self, name, data):
        """Replace a file of the bundle's root. Not through a temporary file beside it: a kill would leave that there, and the
        bundle unusable."""
        part = self.path / ENGINE_FOLDER / f"{name}.part"
        part.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / name)

    def _sweep(self):
        """Remove files under engines/ that the manifest does not list, then empty folders."""
        for folder, _, names in os.walk(self.path / ENGINE_FOLDER, topdown=False):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self.path).as_posix() not in self.manifest.files:
                    with suppress(OSError):
                        path.unlink()
            with suppress(OSError):
                os.rmdir(folder)


def _without(engines, graph):
    """Return an EngineSet without one graph."""
    return EngineSet(engines.backend, engines.version, engines.targets,
                     {g: e for g, e in engines.graphs.items() if g != graph})

"""What the bytes of an ONNX graph tell of its weights without a parser of protobuf."""

import hashlib
import os
import re
from pathlib import Path

# A reference into external data, in the protobuf of a graph: key "length", value in decimal.
_LENGTH = re.compile(rb"\n\x06length\x12[\x01-\x14](\d+)")
_LOCATION = re.compile(rb"\n\x08location\x12.([\w./-]+?\.safetensors)")


def external_files(graph):
    """Return the names of the safetensors files, relative to its own, that the bytes of an ONNX graph take their weights from."""
    return sorted({name.decode() for name in _LOCATION.findall(graph)})


def external_bytes(graph):
    """Return the size of the weights that lie there."""
    return sum(map(int, _LENGTH.findall(graph)))


def cache_key(graph, folder, *made_by):
    """Return a file name that changes with the bytes of a graph, the files of its weights in a folder (size, time, inode) and what rewrites it."""
    return weights_key(graph, folder, graph, *made_by)


def weights_key(graph, folder, *made_by):
    """Return the same for the weights alone: one for all graphs that take theirs from the same files. A graph with its weights in it has its own."""
    digest, names = hashlib.sha256(repr(made_by).encode()), external_files(graph)
    for name in names:
        found = os.stat(Path(folder) / name)
        digest.update(f"{name} {found.st_size} {found.st_mtime_ns} {found.st_ino} {found.st_dev}".encode())
    if not names:
        digest.update(graph)
    return digest.hexdigest()[:32]

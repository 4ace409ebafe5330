"""Signatures of bundles: manifest.sig, in minisign's format (version 1), over the bytes of manifest.json.

The manifest holds the hash of every other file, so its signature covers the bundle, engines included. minisign and
its relatives read and write the same files (secret keys without a password, `minisign -G -W`):

    minisign -V -p NAME.pub -m BUNDLE/manifest.json -x BUNDLE/manifest.sig

All are short texts, "untrusted comment: ..." and then a line of base64:

    public key    "Ed", key id [8], Ed25519 public key [32]
    secret key    "Ed", 0 0 (no password), "B2", unused [48], key id [8], seed [32], public key [32], BLAKE2b-256 of "Ed" to here
                  without the unused part and what stands between
    signature     "ED" (of the BLAKE2b-512 of the file; "Ed": of the file itself), key id [8], signature [64]; then a line
                  "trusted comment: ..." and a line of base64 with the signature of signature and comment
"""

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleError, require
from .files import check_writable, reason

SIGNATURE = "manifest.sig"
MAX_BYTES = 4096
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "


@dataclass(frozen=True)
class PublicKey:
    """id: 8 bytes that name a key, chosen at random. key: 32 bytes."""

    id: bytes
    key: bytes


@dataclass(frozen=True, repr=False)
class SecretKey:
    """id: 8 bytes. seed: 32 bytes, the secret."""

    id: bytes
    seed: bytes


def load_public_key(value):
    """Return the PublicKey in a .pub file, or in the text of such a file's second line; BundleError if it is none."""
    text = str(value)
    if not (len(text) == 56 and text.startswith("RW") and not Path(text).exists()):
        text = _lines(Path(value), "require_signature", 2)[1]
    data = _decode(text, 42, "require_signature must be a public key made by pidiff-export --new-key or minisign")
    require(data[:2] == b"Ed", "require_signature", "be an Ed25519 public key", repr(data[:2]), BundleError)
    return PublicKey(data[2:10], data[10:])


def load_secret_key(path):
    """Return the SecretKey in a .key file; BundleError if it is none, has a password or is damaged."""
    what = "sign must be a secret key made by pidiff-export --new-key or minisign -G -W"
    data = _decode(_lines(Path(path), "sign", 2)[1], 158, what)
    require(data[2:4] == b"\0\0", "sign", "be a secret key without a password (minisign -G -W)", f"one with a password, {path}",
            BundleError)
    key_id, seed, public, check = data[54:62], data[62:94], data[94:126], data[126:]
    good = data[:2] == b"Ed" and data[4:6] == b"B2" and check == _check(key_id, seed + public)
    require(good, "sign", "be a whole secret key", f"a damaged or another file, {path}", BundleError)
    return SecretKey(key_id, seed)


def new_key(name):
    """Write NAME.key (for its owner's eyes only) and NAME.pub, which must not exist; returns both paths."""
    ed25519, serialization = _cryptography()
    secret, public = Path(f"{name}.key"), Path(f"{name}.pub")
    for path in (secret, public):
        check_writable(path, BundleError)
        require(not os.path.lexists(path), "new key", "be a name without files", path, BundleError)
    key, key_id = ed25519.Ed25519PrivateKey.generate(), os.urandom(8)
    raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    seed, point = key.private_bytes(*raw), key.public_key().public_bytes_raw()
    hidden = b"Ed\0\0B2" + bytes(48) + key_id + seed + point + _check(key_id, seed + point)
    _write(secret, _UNTRUSTED + f"PIDiff secret key {_name(key_id)}\n", hidden, 0o600)
    _write(public, _UNTRUSTED + f"PIDiff public key {_name(key_id)}\n", b"Ed" + key_id + point, 0o666)
    return secret, public


def sign(data, secret, comment):
    """Return the bytes of manifest.sig for `data`, signed with a SecretKey; `comment` is one line and is signed too."""
    ed25519, _ = _cryptography()
    key = ed25519.Ed25519PrivateKey.from_private_bytes(secret.seed)
    signature = key.sign(hashlib.blake2b(data).digest())
    both = key.sign(signature + comment.encode())
    return (f"{_UNTRUSTED}signature of a PIDiff bundle by key {_name(secret.id)}\n{_encode(b'ED' + secret.id + signature)}\n"
            f"{_TRUSTED}{comment}\n{_encode(both)}\n").encode()


def check_signature(data, path, public):
    """Check the signature file at `path` of `data` with a PublicKey; returns its trusted comment. BundleError if it is missing,
    by another key, damaged, or of other data."""
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    if not os.path.lexists(path):
        raise BundleError(f"it must be signed by key {_name(public.id)}, got no {SIGNATURE}")
    lines = _lines(path, SIGNATURE, 4)
    signature, both = (_decode(lines[i], n, f"{SIGNATURE} must be a whole signature") for i, n in ((1, 74), (3, 64)))
    require(signature[:2] in (b"ED", b"Ed") and lines[2].startswith(_TRUSTED), SIGNATURE, "be an Ed25519 signature of minisign's "
            "format", "another", BundleError)
    require(signature[2:10] == public.id, "it", f"be signed by key {_name(public.id)}", f"a signature by key "
            f"{_name(signature[2:10])}", BundleError)
    comment = lines[2].removeprefix(_TRUSTED)
    key = ed25519.Ed25519PublicKey.from_public_bytes(public.key)
    try:
        key.verify(signature[10:], hashlib.blake2b(data).digest() if signature[:2] == b"ED" else data)
        key.verify(both, signature[10:] + comment.encode())
    except InvalidSignature as e:
        raise BundleError(f"{SIGNATURE} must be the signature of this manifest.json, got that of another, or an altered one") from e
    return comment


def _cryptography():
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as e:
        raise BundleError("signatures need the extra 'sign' (pip install 'pidiff-edge[sign]'), got no cryptography") from e
    return ed25519, serialization


def _lines(path, argument, count):
    """Return the `count` lines of a short text file whose first is an untrusted comment."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except OSError as e:
        raise BundleError(f"{argument} must be a readable file, got {path}: {reason(e)}") from e
    except UnicodeDecodeError as e:
        raise BundleError(f"{argument} must be a text file, got {path}") from e
    lines = [line.removesuffix("\r") for line in lines]
    whole = len(data) <= MAX_BYTES and len(lines) == count and lines[0].startswith(_UNTRUSTED)
    require(whole, argument, f"be a text of {count} lines in minisign's format", f"another file, {path}", BundleError)
    return lines


def _decode(text, size, must):
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise BundleError(f"{must}, got no base64") from e
    if len(data) != size:
        raise BundleError(f"{must}, got {len(data)} bytes instead of {size}")
    return data


def _encode(data):
    return base64.b64encode(data).decode()


def _check(key_id, secret):
    return hashlib.blake2b(b"Ed" + key_id + secret, digest_size=32).digest()


def _name(key_id):
    """How minisign writes a key's id."""
    return f"{int.from_bytes(key_id, 'little'):016X}"


def _write(path, comment, data, mode):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(handle, "w", encoding="ascii") as file:
        file.write(comment + _encode(data) + "\n")

"""Strict JSON: what the manifest's parsers are made of. Every complaint is a BundleError that names object and key."""

import json
import math
import re

from .errors import BundleError

PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")        # one part of a path, or a name
SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_json(text, what):
    """Parse strict JSON from bytes: UTF-8, no duplicate keys, no NaN; BundleError names `what`."""

    def pairs(items):
        result = dict(items)
        if len(result) != len(items):
            names = [k for k, _ in items]
            raise BundleError(f"{what} must not repeat a key, got {next(n for n in names if names.count(n) > 1)!r} twice")
        return result

    def constant(value):
        raise BundleError(f"{what} must hold finite numbers, got {value}")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except BundleError:
        raise
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{what} must be valid JSON, got: {e}") from e


class Reader:
    """Typed access to one JSON object; errors name the object and the key."""

    def __init__(self, where, data):
        if not isinstance(data, dict):
            raise BundleError(f"{where} must be a JSON object, got {short(data)}")
        self.where, self.data = where, data

    def keys(self, names):
        """Check that the object has exactly these keys."""
        for key in self.data:
            if key not in names:
                raise BundleError(f"{self.where} must not have unknown keys, got {key!r}")
        for name in names:
            if name not in self.data:
                raise BundleError(f"{self.where} must have the key {name!r}, got an object without it")

    def get(self, key, ok, must):
        value = self.data[key]
        if not ok(value):
            raise BundleError(f"{self.where} {key} must be {must}, got {short(value)}")
        return value

    def text(self, key):
        return self.get(key, lambda v: isinstance(v, str) and 0 < len(v) <= 4096, "text")

    def one_of(self, key, allowed):
        return self.get(key, lambda v: isinstance(v, str) and v in allowed, " or ".join(allowed))

    def integer(self, key):
        return self.get(key, lambda v: type(v) is int and 0 < v < 2**53, "a positive integer")

    def size(self, key):
        return self.get(key, lambda v: type(v) is int and 0 <= v < 2**53, "a size in bytes")

    def boolean(self, key):
        return self.get(key, lambda v: isinstance(v, bool), "true or false")

    def sha256(self, key):
        return self.get(key, lambda v: isinstance(v, str) and SHA256.fullmatch(v), "a sha256 digest")

    def mapping(self, key):
        return self.get(key, lambda v: isinstance(v, dict), "a JSON object")

    def integers(self, key):
        ok = lambda v: isinstance(v, list) and v and all(type(x) is int and x > 0 for x in v)
        return tuple(self.get(key, ok, "a list of positive integers"))

    def numbers(self, *names):
        self.keys(names)
        ok = lambda v: type(v) in (int, float) and math.isfinite(v)
        return {n: float(self.get(n, ok, "a finite number")) for n in names}


def to_plain(value):
    """Turn dataclasses and tuples into what a JSON parser would return."""
    if hasattr(value, "__dataclass_fields__"):
        return {k: to_plain(getattr(value, k)) for k in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

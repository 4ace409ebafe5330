"""The manifest of a bundle: what manifest.json holds, as frozen dataclasses with strict parsing.

Strict means: unknown and missing keys, duplicate keys, NaN, values of another type, unsafe paths and unknown schema
versions are errors (BundleError, one sentence). Nothing here opens a file.
"""

import json
import math
import re
from dataclasses import dataclass, field

from .errors import BundleError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 4096

DTYPES = ("float32", "float16", "int64")
# Names of the graphs' inputs and outputs are part of the format; "?" marks an output that may be absent.
GRAPH_IO = {
    "text_encoder": (("input_ids",), ("prompt_embeds",)),
    "w_plus_encoder": (("face",), ("w_plus",)),
    "text_conditioner": (("prompt_embeds",), ("text_kv",)),
    "id_conditioner": (("w_plus", "level_scale"), ("id_fold",)),
    "time_conditioner": (("timesteps",), ("time_table",)),
    "unet": (("latents", "time_row", "text_kv", "id_fold", "id_mask", "id_scale"), ("model_output", "identity_map?")),
    "vae_decoder": (("latents",), ("image",)),
    "vae_encoder": (("image",), ("latents",)),
    "face_pnet": (("image",), ("offsets", "probabilities")),
    "face_rnet": (("image",), ("offsets", "probabilities")),
    "face_onet": (("image",), ("offsets", "landmarks", "probabilities")),
    "face_matting": (("face",), ("alpha",)),
}
REQUIRED_GRAPHS = tuple(list(GRAPH_IO)[:7])  # what a generation runs; the others serve enrolment and training
REQUIRED_FILES = ("schedule.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` holds sizes, and names for axes that are free ("batch", ...)."""

    name: str
    dtype: str
    shape: tuple


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its file in the bundle, its inputs and its outputs (tuples of TensorSpec, in graph order)."""

    file: str
    inputs: tuple
    outputs: tuple

    def tensor(self, name):
        """Return the spec of the input or output `name`, or None."""
        return next((t for t in (*self.inputs, *self.outputs) if t.name == name), None)


@dataclass(frozen=True)
class FileSpec:
    """Digest (64 lower-case hex digits) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class IdentitySpec:
    """The identity branch: query mode, tokens per person T, null key or not, groups of W+ levels."""

    mode: str
    tokens: int
    has_null: bool
    num_groups: int


@dataclass(frozen=True)
class UNetSpec:
    """Heads and channels of every `attn2` layer, in the order of `unet.attn_processors` (down, up, mid)."""

    heads: tuple
    channels: tuple


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the model. `image_size` in pixels; latents are [latent_channels, n, n], n = image_size // scale factor."""

    latent_channels: int
    image_size: int
    vae_scale_factor: int
    text_length: int
    prompt_dim: int
    w_plus_layers: int
    w_plus_dim: int
    face_size: int
    identity: IdentitySpec
    unet: UNetSpec

    @property
    def latent_shape(self):
        """Shape of one image's latents, [c, h, w]."""
        side = self.image_size // self.vae_scale_factor
        return (self.latent_channels, side, side)


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json.

    files: relative path -> FileSpec, every file but the manifest. scheduler: how to sample when the caller does not say
    (optional keys `solver`, `num_inference_steps`, `guidance_scale`, `use_karras_sigmas`); the noise schedule itself is
    schedule.json. sources: checkpoint file -> sha256. parity: graph -> {max_abs, mean_abs, max_rel} against PyTorch.
    """

    name: str
    family: str
    precision: str
    attention: str
    opset: int
    graphs: dict
    files: dict
    model: ModelSpec
    scheduler: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    licences: dict = field(default_factory=dict)
    tools: dict = field(default_factory=dict)
    parity: dict = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_dict(cls, data):
        """Check a parsed JSON object completely and build the manifest from it."""
        _version(data)
        at = _Reader("manifest.json", data)
        at.keys(cls.__dataclass_fields__)
        files = {_path("files", p): _file(p, spec) for p, spec in at.mapping("files").items()}
        if len(files) > MAX_FILES or len({p.lower() for p in files}) != len(files):
            raise BundleError(f"files must be at most {MAX_FILES} different paths, got {len(files)}")
        manifest = cls(
            name=at.text("name"), family=at.one_of("family", ("sd1",)),
            precision=at.one_of("precision", ("fp32", "fp16")), attention=at.one_of("attention", ("fused", "standard")),
            opset=at.integer("opset"), files=files, model=_model(at.mapping("model")),
            graphs={name: _graph(name, g, files) for name, g in at.mapping("graphs").items()},
            scheduler=_scheduler(at.mapping("scheduler")), sources=_texts("sources", at.mapping("sources"), _SHA256),
            licences=_texts("licences", at.mapping("licences")), tools=_texts("tools", at.mapping("tools")),
            parity={k: _Reader(f"parity.{k}", v).numbers("max_abs", "mean_abs", "max_rel")
                    for k, v in at.mapping("parity").items()},
        )
        for graph in REQUIRED_GRAPHS:
            if graph not in manifest.graphs:
                raise BundleError(f"graphs must hold {graph}, got only {', '.join(sorted(manifest.graphs)) or 'none'}")
        for path in REQUIRED_FILES:
            if path not in files:
                raise BundleError(f"files must list {path}, got a bundle without it")
        return manifest

    @classmethod
    def from_json(cls, text):
        """Parse the bytes of manifest.json."""
        return cls.from_dict(parse_json(text, MANIFEST))

    def to_dict(self):
        """Return what `from_dict` takes."""
        return to_plain(self)


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


def check_path(path):
    """Return `path` if it is a plain relative path that stays in the bundle; raise BundleError otherwise."""
    return _path("path", path)


class _Reader:
    """Typed access to one JSON object; errors name the object and the key."""

    def __init__(self, where, data):
        if not isinstance(data, dict):
            raise BundleError(f"{where} must be a JSON object, got {_short(data)}")
        self.where, self.data = where, data

    def keys(self, names):
        """Check that the object has exactly these keys."""
        for key in self.data:
            if key not in names:
                raise BundleError(f"{self.where} must not have unknown keys, got {key!r}")
        for name in names:
            if name not in self.data:
                raise BundleError(f"{self.where} must have the key {name!r}, got an object without it")

    def _get(self, key, ok, must):
        value = self.data[key]
        if not ok(value):
            raise BundleError(f"{self.where} {key} must be {must}, got {_short(value)}")
        return value

    def text(self, key):
        return self._get(key, lambda v: isinstance(v, str) and 0 < len(v) <= 4096, "text")

    def one_of(self, key, allowed):
        return self._get(key, lambda v: isinstance(v, str) and v in allowed, " or ".join(allowed))

    def integer(self, key):
        return self._get(key, lambda v: type(v) is int and 0 < v < 2**53, "a positive integer")

    def size(self, key):
        return self._get(key, lambda v: type(v) is int and 0 <= v < 2**53, "a size in bytes")

    def boolean(self, key):
        return self._get(key, lambda v: isinstance(v, bool), "true or false")

    def mapping(self, key):
        return self._get(key, lambda v: isinstance(v, dict), "a JSON object")

    def integers(self, key):
        ok = lambda v: isinstance(v, list) and v and all(type(x) is int and x > 0 for x in v)
        return tuple(self._get(key, ok, "a list of positive integers"))

    def numbers(self, *names):
        self.keys(names)
        ok = lambda v: type(v) in (int, float) and math.isfinite(v)
        return {n: float(self._get(n, ok, "a finite number")) for n in names}


def _version(data):
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or type(version) is not int:
        raise BundleError(
            f"schema_version must be {SCHEMA_VERSION} for this PIDiff, got {_short(version)}: "
            "export the bundle again, or use the PIDiff that wrote it"
        )


def _model(data):
    at = _Reader("model", data)
    at.keys(ModelSpec.__dataclass_fields__)
    sizes = [k for k in ModelSpec.__dataclass_fields__ if k not in ("identity", "unet")]
    identity = _Reader("model.identity", data["identity"])
    identity.keys(IdentitySpec.__dataclass_fields__)
    unet = _Reader("model.unet", data["unet"])
    unet.keys(UNetSpec.__dataclass_fields__)
    heads, channels = unet.integers("heads"), unet.integers("channels")
    if len(heads) != len(channels) or any(c % h for h, c in zip(heads, channels)):
        raise BundleError(f"model.unet channels must be multiples of heads, layer by layer, got {channels} and {heads}")
    spec = ModelSpec(
        **{k: at.integer(k) for k in sizes},
        identity=IdentitySpec(identity.one_of("mode", ("parallel", "residual")), identity.integer("tokens"),
                              identity.boolean("has_null"), identity.integer("num_groups")),
        unet=UNetSpec(heads, channels),
    )
    if spec.image_size % spec.vae_scale_factor or spec.image_size > 8192:
        raise BundleError(f"model image_size must be a multiple of vae_scale_factor up to 8192, got {spec.image_size}")
    return spec


def _graph(name, data, files):
    at = _Reader(f"graphs.{name}", data)
    at.keys(GraphSpec.__dataclass_fields__)
    spec = GraphSpec(at.text("file"), _tensors(at, "inputs"), _tensors(at, "outputs"))
    if spec.file not in files:
        raise BundleError(f"graphs.{name} file must be listed in files, got {_short(spec.file)}")
    inputs, outputs = GRAPH_IO.get(name, ((), ()))
    have = [t.name for t in spec.inputs], [t.name for t in spec.outputs]
    needed = {o for o in outputs if not o.endswith("?")}
    if name in GRAPH_IO and (set(have[0]) != set(inputs) or not needed <= set(have[1])):
        raise BundleError(f"graphs.{name} must map {', '.join(inputs)} to {', '.join(outputs)}, got {have[0]} to {have[1]}")
    return spec


def _tensors(at, key):
    specs = []
    for item in at._get(key, lambda v: isinstance(v, list) and 0 < len(v) <= 64, "a list of tensors"):
        tensor = _Reader(f"{at.where} {key}", item)
        tensor.keys(TensorSpec.__dataclass_fields__)
        dim = lambda d: (type(d) is int and 0 < d < 2**31) or (isinstance(d, str) and _PART.fullmatch(d))
        shape = tensor._get("shape", lambda v: isinstance(v, list) and len(v) <= 8 and all(map(dim, v)),
                            "a list of sizes or axis names")
        specs.append(TensorSpec(tensor.text("name"), tensor.one_of("dtype", DTYPES), tuple(shape)))
    if len({s.name for s in specs}) != len(specs):
        raise BundleError(f"{at.where} {key} must have different names, got {[s.name for s in specs]}")
    return tuple(specs)


def _scheduler(data):
    checks = {
        "solver": lambda v: isinstance(v, str) and _PART.fullmatch(v), "use_karras_sigmas": lambda v: isinstance(v, bool),
        "num_inference_steps": lambda v: type(v) is int and 0 < v <= 1000,
        "guidance_scale": lambda v: type(v) in (int, float) and 0 <= v <= 100,
    }
    for key, value in data.items():
        if key not in checks or not checks[key](value):
            raise BundleError(f"scheduler must hold only {', '.join(checks)} with usable values, got {key}={_short(value)}")
    return dict(data)


def _texts(where, data, pattern=None):
    for key, value in data.items():
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            raise BundleError(f"{where} {key!r} must be {'a sha256 digest' if pattern else 'text'}, got {_short(value)}")
    return dict(data)


def _file(path, data):
    at = _Reader(f"files {path!r}", data)
    at.keys(FileSpec.__dataclass_fields__)
    return FileSpec(at._get("sha256", lambda v: isinstance(v, str) and _SHA256.fullmatch(v), "a sha256 digest"),
                    at.size("size"))


def _path(where, path):
    ok = isinstance(path, str) and len(path) <= 512 and all(_PART.fullmatch(part) for part in path.split("/"))
    if not ok or path.lower() == MANIFEST:
        raise BundleError(f"{where} must be plain relative paths inside the bundle, got {_short(path)}")
    return path


def to_plain(value):
    """Turn dataclasses and tuples into what a JSON parser would return."""
    if hasattr(value, "__dataclass_fields__"):
        return {k: to_plain(getattr(value, k)) for k in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

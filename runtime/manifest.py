"""The manifest of a bundle: what manifest.json holds, as frozen dataclasses with strict parsing.

Strict means: unknown and missing keys, duplicate keys, NaN, values of another type, unsafe paths and unknown schema
versions are errors (BundleError, one sentence). Nothing here opens a file.
"""

from dataclasses import dataclass, field

from .engine_specs import parse_engines
from .errors import BundleError
from .signature import SIGNATURE
from .strict import PART, SHA256, Reader, parse_json, short, to_plain

SCHEMA_VERSION = 4          # 2 added `engines`, 3 `float32_layers`, 4 `left_out` and `driver` of engines; older ones are read and mean that there are none
_SINCE = {"engines": 2, "float32_layers": 3}
MANIFEST = "manifest.json"
REPORTS = ("report.json", "report.html")      # the verification report: for people, no part of what runs
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
    "unet": (("latents", "time_row", "text_kv", "id_fold", "id_mask", "id_scale"), 
             ("model_output", "identity_map?", "deep_features?")),
    "vae_decoder": (("latents",), ("image",)),
    "vae_encoder": (("image",), ("latents",)),
    "face_pnet": (("image",), ("offsets", "probabilities")),
    "face_rnet": (("image",), ("offsets", "probabilities")),
    "face_onet": (("image",), ("offsets", "landmarks", "probabilities")),
    "face_matting": (("face",), ("alpha",)),
    "unet_cached": (("latents", "time_row", "text_kv", "id_fold", "id_mask", "id_scale", "deep_features"), ("model_output",)),
}
REQUIRED_GRAPHS = tuple(list(GRAPH_IO)[:7])  # what a generation runs; the others serve enrolment and training
REQUIRED_FILES = ("schedule.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
SPACINGS = ("leading", "trailing", "linspace")        # of timesteps: what `scheduler` may name


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
    """The identity branch: query mode, tokens per person T, null key or not, groups of W+ levels (1: the code has no levels)."""

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
    """Sizes of the model. `image_size` in pixels; latents are [latent_channels, n, n], n = image_size // scale factor.

    A person's code is [w_plus_layers, w_plus_dim], and zeros stand for nobody: a W+ code, or with an IP-Adapter CLIP's embedding
    [1, D] or the tokens of its resampler, in which the tokens of nobody count as zero. Names are those of W+ in any case.
    """

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
    (optional keys `solver`, `num_inference_steps`, `guidance_scale`, `use_karras_sigmas`, `timestep_spacing`, `eta`); the noise schedule
    itself is schedule.json. opset: the newest of any graph. sources: checkpoint file -> sha256. parity: graph -> {max_abs, mean_abs, max_rel} against PyTorch.
    float32_layers: graph -> {module: why it is computed in float32 inside a float16 or int8 graph}; precision int8 is that of the
    UNet, all else is computed in float32, with int8-fp16 in float16. engines: set name -> EngineSet
    (engine_specs.py). An older manifest is upgraded when it is read.
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
    float32_layers: dict = field(default_factory=dict)
    engines: dict = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_dict(cls, data):
        """Check a parsed JSON object completely and build the manifest from it."""
        version = _version(data)
        at = Reader("manifest.json", data)
        at.keys([k for k in cls.__dataclass_fields__ if version >= _SINCE.get(k, 1)])
        files = {_path("files", p): _file(p, spec) for p, spec in at.mapping("files").items()}
        if len(files) > MAX_FILES or len({p.lower() for p in files}) != len(files):
            raise BundleError(f"files must be at most {MAX_FILES} different paths, got {len(files)}")
        graphs = {name: _graph(name, g, files) for name, g in at.mapping("graphs").items()}
        manifest = cls(
            name=at.text("name"), family=at.one_of("family", ("sd1",)),
            precision=at.one_of("precision", ("fp32", "fp16", "int8", "int8-fp16")), attention=at.one_of("attention", ("fused", "standard")),
            opset=at.integer("opset"), files=files, model=_model(at.mapping("model")),
            graphs=graphs, engines=parse_engines(at.mapping("engines"), graphs, files, version) if version > 1 else {},
            scheduler=_scheduler(at.mapping("scheduler")), sources=_texts("sources", at.mapping("sources"), SHA256),
            licences=_texts("licences", at.mapping("licences")), tools=_texts("tools", at.mapping("tools")),
            parity={k: Reader(f"parity.{k}", v).numbers("max_abs", "mean_abs", "max_rel")
                    for k, v in at.mapping("parity").items()},
            float32_layers=_layers(at.mapping("float32_layers"), graphs) if version > 2 else {},
        )
        for graph in REQUIRED_GRAPHS:
            if graph not in manifest.graphs:
                raise BundleError(f"graphs must hold {graph}, got only {', '.join(sorted(manifest.graphs)) or 'none'}")
        _check_cached(manifest.graphs)
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


def check_path(path):
    """Return `path` if it is a plain relative path that stays in the bundle; raise BundleError otherwise."""
    return _path("path", path)


def _version(data):
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise BundleError(
            f"schema_version must be 1 to {SCHEMA_VERSION} for this PIDiff, got {short(version)}: "
            "export the bundle again, or use the PIDiff that wrote it"
        )
    return version


def _model(data):
    at = Reader("model", data)
    at.keys(ModelSpec.__dataclass_fields__)
    sizes = [k for k in ModelSpec.__dataclass_fields__ if k not in ("identity", "unet")]
    identity = Reader("model.identity", data["identity"])
    identity.keys(IdentitySpec.__dataclass_fields__)
    unet = Reader("model.unet", data["unet"])
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
    at = Reader(f"graphs.{name}", data)
    at.keys(GraphSpec.__dataclass_fields__)
    spec = GraphSpec(at.text("file"), _tensors(at, "inputs"), _tensors(at, "outputs"))
    if spec.file not in files:
        raise BundleError(f"graphs.{name} file must be listed in files, got {short(spec.file)}")
    inputs, outputs = GRAPH_IO.get(name, ((), ()))
    have = [t.name for t in spec.inputs], [t.name for t in spec.outputs]
    needed = {o for o in outputs if not o.endswith("?")}
    if name in GRAPH_IO and (set(have[0]) != set(inputs) or not needed <= set(have[1])):
        raise BundleError(f"graphs.{name} must map {', '.join(inputs)} to {', '.join(outputs)}, got {have[0]} to {have[1]}")
    return spec


def _check_cached(graphs):
    """A step with cached features takes exactly what the whole UNet gives and takes."""
    if "unet_cached" not in graphs:
        return
    whole, cached = graphs["unet"], graphs["unet_cached"]
    for tensor in (*cached.inputs, *cached.outputs):
        if whole.tensor(tensor.name) != tensor:
            raise BundleError(f"graphs.unet_cached {tensor.name} must be that of graphs.unet, got {short(tensor)}")


def _tensors(at, key):
    specs = []
    for item in at.get(key, lambda v: isinstance(v, list) and 0 < len(v) <= 64, "a list of tensors"):
        tensor = Reader(f"{at.where} {key}", item)
        tensor.keys(TensorSpec.__dataclass_fields__)
        dim = lambda d: (type(d) is int and 0 < d < 2**31) or (isinstance(d, str) and PART.fullmatch(d))
        shape = tensor.get("shape", lambda v: isinstance(v, list) and len(v) <= 8 and all(map(dim, v)),
                            "a list of sizes or axis names")
        specs.append(TensorSpec(tensor.text("name"), tensor.one_of("dtype", DTYPES), tuple(shape)))
    if len({s.name for s in specs}) != len(specs):
        raise BundleError(f"{at.where} {key} must have different names, got {[s.name for s in specs]}")
    return tuple(specs)


def _scheduler(data):
    checks = {
        "solver": lambda v: isinstance(v, str) and PART.fullmatch(v), "use_karras_sigmas": lambda v: isinstance(v, bool),
        "num_inference_steps": lambda v: type(v) is int and 0 < v <= 1000,
        "guidance_scale": lambda v: type(v) in (int, float) and 0 <= v <= 100,
        "timestep_spacing": lambda v: v in SPACINGS,
        "eta": lambda v: type(v) in (int, float) and 0 <= v <= 1,
    }
    for key, value in data.items():
        if key not in checks or not checks[key](value):
            raise BundleError(f"scheduler must hold only {', '.join(checks)} with usable values, got {key}={short(value)}")
    return dict(data)


def _texts(where, data, pattern=None):
    for key, value in data.items():
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            raise BundleError(f"{where} {key!r} must be {'a sha256 digest' if pattern else 'text'}, got {short(value)}")
    return dict(data)


def _layers(data, graphs):
    for graph, layers in data.items():
        if graph not in graphs or not isinstance(layers, dict):
            raise BundleError(f"float32_layers must hold a JSON object for graphs of the bundle, got {short(graph)}")
    return {graph: _texts(f"float32_layers.{graph}", layers) for graph, layers in data.items()}


def _file(path, data):
    at = Reader(f"files {path!r}", data)
    at.keys(FileSpec.__dataclass_fields__)
    return FileSpec(at.sha256("sha256"), at.size("size"))


def _path(where, path):
    ok = isinstance(path, str) and len(path) <= 512 and all(PART.fullmatch(part) for part in path.split("/"))
    if not ok or path.lower() in (MANIFEST, SIGNATURE):
        raise BundleError(f"{where} must be plain relative paths inside the bundle, got {short(path)}")
    return path

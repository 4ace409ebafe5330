"""Writes a bundle: stores each part's weights, writes and verifies its graphs, then commits the manifest."""

import ctypes
import functools
import gc
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pidiff.autoencoder import PatchAutoencoder
from pidiff.caching import check_outer
from pidiff.checkpoint import load_strict, read_tensors
from pidiff.config import save_config
from pidiff.matting import FaceMatting
from pidiff.model import Model
from pidiff.runtime.bundle import Bundle, BundleWriter, GraphSpec, sha256_file, shipped_bundle
from pidiff.runtime.schedule import make_schedule
from pidiff.runtime.signature import SecretKey
from pidiff.unet import cross_attention_layers

from . import parts
from .attention import Form
from .calibrate import Calibration, calibrate
from .graphs import Graph
from .parts import Sizes, example_of
from .picture import draw
from .quantize import OPSET_HALF, write_quantized
from .ranges import Ranges, float32_islands, measure
from .report import check_mode, write_report
from .source import Source
from .step import step_unet
from .to_onnx import read_spec, write_graph
from .verify import Case, Parity, custom_op_library, measure_engine, other_engines, verify_graph
from .weights import ExportError, WeightIndex, drop_tensors, load_stored, write_safetensors

FACE_GRAPHS = ("face_pnet", "face_rnet", "face_onet")
FACE_LICENCE = "LICENSE-facenet-pytorch"
_UNET, _VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
STEPS = 13          # graphs to write and verify, and a picture, for a progress bar; see `Report`
INT8_STEPS = 4      # more of them
_INT8 = {"fp32": "int8", "fp16": "int8-fp16"}       # the manifest's word by what is computed in beside int8

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """form: how attention is written. fp16: store and compute in float16. int8: compute layers of the UNet in int8. sampling: defaults stored for the runtime
    (solver, num_inference_steps, guidance_scale, use_karras_sigmas, timestep_spacing, eta). outer: up layers that a cached step runs (pidiff.caching); 0
    writes no graph for it. report: full, short, none, or auto (report.py). secret: key to sign the bundle with."""

    form: Form = Form()
    fp16: bool = False
    int8: bool = False
    name: str | None = None
    sampling: dict = field(default_factory=dict)
    outer: int = 1
    report: str = "auto"
    secret: SecretKey | None = None


def export_bundle(source: Source, out: Path, options: ExportOptions = ExportOptions(), report: Report = lambda _: None):
    """Export `source` to the new folder `out`; returns the Manifest, parity figures included.

    `report` is called with the name of every graph when it has been verified, and before a picture is drawn. Raises ExportError, CheckpointError or
    BundleError in one sentence; whatever happens, `out` is either whole or not there.
    """
    if options.int8 and options.form.opset != 18:
        # ONNX Runtime 1.32 makes a graph of opset 23 with a Transpose behind a layer into one that it cannot run.
        raise ExportError(f"opset must be 18 with int8, got {options.form.opset}")
    if options.form.fused:
        custom_op_library()
    _check_disk(source, out, options.fp16)
    options = replace(options, report=check_mode(options.report, source))
    with BundleWriter(out) as writer, torch.no_grad():
        return _Export(source, writer.path, options, report).run(writer)


class _Export:
    def __init__(self, source: Source, root: Path, options: ExportOptions, report: Report):
        self.source, self.root, self.options, self.report = source, root, options, report
        self.dtype = torch.float16 if options.fp16 else torch.float32
        self.precision = "fp16" if options.fp16 else "fp32"
        self.weights, self.sizes = WeightIndex(root), Sizes()
        self.graphs: dict[str, GraphSpec] = {}
        self.parity: dict[str, Parity] = {}
        self.ranges: dict[str, Ranges] = {}
        self.engines: dict[str, dict[str, dict]] = {}       # engine beside ONNX Runtime -> graph -> what was measured
        self.unet_cases: dict[str, Case] = {}
        self.int8: Calibration | None = None
        self.old = _manifest_of(source.folder)
        if self.old is not None and self.old.precision.startswith("int8"):
            raise ExportError(f"MODEL must hold float weights, got the int8 bundle {source.folder}: export what it was made of")

    def run(self, writer: BundleWriter):
        torch.manual_seed(0)
        self._check_sampling()
        self._texts()
        # The UNet's configuration says which size the others are verified at.
        config = self.source.config("unet")
        side = config.get("sample_size")
        if not isinstance(side, int):
            raise ExportError(f"unet sample_size must be a number of latent pixels, got {side!r}")
        self.sizes.side, self.sizes.channels = side, config["in_channels"]
        self.sizes.levels = len(config["block_out_channels"])
        if self.options.outer:
            layers = config.get("layers_per_block", 2)
            check_outer((layers[0] if isinstance(layers, list) else layers) + 1, self.options.outer)
        self._vae()
        self._text_encoder()
        self._w_plus_encoder()
        self._matting()
        model = self._unet()
        self._faces()
        if self.options.int8:
            self._quantize(writer.draft(**self._fields(model)))
        fields = self._fields(model)
        if self.options.report != "none":
            self._report(writer.draft(**fields))
        if self.int8:
            # Not before the report: PyTorch draws its picture from these.
            drop_tensors(self.root, _UNET, {f"{layer}.weight" for layer in self.int8.ranges})
        return writer.commit(self.options.secret, **fields)

    def _sampling(self) -> dict:
        """Defaults for the runtime: those that were given, before the source bundle's, before what is usual with Stable Diffusion."""
        usual = {} if "patch_size" in self.source.config("vae") else {"guidance_scale": 7.5}
        return {**usual, **(self.old.scheduler if self.old else {}), **self.options.sampling}

    def _check_sampling(self) -> None:
        """Refuse before the work what the runtime cannot sample."""
        wanted = self._sampling()
        make_schedule(self.source.config("scheduler"), wanted.get("solver", "dpmpp_2m"), wanted.get("num_inference_steps", 20), wanted)

    def _fields(self, model: dict) -> dict:
        """The manifest's, as far as the bundle has been written."""
        kept = {n: r.islands for n, r in self.ranges.items() if r.islands}
        if self.int8 and self.int8.kept and not self.options.fp16:
            kept["unet"] = self.int8.kept
        return {
            "name": self.options.name or (self.old.name if self.old else self.source.name), "family": "sd1",
            "precision": _INT8[self.precision] if self.int8 else self.precision, "attention": self.options.form.attention,
            "opset": OPSET_HALF if self.int8 and self.options.fp16 else self.options.form.opset,
            "graphs": self.graphs, "model": model,
            "scheduler": self._sampling(), "sources": self._sources(),
            "licences": self._licences(), "tools": _tools(), "parity": {n: p.to_dict() for n, p in self.parity.items()},
            "float32_layers": kept,
        }

    def _quantize(self, manifest) -> None:
        """Turn the UNet's graphs into int8 ones, by measurement on the bundle as it is, and verify them again."""
        average = self.sizes.samples["latent_avg"].numpy()
        self.int8 = calibrate(Bundle(self.root, manifest), average, _UNET, self.report)
        for name in self.unet_cases:
            write_quantized(self.root / self.graphs[name].file, self.root, _UNET, self.options.fp16, self.int8.ranges)
        self._verify(list(self.unet_cases.items()), "int8")

    def _report(self, manifest) -> None:
        picture = None
        if self.options.report == "full":
            self.report("picture")
            picture = draw(Bundle(self.root, manifest), ["onnxruntime", *self.engines])
        write_report(self.root, manifest, self.ranges, self.engines, picture, self.int8)

    # --- parts ---

    def _vae(self) -> None:
        vae = self.source.vae()
        channels = vae.config.latent_channels * getattr(vae.config, "pack_size", 1) ** 2
        if self.sizes.channels != channels:
            raise ExportError(f"unet in_channels must be the VAE's {channels} latent channels (a UNet for inpainting takes more), got {self.sizes.channels}")
        self.sizes.free = not isinstance(vae, PatchAutoencoder)
        self._store(vae, "vae", _VAE)
        model = Model(None, None, vae, None, {}, None, None, {})
        self.sizes.scale_factor = model.vae_scale_factor
        cases = parts.vae_cases(model.decode_latents, model.encode_image, self.sizes, self.dtype)
        for graph in parts.vae_graphs(vae, self.sizes, torch.float32):
            self._measure(graph.name, graph.module, cases[graph.name].inputs)
        self._compute_in(vae, [(vae, _VAE, "")])
        written = [self._write(g, cases[g.name]) for g in parts.vae_graphs(vae, self.sizes, self.dtype)]
        del vae, model
        self._verify(written)

    def _text_encoder(self) -> None:
        clip, file = self.source.text_encoder(), "text_encoder/model.safetensors"
        # Published checkpoints, and transformers before version 5, have this prefix.
        prefix = "" if next(iter(clip.state_dict())).startswith("text_model.") else "text_model."
        self._store(clip, "text_encoder", file, prefix)
        self.sizes.text_length, self.sizes.prompt_dim = clip.config.max_position_embeddings, clip.config.hidden_size
        case = parts.text_case(clip, self.sizes)
        plain = parts.text_graph(clip, Form("standard"), torch.float32).module
        plain.causal.masked_fill_(plain.causal != 0, float("-inf"))
        self._measure("text_encoder", plain, case.inputs)
        self._compute_in(clip, [(clip, file, prefix)])
        written = [self._write(parts.text_graph(clip, self.options.form, self.dtype), case)]
        del clip
        self._verify(written)

    def _w_plus_encoder(self) -> None:
        encoder, file = self.source.w_plus_encoder(), "w_plus_encoder/model.safetensors"
        self._store(encoder, "w_plus_encoder", file)
        save_config(encoder.config, self.root / "w_plus_encoder" / "config.json")
        c = encoder.config
        self.sizes.layers, self.sizes.style_dim, self.sizes.face_size = c.num_styles, c.style_dim, c.input_size
        case = parts.encoder_case(encoder, self.sizes, self.dtype)
        self._measure("w_plus_encoder", encoder, case.inputs)
        self._compute_in(encoder, [(encoder, file, "")])
        written = [self._write(parts.encoder_graph(encoder, self.sizes, self.dtype), case)]
        del encoder
        self._verify(written)

    def _unet(self) -> dict:
        """Writes the UNet and its conditioners; returns the manifest's description of the model."""
        unet, adapter = self.source.unet()
        c, outer = adapter.config, self.options.outer
        if (sum(c.groups), c.w_plus_dim) != (self.sizes.layers, self.sizes.style_dim):
            raise ExportError(f"adapter must read the encoder's {self.sizes.layers} levels of {self.sizes.style_dim} numbers, "
                              f"got groups {c.groups} of {c.w_plus_dim}")
        if unet.config.cross_attention_dim != self.sizes.prompt_dim:
            raise ExportError(f"unet cross_attention_dim must be the text encoder's {self.sizes.prompt_dim}, "
                              f"got {unet.config.cross_attention_dim}")
        self._store(unet, "unet", _UNET)
        self._store(adapter, "adapter", "adapter/model.safetensors")
        save_config(c, self.root / "adapter" / "config.json")
        cases, widths = parts.unet_cases(unet, adapter, self.sizes, self.dtype, outer), parts.widths(unet, adapter)
        modules = [(unet, _UNET, ""), (adapter, "adapter/model.safetensors", "")]
        with step_unet(unet, c, Form("standard")) as step:
            self._measure("unet", step, *parts.step_runs(cases, self.source.config("scheduler"), self.sizes))
        self._index(modules)
        written = [self._write(g, cases[g.name]) for g in parts.conditioner_graphs(unet, adapter, self.sizes, self.dtype)]
        self._compute_in(unet, modules)
        with step_unet(unet, c, self.options.form, outer) as step:
            written += [self._write(g, cases[g.name]) for g in parts.unet_graphs(step, self.sizes, widths, self.dtype)]
        layers = cross_attention_layers(unet)
        del unet, adapter, step, modules
        self._verify(written)
        self.unet_cases = {name: case for name, case in written if name.startswith("unet")}
        s = self.sizes
        return {
            "latent_channels": s.channels, "image_size": s.side * s.scale_factor, "vae_scale_factor": s.scale_factor,
            "text_length": s.text_length, "prompt_dim": s.prompt_dim, "w_plus_layers": s.layers, "w_plus_dim": s.style_dim,
            "face_size": s.face_size,
            "identity": {"mode": c.mode, "tokens": c.num_tokens, "has_null": c.has_null, "num_groups": len(c.groups)},
            "unet": {"heads": [h for _, _, h in layers], "channels": [n for _, n, _ in layers]},
        }

    def _matting(self) -> None:
        """Foreground matting: the model's own, else the shipped one, else none (float32 in any bundle)."""
        file = "face_matting/model.safetensors"
        for folder in (self.source.folder, shipped_bundle()):
            if (folder / file).is_file():
                matting = load_strict(FaceMatting(), read_tensors(folder / file), "face_matting").eval()
                break
        else:
            return
        write_safetensors(self.root / file, matting.state_dict(), torch.float16, "face_matting")
        load_stored(matting, self.root, file)
        face = parts.smooth(3, self.sizes.face_size, self.sizes.face_size)
        case = Case({"face": face}, (matting(face),))
        self._index([(matting, file, "")])
        self._verify([self._write(parts.matting_graph(matting, self.sizes), case)])

    def _faces(self) -> None:
        folders = (self.source.folder, shipped_bundle())
        folder = next((f for f in folders if all((f / f"{n}.onnx").is_file() for n in FACE_GRAPHS)), None)
        if folder is None:
            raise ExportError(f"pidiff must be installed with its face detector, got no face_pnet.onnx in {folders[-1]}")
        for name in FACE_GRAPHS:
            shutil.copyfile(folder / f"{name}.onnx", self.root / f"{name}.onnx")
            self.graphs[name] = read_spec(self.root / f"{name}.onnx")
        if (folder / FACE_LICENCE).is_file():
            shutil.copyfile(folder / FACE_LICENCE, self.root / FACE_LICENCE)

    def _texts(self) -> None:
        folder, root = self.source.folder, self.root
        for part in ("unet", "vae", "text_encoder"):
            self.source.config(part)
            (root / part).mkdir()
            shutil.copyfile(folder / part / "config.json", root / part / "config.json")
        schedule = json.dumps(self.source.config("scheduler"), indent=2) + "\n"
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text(schedule)
        (root / "schedule.json").write_text(schedule)
        self.source.copy_tokenizer(root / "tokenizer")
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name.startswith(("LICENSE", "NOTICE", "MODEL_CARD")):
                shutil.copyfile(file, root / file.name)
        directions = folder / "directions.safetensors"
        if directions.is_file() and self.source.image_encoder is None:      # they are moves in W+
            write_safetensors(root / directions.name, read_tensors(directions), torch.float32, "directions")

    # --- steps ---

    def _store(self, module: nn.Module, part: str, file: str, prefix: str = "") -> None:
        """Write a part's weights, and make `module` hold exactly what was written."""
        dtype = torch.float16 if self.options.fp16 else self.source.stored_dtype(part)
        write_safetensors(self.root / file, {prefix + k: v for k, v in module.state_dict().items()}, dtype, part)
        load_stored(module, self.root, file, prefix)

    def _index(self, modules: list[tuple[nn.Module, str, str]]) -> None:
        self.weights.clear()
        for module, file, prefix in modules:
            self.weights.add(module, file, prefix)

    def _compute_in(self, module: nn.Module, modules: list[tuple[nn.Module, str, str]]) -> None:
        """Bring `module` to the bundle's compute dtype, and index the tensors it has then."""
        module.to(self.dtype)
        self._index(modules)

    def _measure(self, graph: str, module: nn.Module, *runs: dict[str, Tensor]) -> None:
        """Find what a float16 graph must compute in float32; `module` is in float32, its attention plain operators."""
        if self.options.fp16:
            self.ranges[graph] = measure(graph, module, runs)

    def _write(self, graph: Graph, case: Case) -> tuple[str, Case]:
        ranges = self.ranges.get(graph.name)
        with float32_islands(graph.module, ranges):
            self.weights.refresh()
            self.graphs[graph.name] = write_graph(graph, example_of(graph, self.sizes), self.options.form.opset, self.weights)
        self.weights.refresh()
        return graph.name, case

    def _verify(self, written: list[tuple[str, Case]], precision: str | None = None) -> None:
        """Run graphs of a part whose module has been let go: ONNX Runtime holds the weights a second time."""
        self.weights.clear()
        gc.collect()
        _return_memory()
        for name, case in written:
            spec = self.graphs[name]
            self.parity[name] = verify_graph(self.root / spec.file, spec, case, precision or self.precision,
                                             self.options.form.fused)
            if self.options.report == "full":
                self._other_engines(name, spec, case)
            self.report(name)
            _return_memory()

    def _other_engines(self, name: str, spec: GraphSpec, case: Case) -> None:
        """Measure a graph in the engines that are installed beside ONNX Runtime; what they cannot run is no error here."""
        for engine in other_engines():
            try:
                parity, computed = measure_engine(engine, self.root / spec.file, spec, case, self.options.form.fused)
                found = {**parity.to_dict(), "computed_in": computed}
            except ValueError as error:
                found = {"problem": str(error)}
            self.engines.setdefault(engine, {})[name] = found

    # --- manifest ---

    def _sources(self) -> dict[str, str]:
        """Digests of the checkpoint; a bundle passes its own on, so that re-exports keep their origin."""
        s = self.source
        loras = {f"lora/{lora.path.name} * {lora.scale:g}": sha256_file(lora.path) for lora in s.loras}
        if self.old is not None and s.adapter_file is s.encoder_file is s.single_file is None and self.old.sources:
            return {**self.old.sources, **loras}
        known = functools.cache(sha256_file)         # a checkpoint in one file holds several parts
        return {**{f"{part}/{file.name}": known(file) for part in ("unet", "vae", "text_encoder", "w_plus_encoder", "adapter")
                   for file in s.weight_files(part)}, **loras}

    def _licences(self) -> dict[str, str]:
        own = sorted(f.name for f in self.root.iterdir() if f.name.startswith("LICENSE") and f.name != FACE_LICENCE)
        found = {"model": f"see {', '.join(own)}" if own else "see the licence of the source model",
                 "face detector": f"MIT, see {FACE_LICENCE}"}
        return {**found, **(self.old.licences if self.old else {})}


def _manifest_of(folder: Path):
    """Manifest of a source that is itself a bundle, its files verified; None for a plain model folder."""
    return Bundle.open(folder).manifest if (folder / "manifest.json").is_file() else None


def _check_disk(source: Source, out: Path, fp16: bool) -> None:
    need = 32 << 20
    for part in ("unet", "vae", "text_encoder", "w_plus_encoder", "adapter"):
        stored = source.stored_dtype(part)
        need += source.size(part) * (torch.float16 if fp16 else stored).itemsize // stored.itemsize
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise ExportError(f"out must be on a disk with {need / 2**30:.1f} GiB free, got {free / 2**30:.1f} GiB at {place}")


def _tools() -> dict[str, str]:
    return {n: importlib.metadata.version(n) for n in ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")}


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass

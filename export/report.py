"""The verification report of a bundle: report.json, and report.html with the same figures and the pictures in it.

`full` measures every graph in every engine that is here and draws one picture in PyTorch and in each. `short` holds what the
export has measured anyway (ONNX Runtime, and what float16 does to every layer). `auto` is full for models whose UNet has at
most 100 million parameters: for Stable Diffusion the picture would take longer than the export.
"""

import base64
import json
from pathlib import Path

import numpy as np

from pidiff.runtime.bundle import REPORTS, Manifest
from pidiff.runtime.images import encode_png
from pidiff.runtime.memory import available_memory

from .calibrate import Calibration
from .engine_report import VERSION, engines_section
from .errors import ExportError
from .pages import number, page, table, text
from .picture import LARGE, Picture
from .ranges import Ranges
from .source import Source

MODES = ("auto", "full", "short", "none")
REFERENCE = "PyTorch in float32 on the bundle's own weights, identity branch unfolded, timestep and text inside the UNet"
_PARTS = ("unet", "vae", "text_encoder", "w_plus_encoder", "adapter")


def check_mode(mode: str, source: Source) -> str:
    """Turn auto into full or short; ExportError, before any work, if `full` is asked for and will not fit into memory."""
    if mode not in MODES:
        raise ExportError(f"report must be one of {', '.join(MODES)}, got {mode!r}")
    if mode in ("short", "none"):
        return mode
    parameters = {p: source.size(p) // source.stored_dtype(p).itemsize for p in _PARTS}
    if mode == "auto":
        return "short" if parameters["unet"] > LARGE else "full"
    needed, available = predicted_memory(parameters), available_memory()
    if available is not None and needed > available:
        raise ExportError(f"memory must be at least {needed / 2**30:.1f} GiB for a full report of this model, got "
                          f"{available / 2**30:.1f} GiB available: --report short needs none of its own")
    return mode


def predicted_memory(parameters: dict[str, int]) -> int:
    """Bytes that drawing the picture takes, from sizes: first PyTorch holds the model in float32, then an engine the UNet
    twice (as stored or widened, and packed) and the rest once; and 1 GiB for libraries, and for layers of large models."""
    total = sum(parameters.values())
    return (1 << 30) + 4 * total + 4 * parameters["unet"]


def write_report(root: Path, manifest: Manifest, ranges: dict[str, Ranges], engines: dict[str, dict[str, dict]],
                 picture: Picture | None, int8: Calibration | None = None) -> None:
    """Write both files into the bundle at `root`. engines: name -> graph -> figures, of those beside ONNX Runtime."""
    content = make_report(manifest, ranges, engines, picture, int8)
    (root / REPORTS[0]).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (root / REPORTS[1]).write_text(make_html(content, picture.images if picture else {}), encoding="utf-8")


def make_report(manifest: Manifest, ranges: dict[str, Ranges], engines: dict[str, dict[str, dict]],
                picture: Picture | None, int8: Calibration | None = None) -> dict:
    """Everything that was measured, as JSON."""
    graphs = {}
    for graph, parity in manifest.parity.items():
        half = manifest.precision.endswith("fp16") and graph not in _FLOAT32
        quantized = int8 is not None and graph.startswith("unet")
        found = {"onnxruntime": {**parity, "computed_in": (_INT8 if quantized else "") + (_WIDENED if half else "float32")}}
        graphs[graph] = {**found, **{e: g[graph] for e, g in engines.items() if graph in g}}
    return {
        "version": VERSION, "bundle": manifest.name, "precision": manifest.precision, "attention": manifest.attention,
        "opset": manifest.opset, "reference": REFERENCE, "tools": manifest.tools, "graphs": graphs,
        "float16": {graph: r.to_dict() for graph, r in ranges.items()},
        "int8": int8.to_dict() if int8 else None,
        "picture": {"settings": picture.settings, "figures": picture.figures} if picture else None,
        "compiled_engines": {},          # see engine_report.py
    }


_WIDENED = "float16, widened where ONNX Runtime has no kernel for it"
_INT8 = "int8 where quantised, else "
_FLOAT32 = ("text_conditioner", "id_conditioner", "time_conditioner", "face_matting")     # in any bundle; see graphs.py


def make_html(report: dict, images: dict[str, np.ndarray]) -> str:
    """The report as one page that needs no other file and no network."""
    title = f"{report['bundle']}, {report['precision']}, {report['attention']} attention, opset {report['opset']}"
    rows = [(graph, engine, f["computed_in"], *(number(f[k]) for k in ("max_abs", "mean_abs", "max_rel")))
            if "problem" not in f else (graph, engine, f"cannot run it: {f['problem']}", "", "", "")
            for graph, found in report["graphs"].items() for engine, f in found.items()]
    parts = [f"<h1>Verification of {text(title)}</h1><p class=note>Reference: {text(report['reference'])}.</p>",
             "<h2>Graphs</h2>", table(("graph", "engine", "computed in", "max error", "mean error", "max relative"), rows, 3),
             "<h2>Picture</h2>", _picture(report["picture"], images), "<h2>float16</h2>", _float16(report), "<h2>int8</h2>", _int8(report["int8"]),
             f"{engines_section(report['compiled_engines'])}<p class=note>Made with "
             f"{text(', '.join(f'{k} {v}' for k, v in report['tools'].items()))}.</p>"]
    return page(f"Verification of {title}", "\n".join(parts))


def _picture(picture: dict | None, images: dict[str, np.ndarray]) -> str:
    if picture is None:
        return "<p>None was drawn; <code>--report full</code> draws one. The graph <code>unet</code> above is one step.</p>"
    s = picture["settings"]
    figures = [f"<figure><img alt='{text(name)}' src='data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}'>"
               f"<figcaption>{text(name)}</figcaption></figure>" for name, image in images.items()]
    rows = []
    for engine, f in picture["figures"].items():
        if "problem" in f:
            rows.append((engine, f"cannot draw it: {f['problem']}", "", "", ""))
        elif engine != "pytorch":
            psnr = "equal" if f["psnr_db"] is None else f"{f['psnr_db']:.1f}"
            rows.append((engine, psnr, str(f["max_levels"]), f"{f['code_similarity_to_pytorch']:.4f}",
                         f"{f['code_similarity_to_person']:.4f}"))
        else:
            rows.append((engine, "", "", "", f"{f['code_similarity_to_person']:.4f}"))
    head = ("drawn by", "PSNR, dB", "max difference, levels", "W+ similarity to PyTorch's", "W+ similarity to the person")
    return (f"<p>“{text(s['prompt'])}”, seed {s['seed']}, {s['num_inference_steps']} steps of {text(s['scheduler'])}, guidance "
            f"{s['guidance_scale']:g}, of a person who is a W+ code near the average.</p>{''.join(figures)}{table(head, rows, 1)}"
            f"<p class=note>W+ similarity: cosine of two codes less the average code, as the bundle's own w_plus_encoder reads them "
            f"from {text(s['codes_read_from'])}. It is no face-recognition score.</p>")


def _float16(report: dict) -> str:
    if not report["float16"]:
        return "<p>Nothing is computed in float16.</p>"
    rows = [(graph, r["worst_layer"], number(r["largest"]), f"{100 * r['part_of_float16']:.2f} %",
             "; ".join(f"{k or 'the whole graph'} ({why})" for k, why in r["kept_in_float32"].items()) or "none")
            for graph, r in report["float16"].items()]
    return (table(("graph", "layer with the largest value", "value", "of float16's range", "kept in float32"), rows, 2)
            + "<p class=note>Measured in float32, on the inputs of the comparison above, attention as plain operators. What passes half "
              "of float16's range is kept in float32.</p>")


def _int8(int8: dict | None) -> str:
    if int8 is None:
        return "<p>Nothing is computed in int8.</p>"
    key = next(k for k in int8 if k.startswith("kept_in_"))
    rows, wide = list(int8[key].items()), key.removeprefix("kept_in_")
    return (f"<p>{int8['int8_layers']} layers of the UNet are computed in int8, {len(rows)} are kept in {wide}. Together they change its "
            f"result by {100 * int8['relative_error']:.2f} % (root mean square over {int8['calls']} calls of the sampling loop), at most "
            f"{100 * int8['bound']:g} % by choice.</p>{table((f'kept in {wide}', 'why'), rows, 2)}")

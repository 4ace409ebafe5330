"""What benchmarks/run.py compares PIDiff with: environments, models in each rival's own format, and the rows of the table.

Nothing of a rival is kept in this repository: `pip` installs it into an environment of its own under the work folder, and the
weights are random ones in the full Stable Diffusion 1.5 configuration, converted by the rival's own tools where it has any.
"""

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "benchmarks" / "workers"
TORCH = next(line for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))

# name -> what pip installs
ENVIRONMENTS = {
    "diffusers": [TORCH, "diffusers>=0.32", "transformers>=5.0", "accelerate>=0.34", "openvino>=2025.2"],
    "optimum": [TORCH, "optimum-onnx[onnxruntime]", "diffusers>=0.32"],
    "genai": [TORCH, "openvino-genai", "optimum-intel", "openvino-tokenizers", "diffusers>=0.32", "accelerate>=0.34"],
    "sdcpp": ["stable-diffusion-cpp-python", "numpy"],
}


@dataclass(frozen=True)
class Way:
    """One way to draw the picture. environment: None is this one. same: whether its maths is PIDiff's for the same noise, so that its
    picture is compared. identity: whether it can draw a person at all. likeness: dB that its picture must reach (None: by its precision)."""

    name: str
    worker: str
    environment: str | None = None
    job: dict = field(default_factory=dict)
    identity: bool = True
    same: bool = True
    likeness: float | None = None

    @property
    def rival(self) -> bool:
        return self.worker != "pidiff_worker"


def ours(bundle: Path, int8: Path | None) -> list[Way]:
    """int8: the same model exported with `--int8`, if it is to be measured."""
    common = {"model": str(bundle), "engine": "auto", "precision": "auto", "photo": str(ROOT / "examples" / "person-1.jpg"), "seed": 7}
    presets = [Way(f"pidiff {preset}", "pidiff_worker", job=common | {"preset": preset}) for preset in ("exact", "balanced", "fast")]
    full = Way("pidiff exact, full precision", "pidiff_worker", job=common | {"precision": "full"})
    smaller = [Way(f"pidiff {preset}, int8", "pidiff_worker", job=common | {"model": str(int8), "preset": preset}, likeness=20.0)
               for preset in ("exact", "fast")] if int8 else []
    return [*presets, full, Way("pidiff exact, least memory", "pidiff_worker", job=common | {"keep_graphs": False, "least_memory": True}),
            Way("pidiff exact, onnxruntime", "pidiff_worker", job=common | {"engine": "onnxruntime"}), *smaller]


def rivals(model: Path, work: Path) -> list[Way]:
    ways = [Way(f"diffusers {precision}{', compiled' if compiled else ''}", "diffusers_worker", "diffusers",
                {"model": str(model), "precision": precision, "compiled": compiled}) for precision in ("fp32", "bf16") for compiled in (False, True)]
    glued = {"model": str(model), "precision": "auto", "converted": str(work / "glued")}
    return [*ways, Way("diffusers with OpenVINO, glued by hand", "glued_worker", "diffusers", glued),
            Way("OpenVINO GenAI", "genai_worker", "genai", {"model": str(work / "genai"), "precision": "auto"}, identity=False),
            Way("optimum with ONNX Runtime", "optimum_worker", "optimum", {"model": str(work / "optimum"), "precision": "fp32"}, identity=False),
            Way("stable-diffusion.cpp f16", "sdcpp_worker", "sdcpp", {"model": str(work / "ldm.safetensors"), "precision": "f16"}, identity=False, same=False)]


def python_of(work: Path, environment: str | None) -> str:
    return sys.executable if environment is None else str(work / "envs" / environment / "bin" / "python")


def run(command: list, log: Path) -> None:
    """Run a command with its output in a file, in that file's folder, where no checkout hides an installed package; SystemExit names
    the file where it fails."""
    with log.open("ab") as out:
        if subprocess.run(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, cwd=log.parent).returncode:
            raise SystemExit(f"run: {Path(command[0]).name} {' '.join(map(str, command[1:4]))} must succeed, see {log}")


def install(work: Path, environment: str) -> None:
    """Make a rival's environment where it is not there yet."""
    folder = work / "envs" / environment
    if (folder / "installed").is_file():
        return
    venv.create(folder, with_pip=True)
    run([folder / "bin" / "python", "-m", "pip", "install", "-q", *ENVIRONMENTS[environment]], work / f"install-{environment}.log")
    # What optimum asks for, nothing here uses, and does not load beside a torch for the CPU.
    run([folder / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "torchvision"], work / f"install-{environment}.log")
    (folder / "installed").write_text("\n".join(ENVIRONMENTS[environment]) + "\n")


def once(target: Path, make) -> None:
    """make(folder or file beside target), renamed to target when it is whole."""
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    make(part)
    part.rename(target)


def prepare_model(work: Path) -> Path:
    """The model folder in diffusers' layout, with random weights."""
    log = work / "prepare-pidiff.log"
    once(work / "sd15", lambda part: run([sys.executable, ROOT / "benchmarks" / "make_sd15_random.py", part], log))
    if not (work / "sd15" / "model_index.json").is_file():
        parts = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
                 "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None]}
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.32.0", "requires_safety_checker": False} | parts
        (work / "sd15" / "model_index.json").write_text(json.dumps(index, indent=2))
    return work / "sd15"


def prepare_ours(work: Path, int8: bool) -> tuple[Path, Path, Path | None]:
    """(model folder, bundle, the same in int8), with random weights."""
    model, log = prepare_model(work), work / "prepare-pidiff.log"
    once(work / "bundle", lambda part: run([sys.executable, "-m", "pidiff.export", model, part, "--report", "none"], log))
    if int8:
        once(work / "bundle-int8", lambda part: run([sys.executable, "-m", "pidiff.export", model, part, "--int8", "--report", "none"], log))
    return model, work / "bundle", work / "bundle-int8" if int8 else None


def prepare(way: Way, work: Path, model: Path, job: dict) -> None:
    """The rival's environment, and the model in its format. job: size and threads."""
    install(work, way.environment)
    python, log = python_of(work, way.environment), work / f"prepare-{way.environment}.log"
    cli = Path(python).parent / "optimum-cli"
    if way.worker == "glued_worker":
        def convert(part):
            spec = work / "prepare.json"
            spec.write_text(json.dumps(way.job | job | {"solver": "ddim", "converted": str(part), "prepare": True, "steps": [], "begun": 0, "out": str(work / "prepared.json")}))
            run([python, WORKERS / "glued_worker.py", spec], log)
        once(work / "glued", convert)
    elif way.worker == "genai_worker":
        once(work / "genai", lambda part: run([cli, "export", "openvino", "--model", model, "--task", "text-to-image", "--weight-format", "fp16", part], log))
    elif way.worker == "optimum_worker":
        once(work / "optimum", lambda part: run([cli, "export", "onnx", "--model", model, "--task", "text-to-image", part], log))
    elif way.worker == "sdcpp_worker":
        from .single_file import write_single_file
        once(work / "ldm.safetensors", lambda part: write_single_file(model, part))

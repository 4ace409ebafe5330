"""Train the shipped model further in a given time on one GPU: new people drawn into memory, encoder and mapper together, then the
base with its step captured in a CUDA graph. The stages are `pidiff-train`'s; what is spared is writing and reading 150,000
pictures, and Python's share of a step (four fifths of it at this model's size are launches).

    python -m benchmarks.gpu_train draw PEOPLE --like LATENTS.npz --readout readout.safetensors --seconds 85 --most 200000
    python -m benchmarks.gpu_train train PEOPLE --model MODEL --out OUT --seconds 580

LATENTS.npz and readout.safetensors are what `pidiff-data synth` and `pidiff-data draft` wrote. `draw` ends when the time is over with
what it has by then; `train` waits for it, and changes MODEL, which is a copy of models/mini without manifest.json. OUT then holds the encoder, the
adapter and the UNet, the latter in three parts. Draw with the same seed, and train within the same time, and still the weights differ: the clock decides.

A step that cannot be captured, or whose gradients differ from the plain one's, is run as `pidiff-train` runs it. (What trained the
shipped weights on an H200 on 2026-11-27, before it was tidied into this file, was such a run, by a mistake that is mended: the captured step has not
run on a GPU, and this file has run on a processor only.)
"""

import argparse
import copy
import json
import shutil
import sys
import time
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pidiff.checkpoint import load_strict, read_tensors
from pidiff.data.people import DIRECTIONS, People, clean_mask
from pidiff.train import base as base_module
from pidiff.train import mapper as mapper_module
from pidiff.train import stages
from pidiff.train.__main__ import parse
from pidiff.train.base import BaseLoss, Task
from pidiff.train.common import Trainer, average

SIZE, BATCH = 128, 500                  # pixels; pictures that an encoder reads at once
TWICE = 0.3                             # share of pictures that show the person before once more, otherwise moved
WRITING = 16.0                          # seconds kept for what comes after the base's last step
started = time.time()


def say(*words) -> None:
    print(f"[{time.time() - started:6.1f} s]", *words, flush=True)


# --- people ---

def clean(start: int, masks: np.ndarray) -> tuple[int, np.ndarray]:
    return start, np.stack([clean_mask(m.astype(np.float32) / 255) * 255 for m in masks]).astype(np.uint8)


def draw(args) -> None:
    from pidiff.data.draft import Readout
    from pidiff.data.draft import draw as draw_pictures
    from pidiff.data.synth import BatchGenerator
    pool = get_context("fork").Pool(6)                   # before CUDA is there
    like, rng = np.load(args.like), np.random.default_rng((args.seed, 1))
    mean, directions = like["mean"].reshape(-1).astype(np.float32), {d: like[f"dir_{d}"].astype(np.float32) for d in DIRECTIONS}
    generator = BatchGenerator(args.device)
    model = load_strict(Readout(), read_tensors(args.readout), "readout").eval().to(args.device, memory_format=torch.channels_last)
    again = rng.random(args.most) < TWICE
    identity = np.maximum(np.cumsum(~again) - 1, 0)
    codes, psi = generator.w(rng.standard_normal((identity[-1] + 1, 512))), rng.uniform(0.55, 0.85, identity[-1] + 1)
    moves = rng.normal(0, (2.0, 1.2, 0.7), (args.most, 3)) * (rng.random((args.most, 1)) < 2 / 3)       # as `pidiff-data draft`
    w = (mean + psi[identity, None] * (codes[identity] - mean) + moves @ np.stack([directions[d] for d in DIRECTIONS])).astype(np.float32)
    args.people.mkdir(parents=True, exist_ok=True)
    images, masks = (np.lib.format.open_memmap(args.people / f"{name}.npy", "w+", np.uint8, (args.most, SIZE, SIZE, *rest))
                     for name, rest in (("images", (3,)), ("masks", ())))
    done, waiting = 0, []
    say("drawing")
    while done < args.most and time.time() - started < args.seconds:
        end = min(done + generator.batch, args.most)
        images[done:end], part = draw_pictures(model, generator.features(w[done:end]), w[done:end])
        waiting.append(pool.apply_async(clean, (done, part)))
        done = end
    for job in waiting:
        first, part = job.get()
        masks[first:first + len(part)] = part
    np.savez(args.people / "codes.npz", w=w[:done], identity=identity[:done], mean=mean, **{f"dir_{d}": v for d, v in directions.items()})
    (args.people / "done.json").write_text(json.dumps({"count": done}))
    say(f"{done} pictures of {identity[done - 1] + 1} people")


def drawn_people(folder: Path, held_out: int) -> tuple[People, People]:
    """People to train on, and the last ones, to measure on."""
    count, known = json.loads((folder / "done.json").read_text())["count"], np.load(folder / "codes.npz")
    images, masks = (np.load(folder / f"{name}.npy", mmap_mode="c")[:count] for name in ("images", "masks"))
    directions = {d: known[f"dir_{d}"] for d in DIRECTIONS}
    return tuple(People(images[rows], masks[rows], known["identity"][rows], [], known["w"][rows], known["mean"], directions)
                 for rows in (slice(0, count - held_out), slice(count - held_out, count)))


def halved(people: People, device: str) -> People:
    """At 64 pixels, as the encoder's stage reads them."""
    def half(x: np.ndarray) -> np.ndarray:
        parts = (torch.from_numpy(x[i:i + 4000]).to(device).permute(0, 3, 1, 2).float() for i in range(0, len(x), 4000))
        return np.concatenate([F.avg_pool2d(p, 2).round().byte().permute(0, 2, 3, 1).cpu().numpy() for p in parts])
    return replace(people, images=half(people.images), masks=half(people.masks[..., None])[..., 0])


# --- a captured step ---

class GivenLoss(BaseLoss):
    """BaseLoss that can be given its task."""

    task: Task | None = None

    def draw(self, rng, batch=None):
        return super().draw(rng, batch) if self.task is None else self.task


@dataclass
class CapturedTrainer(Trainer):
    """Trainer whose loss and gradients are one CUDA graph; batches travel while the last step computes, and nothing waits for the
    GPU but every 25th step."""

    graph: "torch.cuda.CUDAGraph | None" = field(init=False, default=None)
    plain: bool = field(init=False, default=False)

    def _count_time(self, seconds: float) -> None:
        self.seconds += seconds                          # the base class's mean over processes waits for the GPU

    def _work(self, loss_fn: GivenLoss) -> tuple[Tensor, dict]:
        loss_fn.task = self.static
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss, scalars = loss_fn(None)
            loss.backward()
        loss_fn.task = None
        return loss.detach(), scalars

    def _capture(self, loss_fn: GivenLoss, task: Task) -> None:
        self.static = Task(*(getattr(task, f.name).clone() for f in fields(Task)))
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.model.zero_grad(set_to_none=True)
                self._work(loss_fn)
        main.wait_stream(side)
        wanted = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss, self.scalars = self._work(loss_fn)
        graph.replay()
        got = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        if got.keys() != wanted.keys():
            raise RuntimeError(f"captured gradients must be of {len(wanted)} tensors, got {len(got)}")
        error = float(sum((got[n] - wanted[n]).square().sum() for n in got) / sum(g.square().sum() for g in wanted.values())) ** 0.5
        say(f"captured; gradients differ by {error:.1e} of their norm")
        if not error < 0.05:
            raise RuntimeError(f"captured gradients must be the plain ones within 0.05, got {error:.3f}")
        self.graph, self.copies = graph, torch.cuda.Stream()

    def _try_capture(self, loss_fn: GivenLoss, task: Task) -> bool:
        try:
            self._capture(loss_fn, task)
        except RuntimeError as error:
            say("not captured:", str(error)[:400])
            torch.cuda.synchronize()
            self.plain, loss_fn.task = True, None
        return not self.plain

    def _task(self, loss_fn: GivenLoss, seed: int, rng, batch) -> Task:
        main = torch.cuda.current_stream()
        if self.graph is not None:
            with torch.cuda.stream(self.copies):
                batch = [x.to(self.config.device) for x in batch]
            main.wait_stream(self.copies)
            for x in batch:
                x.record_stream(main)
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            return loss_fn.draw(rng, batch)

    def _step(self, loss_fn: GivenLoss, draws) -> dict[str, float]:
        if self.plain or self.config.device == "cpu":
            return super()._step(loss_fn, draws)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * self.rate()
        task = self._task(loss_fn, *next(draws))
        if self.graph is None and not self._try_capture(loss_fn, task):
            self.model.zero_grad(set_to_none=True)
            return super()._step(loss_fn, draws)
        for f in fields(Task):
            getattr(self.static, f.name).copy_(getattr(task, f.name))
        self.graph.replay()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        average(self.ema, self.model, min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))
        if self.step % 25:
            return {}
        if not torch.isfinite(self.loss):
            raise RuntimeError(f"loss must be finite, got {float(self.loss)} at step {self.step}; lower the learning rates")
        return {k: round(float(v), 4) for k, v in {"loss": self.loss, **self.scalars}.items()}


# --- training ---

@torch.no_grad()
def drawing_error(args, people: People) -> str:
    """Weighted error of what the mapper draws on people who were not trained on."""
    vae = stages.load_vae(args.model / "vae").to(args.config.device)
    latents = mapper_module.white_latents(vae, people, BATCH)
    renderer = stages.begin_renderer(args, people, latents)[0].eval()
    encoder = stages.load_encoder(args.model / "w_plus_encoder").to(args.config.device)
    encoded = torch.from_numpy(base_module.encoder_bank(encoder, people, BATCH)).to(args.config.device)
    exact = torch.from_numpy(people.w).to(args.config.device)[:, None].expand_as(encoded)
    weight, wanted = mapper_module.likeness_weight(renderer.std, renderer.size), renderer.standardise(latents)
    of_encoded, of_exact = (float(((renderer(codes) - wanted).square() * weight).mean()) for codes in (encoded, exact))
    return f"held-out error of drawings: encoder's codes {of_encoded:.3f}, exact codes {of_exact:.3f}"


def stage_arguments(args, *words) -> argparse.Namespace:
    return parse([*words, "--data", str(args.people), "--model", str(args.model), "--device", args.device, "--workers", str(args.workers),
                  "--save-every", "1000000", "--precision", "auto" if args.device == "cpu" else "bf16"])


def train_encoder(args, people: People, held: People) -> None:
    made = stage_arguments(args, "encoder", "--with-mapper", "--minutes", str(args.encoder_seconds / 60), "--batch-size", str(args.encoder_batch),
                           "--matrix-learning-rate", "0.012", "--decay", "0.9", "--ema-decay", "0.995", "--warmup-steps", "60", "--weight-decay", "0.01")
    say("before;", drawing_error(made, held))
    stages.STAGES["encoder"](made, halved(people, args.device))
    step = torch.load(args.model / ".state" / "encoder-with-mapper" / "state.pt", weights_only=True)["step"]
    say(f"encoder with mapper: {step} steps of {args.encoder_batch};", drawing_error(made, held))
    shutil.copy(args.model / "w_plus_encoder" / "model.safetensors", args.out / "w_plus_encoder.safetensors")


def train_base(args, people: People, deadline: float) -> None:
    made = stage_arguments(args, "base", "--keep-mapper", "--minutes", "1", "--batch-size", str(args.batch), "--matrix-learning-rate", "0.015",
                           "--learning-rate", "7e-4", "--decay", "0.9", "--ema-decay", "0.995")
    trainers = []

    def trainer(of, model, export, sample=None, name=None) -> CapturedTrainer:
        model.text_encoder.requires_grad_(False)
        made.config = replace(made.config, minutes=max(1.0, deadline - WRITING - time.time()) / 60)
        trainers.append(CapturedTrainer(model, copy.deepcopy(model), made.config, made.model / ".state" / "base", export, None))
        return trainers[0]

    stages._trainer, base_module.BaseLoss = trainer, GivenLoss
    try:
        stages.STAGES["base"](made, people)
    except RuntimeError as error:                        # what there is is worth having
        say("the base ended early:", error)
        trainers[0].export(trainers[0].ema, trainers[0].out)
    t = trainers[0]
    say(f"base: {t.step} steps of {args.batch}, {t.step * args.batch / t.seconds:.0f} a second, {'not ' if t.graph is None else ''}captured")
    shutil.copy(args.model / "adapter" / "model.safetensors", args.out / "adapter.safetensors")
    data = (args.model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for i in range(3):
        (args.out / f"unet.{i}").write_bytes(data[len(data) * i // 3:len(data) * (i + 1) // 3])


def train(args) -> None:
    deadline = started + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    while not (args.people / "done.json").is_file():
        time.sleep(0.2)
        if time.time() > deadline - 2 * WRITING:
            sys.exit(f"people must have been drawn in time, got no {args.people / 'done.json'}")
    people, held = drawn_people(args.people, args.held_out)
    say(f"{len(people)} pictures")
    stages.load_people = lambda data, size, split="train", limit=None: people if split == "train" else held
    stages._finish_encoder = lambda *of: None            # directions are measured where the data set is
    mapper_module.white_latents.__defaults__ = base_module.encoder_bank.__defaults__ = (BATCH,)
    torch.backends.cuda.matmul.allow_tf32 = True
    train_encoder(args, people, held)
    train_base(args, people, deadline)
    say("written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("draw", "train"))
    parser.add_argument("people", type=Path, help="folder of the drawn people, best in memory (/dev/shm)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--like", type=Path, help="draw: latents.npz")
    parser.add_argument("--readout", type=Path, help="draw: readout.safetensors")
    parser.add_argument("--most", type=int, default=200_000, help="draw: pictures")
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--model", type=Path, help="train: model folder, which is changed")
    parser.add_argument("--out", type=Path, help="train: where the new weights go")
    parser.add_argument("--encoder-seconds", type=float, default=105)
    parser.add_argument("--encoder-batch", type=int, default=640)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=15)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    {"draw": draw, "train": train}[args.what](args)


if __name__ == "__main__":
    main()

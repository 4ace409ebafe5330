"""What every training stage shares: schedule, averaged weights, checkpoints, progress."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.people import People
from .muon import Muon, split_parameters
from .precision import AUTO, PRECISIONS, agreed, autocast, fastest_precision


@dataclass(frozen=True)
class TrainConfig:
    """One run. Learning rates are constant after `warmup_steps` and fall to zero over the last `decay` share."""

    steps: int = 10_000
    batch_size: int = 32                # pictures of one process in one pass
    accumulate: int = 1                 # passes whose gradients are averaged into one step
    learning_rate: float = 1e-3         # of AdamW: biases, norms, embeddings
    matrix_learning_rate: float = 0.02  # of Muon: matrices and kernels
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay: float = 0.3
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    minutes: float | None = None        # stop (with the decay) by wall clock instead of by steps
    save_every: int = 250
    sample_every: int = 0               # steps between sheets of sample pictures (base and adapter); 0 = none
    seed: int = 0
    precision: str = AUTO               # bf16 | fp16 (with loss scaling) | fp32, autocast; auto: bf16 or fp32, whichever is faster
    device: str = "cpu"
    workers: int = 0                    # processes that draw the next batches meanwhile: a GPU waits for one that draws itself

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def average(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay target + (1 - decay) source, for parameters; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)
        for a, b in zip(target.buffers(), source.buffers()):
            a.copy_(b)


def join_processes(device: str) -> None:
    """Become one of the processes that `torchrun` or `accelerate launch` started; nothing happens without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # An optimizer imports this module, whose default arguments keep the group that they find: closing it would leave its threads.
        import torch.distributed.nn  # noqa: F401
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def leave_processes() -> None:
    """Wait for the others, then close the group: its threads abort a process that ends without that."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes. Kernels are read and written in the order of channels_last memory, where
    they lie: transposing them took a third of a step of `mini`'s base."""
    tensors = [t.permute(0, 2, 3, 1) if t.ndim == 4 else t for t in tensors]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.div_(dist.get_world_size()).split([t.numel() for t in tensors])):
        t.copy_(part.view(t.shape))


class Log:
    """log.jsonl, samples/ and TensorBoard (where it is installed) in a folder; with None nothing is written."""

    def __init__(self, folder: Path | None):
        self.folder, self.writer = folder, None
        if folder is not None:
            self.file = (folder / "log.jsonl").open("a")
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(folder / "tensorboard")
            except ImportError:
                pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.folder is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        (self.folder / "samples").mkdir(exist_ok=True)
        cv2.imwrite(str(self.folder / "samples" / f"step-{step:06d}.png"), image[..., ::-1])
        if self.writer:
            self.writer.add_image("samples", image, step, dataformats="HWC")

    def close(self) -> None:
        if self.folder is not None:
            self.file.close()
        if self.writer:
            self.writer.close()


@dataclass(frozen=True)
class Draws:
    """What a loss draws for one pass, by (step, stream): a seed for PyTorch, the generator as it is after `prepare`, and the
    batch (None for losses that have no `prepare`). It depends on nothing else, so that any process can draw it."""

    seed: int
    prepare: Callable[[np.random.Generator], object] | None

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, np.random.Generator, object]:
        rng = np.random.default_rng((self.seed, *place))
        seed = int(rng.integers(2 ** 62))
        return seed, rng, self.prepare(rng) if self.prepare else None

    def over(self, places: Iterator[tuple[int, int]], workers: int) -> Iterator:
        """The draws of `places` in their order, by `workers` processes ahead of time."""
        if not workers:
            return map(self.__getitem__, places)
        if self.prepare is None:
            raise ValueError(f"workers must be 0 for this stage, got {workers}: its batches need the model")
        return iter(DataLoader(self, batch_size=None, sampler=places, num_workers=workers, prefetch_factor=4, collate_fn=_unchanged,
                               multiprocessing_context="fork", worker_init_fn=lambda _: cv2.setNumThreads(0)))


def _unchanged(draw: tuple) -> tuple:
    return draw


@dataclass
class Trainer:
    """Runs `loss_fn(rng) -> (loss, scalars)` on `model`, keeping averaged weights in `ema`. A loss that has `prepare(rng) -> batch`,
    for what needs no model, is called with (rng, batch).

    The checkpoint `state.pt` in `out` holds everything needed to go on; a killed run resumes from it. Random numbers
    depend on seed, step and process only; a run that began in one precision goes on in it. With several processes each draws its own batch of `batch_size`, gradients
    are averaged, and the first one writes; only that one returns from `run`. Scalars go to log.jsonl and, where it is
    installed, to TensorBoard; `sample(ema)` gives an RGB uint8 sheet for it and for samples/.
    """

    model: nn.Module
    ema: nn.Module
    config: TrainConfig
    out: Path
    export: Callable[[nn.Module, Path], None]      # writes the averaged weights
    sample: Callable[[nn.Module], np.ndarray] | None = None
    step: int = 0
    seconds: float = 0.0
    rank: int = field(init=False, default=0)
    precision: str = field(init=False)

    def __post_init__(self):
        c = self.config
        join_processes(c.device)
        if dist.is_initialized():
            self.rank = dist.get_rank()
            for tensor in [*self.model.state_dict().values(), *self.ema.state_dict().values()]:
                dist.broadcast(tensor, 0)
        self.precision = agreed(fastest_precision(c.device)) if c.precision == AUTO else c.precision
        matrices, others = split_parameters(self.model)
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(Muon(matrices, c.matrix_learning_rate, weight_decay=c.weight_decay))
        if others:
            self.optimizers.append(torch.optim.AdamW(others, c.learning_rate, betas=(0.9, 0.99),
                                                     weight_decay=c.weight_decay, fused=True))
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["initial_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(torch.device(c.device).type, enabled=self.precision == "fp16")
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "state.pt").is_file():
            self._resume()
        for group in (g for o in self.optimizers if isinstance(o, Muon) for g in o.param_groups):
            group["dtype"] = torch.float32 if self.precision == "fp32" else torch.bfloat16

    def progress(self) -> float:
        c = self.config
        return self.step / c.steps if c.minutes is None else self.seconds / (60 * c.minutes)

    def seconds_left(self) -> float:
        """Seconds until the end, at the pace so far or by the clock."""
        return max(0.0, self.seconds * (1 / self.progress() - 1))

    def rate(self) -> float:
        """Factor on every learning rate."""
        c = self.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        return warm * min(1.0, max(0.01, (1 - self.progress()) / max(c.decay, 1e-9)))

    def run(self, loss_fn: Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]) -> None:
        c = self.config
        bar = tqdm(total=c.steps if c.minutes is None else None, initial=self.step, unit="step", disable=True if self.rank else None, dynamic_ncols=True)
        log = Log(self.out if self.rank == 0 else None)
        places = ((step, self.rank + i * self.world_size) for step in count(self.step) for i in range(c.accumulate))
        draws = Draws(c.seed, getattr(loss_fn, "prepare", None)).over(places, c.workers)
        while self.progress() < 1:
            started = time.perf_counter()
            scalars = self._step(loss_fn, draws)
            taken = time.perf_counter() - started
            self._count_time(taken)
            rate = self.world_size * c.batch_size * c.accumulate / taken
            bar.update()
            bar.set_postfix({**scalars, "images/s": round(rate, 1), "left": tqdm.format_interval(self.seconds_left())})
            if self.step % 25 == 0:
                log.scalars(self.step, {"minutes": round(self.seconds / 60, 2), "images_per_second": round(rate, 1), **scalars})
            if self.step % c.save_every == 0:
                self.save()
            if self.sample is not None and self.rank == 0 and c.sample_every and self.step % c.sample_every == 0:
                log.picture(self.step, self.sample(self.ema))
        log.close()
        bar.close()
        self.save()
        leave_processes()
        if self.rank:
            sys.exit(0)

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def _count_time(self, seconds: float) -> None:
        """Add a step's time; processes agree on it, since the learning rate may follow the clock."""
        taken = torch.tensor(seconds, dtype=torch.float64, device=self.config.device)
        if dist.is_initialized():
            average_over_processes([taken])
        self.seconds += float(taken)

    def _step(self, loss_fn, draws: Iterator) -> dict[str, float]:
        c = self.config
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * self.rate()
        self.model.zero_grad(set_to_none=True)
        # The CPU flash kernel's backward takes three times the time of plain matrix products at these sizes.
        backends = [SDPBackend.MATH] if c.device == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(backends):             # around backward too: gradient checkpointing must recompute with the same kernel
            for _ in range(c.accumulate):
                loss, scalars = self._pass(loss_fn, *next(draws))
                self.scaler.scale(loss / c.accumulate).backward()
        if dist.is_initialized():
            average_over_processes([p.grad for p in self.model.parameters() if p.grad is not None])
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), c.max_grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        average(self.ema, self.model, min(c.ema_decay, (1 + self.step) / (10 + self.step)))
        return {k: round(float(v), 4) for k, v in {"loss": loss.detach(), **scalars}.items()}

    def _pass(self, loss_fn, seed: int, rng: np.random.Generator, batch) -> tuple[Tensor, dict]:
        """Loss of one batch; its random numbers depend on the configuration's seed, step and stream."""
        torch.manual_seed(seed)
        with autocast(self.config.device, self.precision):
            loss, scalars = loss_fn(rng) if batch is None else loss_fn(rng, batch)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss must be finite, got {loss.item()} at step {self.step}; lower the learning rates")
        return loss, scalars

    def save(self) -> None:
        if self.rank:
            return
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "scaler": self.scaler.state_dict(),
                 "optimizers": [o.state_dict() for o in self.optimizers], "precision": self.precision, "step": self.step, "seconds": self.seconds}
        temporary = self.out / "state.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "state.pt")
        self.export(self.ema, self.out)

    def _resume(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True, map_location=self.config.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.config.precision == AUTO:
            self.precision = state.get("precision", self.precision)


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], on a tensor's device."""
    images = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def on_white(people: People, rows: slice, device: str | torch.device, size: int | None = None) -> Tensor:
    """People as `enroll` shows them to the encoder, on white: float32 [B, 3, S, S] in [-1, 1] on a device, `size` pixels if given.
    The faces of photos are so already."""
    picture = torch.from_numpy(people.images[rows] if people.faces is None else people.faces[rows]).to(device).permute(0, 3, 1, 2).float()
    if people.faces is None:
        alpha = ((torch.from_numpy(people.masks[rows]).to(device)[:, None].float() / 255 - 0.3) / 0.6).clamp(0, 1)      # as `composite`
        picture = (picture * alpha + 255 * (1 - alpha) + 0.5).floor()
    if size not in (None, picture.shape[-1]):
        picture = F.interpolate(picture, size=(size, size), mode="area").round()
    return picture.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_images(tensor: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return tensor.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def training_timesteps(count: int, alphas_cumprod: Tensor, mean: float = 0.3, std: float = 1.7) -> Tensor:
    """Timesteps [count] with log sigma ~ N(mean, std), stratified over the batch (Karras et al. 2022, arXiv 2206.00364).

    Uniform timesteps of the linear schedule would spend half of the batch on noise three times the signal, while a
    sampler with Karras sigmas takes most of its steps below it. sigma = sqrt((1 - alpha) / alpha).
    """
    log_sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()
    low, high = torch.special.ndtr((log_sigma[[0, -1]] - mean) / std)               # only what the schedule has
    uniform = (torch.arange(count, device=log_sigma.device) + torch.rand(count).to(log_sigma.device)) / count
    wanted = mean + std * torch.special.ndtri(low + (high - low) * uniform)
    return torch.searchsorted(log_sigma, wanted).clamp(0, len(log_sigma) - 1)

"""What every training stage shares: schedule, averaged weights, checkpoints, progress."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


@dataclass(frozen=True)
class TrainConfig:
    """One run. The learning rate is constant after `warmup_steps` and falls to zero over the last `decay` share."""

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay: float = 0.3
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    minutes: float | None = None        # stop (with the decay) by wall clock instead of by steps
    save_every: int = 250
    seed: int = 0
    precision: str = "bf16"             # bf16 | fp32 (autocast; weights stay float32)
    device: str = "cpu"

    def __post_init__(self):
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def average(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay target + (1 - decay) source, for parameters; buffers are copied."""
    with torch.no_grad():
        for a, b in zip(target.parameters(), source.parameters()):
            a.lerp_(b, 1 - decay)
        for a, b in zip(target.buffers(), source.buffers()):
            a.copy_(b)


@dataclass
class Trainer:
    """Runs `loss_fn(rng, generator) -> (loss, scalars)` on `model`, keeping averaged weights in `ema`.

    The checkpoint `state.pt` in `out` holds everything needed to go on; a killed run resumes from it.
    """

    model: nn.Module
    ema: nn.Module
    config: TrainConfig
    out: Path
    export: Callable[[nn.Module, Path], None]      # writes the averaged weights
    step: int = 0
    seconds: float = 0.0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self):
        c = self.config
        torch.manual_seed(c.seed)
        self.rng = np.random.default_rng(c.seed)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], c.learning_rate,
                                           betas=(0.9, 0.99), weight_decay=c.weight_decay)
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "state.pt").is_file():
            self._resume()

    def progress(self) -> float:
        c = self.config
        return self.step / c.steps if c.minutes is None else self.seconds / (60 * c.minutes)

    def learning_rate(self) -> float:
        c = self.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        return c.learning_rate * warm * min(1.0, max(0.01, (1 - self.progress()) / max(c.decay, 1e-9)))

    def run(self, loss_fn: Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]) -> None:
        c = self.config
        bar = tqdm(total=c.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        with (self.out / "log.jsonl").open("a") as log:
            while self.progress() < 1:
                started = time.perf_counter()
                scalars = self._step(loss_fn)
                self.seconds += time.perf_counter() - started
                bar.update()
                bar.set_postfix(scalars)
                if self.step % 25 == 0:
                    rate = c.batch_size / (time.perf_counter() - started)
                    log.write(json.dumps({"step": self.step, "minutes": round(self.seconds / 60, 2),
                                          "images_per_second": round(rate, 1), **scalars}) + "\n")
                    log.flush()
                if self.step % c.save_every == 0:
                    self.save()
        bar.close()
        self.save()

    def _step(self, loss_fn) -> dict[str, float]:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # The CPU flash kernel's backward takes three times the time of plain matrix products at these sizes.
        backends = [SDPBackend.MATH] if c.device == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(backends), torch.autocast(c.device, torch.bfloat16, enabled=c.precision == "bf16"):
            loss, scalars = loss_fn(self.rng)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss must be finite, got {loss.item()} at step {self.step}; lower --learning-rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), c.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        average(self.ema, self.model, min(c.ema_decay, (1 + self.step) / (10 + self.step)))
        return {k: round(float(v), 4) for k, v in {"loss": loss.detach(), **scalars}.items()}

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "step": self.step, "seconds": self.seconds, "torch_rng": torch.get_rng_state(),
                 "numpy_rng": json.dumps(self.rng.bit_generator.state)}
        temporary = self.out / "state.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "state.pt")
        self.export(self.ema, self.out)

    def _resume(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True, map_location=self.config.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["torch_rng"].cpu())
        self.rng.bit_generator.state = json.loads(state["numpy_rng"])


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(tensor: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return tensor.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def training_timesteps(count: int, alphas_cumprod: Tensor, mean: float = -0.2, std: float = 1.5) -> Tensor:
    """Timesteps [count] with log sigma ~ N(mean, std), stratified over the batch (Karras et al. 2022, arXiv 2206.00364).

    Uniform timesteps of the linear schedule would spend half of the batch on noise three times the signal, while a
    sampler with Karras sigmas takes most of its steps below it. sigma = sqrt((1 - alpha) / alpha).
    """
    log_sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()
    uniform = (torch.arange(count) + torch.rand(count)) / count
    wanted = mean + std * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
    return torch.searchsorted(log_sigma, wanted).clamp(0, len(log_sigma) - 1)

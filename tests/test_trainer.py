"""The trainer: exact resume, several processes, accumulated passes, averaging, and the Muon optimiser."""

import os
import socket

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pidiff.train.common import TrainConfig, Trainer, average, to_images, to_tensor, training_timesteps


def test_resume_is_exact(tmp_path):
    def trainer(out, steps):
        torch.manual_seed(0)
        model, ema = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        ema.load_state_dict(model.state_dict())
        config = TrainConfig(steps=steps, batch_size=1, save_every=100, precision="fp32", warmup_steps=0, decay=0)
        t = Trainer(model, ema, config, out, lambda *_: None)
        t.run(lambda rng: ((model(torch.randn(8, 4) + float(rng.normal())) ** 2).mean(), {}))
        return t

    whole = trainer(tmp_path / "a", 6)
    trainer(tmp_path / "b", 3)
    resumed = trainer(tmp_path / "b", 6)
    assert resumed.step == 6
    for a, b in zip(whole.ema.parameters(), resumed.ema.parameters()):
        assert torch.equal(a, b)


class Prepared:
    """A loss whose batches need no model; notes who drew them."""

    def __init__(self, model):
        self.model, self.pids = model, set()

    def prepare(self, rng):
        return torch.from_numpy(rng.normal(size=(8, 4)).astype(np.float32)), os.getpid()

    def __call__(self, rng, batch):
        self.pids.add(batch[1])
        return (self.model(batch[0] + torch.randn(4) + float(rng.normal())) ** 2).mean(), {}


def test_workers_draw_the_same_batches(tmp_path):
    def run(workers, accumulate):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        config = TrainConfig(steps=5, batch_size=8, accumulate=accumulate, precision="fp32", workers=workers)
        loss = Prepared(model)
        Trainer(model, torch.nn.Linear(4, 1), config, tmp_path / f"{workers}-{accumulate}", lambda *_: None).run(loss)
        return model.weight, loss.pids

    for accumulate in (1, 3):
        (alone, own), (helped, others) = run(0, accumulate), run(2, accumulate)
        assert torch.equal(alone, helped) and own == {os.getpid()} and len(others) == 2 and not own & others


def test_a_loss_that_cannot_share_its_batches_says_so(tmp_path):
    model = torch.nn.Linear(4, 1)
    trainer = Trainer(model, model, TrainConfig(steps=1, batch_size=1, workers=1), tmp_path, lambda *_: None)
    with pytest.raises(ValueError, match="workers must be 0 for this stage, got 1"):
        trainer.run(lambda rng: (model(torch.randn(1, 4)).sum(), {}))
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        TrainConfig(workers=-1)


def test_orthogonal_updates_do_not_depend_on_their_neighbours():
    from pidiff.train.muon import Muon, orthogonalize
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (32, 8, 3, 3)]
    start, grads = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]

    def stepped(chosen):
        params = [torch.nn.Parameter(start[i].clone()) for i in chosen]
        for p, i in zip(params, chosen):
            p.grad = grads[i]
        Muon(params, lr=0.1, dtype=torch.float32).step()
        return params

    for i, p in enumerate(stepped(range(4))):
        torch.testing.assert_close(p, stepped([i])[0])
    values = torch.linalg.svdvals(orthogonalize(grads[1], dtype=torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3


def test_precision_is_measured_and_kept(tmp_path, monkeypatch):
    """auto is whatever is faster here; a run that goes on elsewhere keeps what it began with, in every part."""
    from pidiff.train import common, precision
    for seconds, fastest in (({torch.bfloat16: 1.0, torch.float32: 2.0}, "bf16"), ({torch.bfloat16: 2.0, torch.float32: 1.0}, "fp32")):
        precision.fastest_precision.cache_clear()
        monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
        assert precision.fastest_precision("cpu") == fastest
    precision.fastest_precision.cache_clear()
    monkeypatch.undo()
    with torch.no_grad():               # as where latents are made
        assert precision.fastest_precision("cpu") in ("bf16", "fp32")

    monkeypatch.setattr(precision.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(precision.dist, "broadcast_object_list", lambda box, source: box.__setitem__(0, "bf16"))
    assert precision.agreed("fp32") == "bf16", "the first process decides"
    monkeypatch.undo()

    def run(steps, **options):
        model = torch.nn.Linear(32, 32)
        t = Trainer(model, torch.nn.Linear(32, 32), TrainConfig(steps=steps, batch_size=1, **options), tmp_path, lambda *_: None)
        seen = []
        t.run(lambda rng: (seen.append(model(torch.randn(4, 32)).dtype) or model(torch.randn(4, 32)).float().square().mean(), {}))
        return t, seen

    for step, (fastest, options, want, dtype) in enumerate([
            ("bf16", {}, "bf16", torch.bfloat16), ("fp32", {}, "bf16", torch.bfloat16), ("bf16", {"precision": "fp32"}, "fp32", torch.float32)]):
        monkeypatch.setattr(common, "fastest_precision", lambda _: fastest)
        trainer, seen = run(step + 1, **options)
        assert (trainer.precision, seen, trainer.optimizers[0].param_groups[0]["dtype"]) == (want, [dtype], dtype)


@pytest.mark.parametrize("limit", [{"steps": 40}, {"minutes": 2.0}])
def test_time_left_follows_steps_or_the_clock(limit, tmp_path):
    model = torch.nn.Linear(2, 1)
    trainer = Trainer(model, torch.nn.Linear(2, 1), TrainConfig(**limit), tmp_path, lambda *_: None, step=10, seconds=30.0)
    assert trainer.seconds_left() == pytest.approx(90.0)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from pidiff.train.common import TrainConfig, Trainer
out, when = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
ema = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
ema.load_state_dict(model.state_dict())
t = Trainer(model, ema, TrainConfig(steps=9, batch_size=1, save_every=2, precision="bf16"), out, lambda *_: None)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "writing":
    whole = torch.save
    def save(state, path):
        whole(state, path)
        if state["step"] == 6:
            path.write_bytes(path.read_bytes()[:2000])
            die()
    torch.save = save
def loss(rng):
    if when == "computing" and t.step == 5:
        die()
    return (model(torch.randn(8, 4) + float(rng.normal())) ** 2).mean(), {}
t.run(loss)
"""


@pytest.mark.parametrize("when", [pytest.param("computing", marks=pytest.mark.slow), "writing"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(when, tmp_path):
    import signal
    import subprocess
    import sys
    (tmp_path / "killed.py").write_text(KILLED)

    def run(out, moment):
        return subprocess.run([sys.executable, str(tmp_path / "killed.py"), str(tmp_path / out), moment], capture_output=True, timeout=120).returncode

    assert run("whole", "never") == 0 and run("killed", when) == -signal.SIGKILL
    saved = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert saved["step"] == 4, "the last checkpoint that was written whole"
    assert run("killed", "never") == 0
    whole, resumed = (torch.load(tmp_path / out / "state.pt", weights_only=True) for out in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 9
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    for a, b in zip(whole["optimizers"], resumed["optimizers"]):
        assert str(a) == str(b)


TWO_PROCESSES = """
import sys, time, torch
from pathlib import Path
from pidiff.train.common import TrainConfig, Trainer

def group_threads():
    return [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]

def loss(rng):
    assert group_threads()
    return (model(torch.from_numpy(rng.normal(size=(8, 4))).float()) - 1).square().mean(), {}

model, ema, out = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1), Path(sys.argv[1])
config = TrainConfig(steps=5, batch_size=1, save_every=100, precision="fp32")
try:
    Trainer(model, ema, config, out, lambda *_: None).run(loss)
finally:                                   # the second process leaves `run` by SystemExit
    for _ in range(100):                   # a thread that has been joined may be listed for a moment yet
        if not group_threads():
            break
        time.sleep(0.02)
    assert not group_threads(), "a group's threads that are left can abort the process at its end"
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_train_as_one_with_both_batches(machines, tmp_path):
    """On one machine, and as on two: each has a launcher of its own there."""
    import subprocess
    import sys
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    torch.manual_seed(0)
    start = {"weight": torch.randn(1, 4), "bias": torch.zeros(1)}

    def trainer(out):
        model, ema = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        model.load_state_dict(start), ema.load_state_dict(start)
        return Trainer(model, ema, TrainConfig(steps=5, batch_size=1, save_every=100, precision="fp32"), out, lambda *_: None)

    trainer(tmp_path / "two").save()                       # both begin with the same weights
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [["--standalone", "--nproc-per-node", "2"]] if machines == 1 else [
        ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)] for rank in range(2)]
    runs = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *how, str(tmp_path / "two.py"), str(tmp_path / "two")],
                             stderr=subprocess.PIPE, text=True) for how in where]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * machines, said
    one = trainer(tmp_path / "one")

    def both(rng):
        batches = [rng.normal(size=(8, 4))]
        other = np.random.default_rng((0, one.step, 1))
        other.integers(2 ** 62)
        batches.append(other.normal(size=(8, 4)))
        return (one.model(torch.from_numpy(np.concatenate(batches)).float()) - 1).square().mean(), {}

    one.run(both)
    got = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert got["step"] == 5
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(got["model"][name], value, rtol=1e-5, atol=1e-6)


def test_accumulated_passes_are_one_larger_batch(tmp_path):
    def run_one(out, **options):
        torch.manual_seed(0)
        model, ema, seen = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1), []
        t = Trainer(model, ema, TrainConfig(steps=2, batch_size=1, precision="fp32", warmup_steps=0, **options), out, lambda *_: None)

        def loss(rng):
            batches = [torch.from_numpy(rng.normal(size=(8, 4))).float()]
            if "accumulate" not in options:                 # the same two batches in one pass
                other = np.random.default_rng((0, t.step, 1))
                other.integers(2 ** 62)
                batches.append(torch.from_numpy(other.normal(size=(8, 4))).float())
            seen.append(len(batches))
            return (model(torch.cat(batches)) - 1).square().mean(), {}

        t.run(loss)
        return seen, model.weight.detach()

    passes, a = run_one(tmp_path / "a", accumulate=2)
    whole, b = run_one(tmp_path / "b")
    assert passes == [1] * 4 and whole == [2] * 2
    torch.testing.assert_close(a, b)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    t = Trainer(model, torch.nn.Linear(1, 1), TrainConfig(steps=1, precision="fp32"), tmp_path, lambda *_: None)
    with pytest.raises(RuntimeError, match="loss must be finite, got nan at step 0"):
        t.run(lambda rng: (model.weight.sum() * float("nan"), {}))


def test_average_and_helpers():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.75 * a.weight + 0.25 * b.weight
    average(a, b, 0.75)
    torch.testing.assert_close(a.weight, want)
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert (to_images(to_tensor(image)) == image).all()


def test_training_timesteps_follow_the_log_normal():
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    t = training_timesteps(20000, alphas)
    log_sigma = ((1 - alphas) / alphas).sqrt().log()[t]
    assert 0 <= t.min() and t.max() <= 999
    assert abs(log_sigma.mean() - 0.3) < 0.1 and abs(log_sigma.std() - 1.6) < 0.1
    assert (training_timesteps(64, alphas).diff() >= 0).all(), "one from each part of the distribution"


def test_muon_gives_every_singular_direction_the_same_weight():
    from pidiff.train.muon import orthogonalize
    g = torch.Generator().manual_seed(0)
    for shape in ((40, 200), (200, 40), (64, 64)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
        got = orthogonalize(u @ torch.diag(torch.logspace(0, 1.3, len(v))) @ v).float()
        weights = torch.linalg.svdvals(got)
        assert 0.6 < weights.min() and weights.max() < 1.3
        assert torch.diagonal(u.T @ got @ v.T).min() > 0.6, "the same directions, in the same sign"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_kernels_as_it_moves_matrices(memory_format):
    from pidiff.train.muon import Muon
    g = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(32, 24, 3, 3, generator=g), torch.randn(32, 24, 3, 3, generator=g)
    kernel = torch.nn.Parameter(weight.clone().to(memory_format=memory_format))
    matrix = torch.nn.Parameter(weight.reshape(32, -1).clone())
    kernel.grad, matrix.grad = gradient.to(memory_format=memory_format), gradient.reshape(32, -1)
    for p in (kernel, matrix):
        Muon([p], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().reshape(32, -1), matrix.detach(), rtol=0, atol=2e-3)
    assert (matrix.detach() - weight.reshape(32, -1)).abs().max() > 0.01


def test_muon_takes_hidden_matrices_only():
    from pidiff.train.muon import split_parameters
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Conv2d(64, 3, 3), torch.nn.LayerNorm(64))
    matrices, others = split_parameters(model)
    assert [tuple(p.shape) for p in matrices] == [(64, 32)]
    assert len(matrices) + len(others) == len(list(model.parameters()))

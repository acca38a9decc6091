"""SparseDM's training, step by step, against a transcription of the authors' formulas.

``train_c10_lsm3.py``: t ~ U(0, 1), x_t = alpha x0 + sigma eps of the VP-SDE with beta 0.1..20, network time 999 t, loss
mean(mean((eps - s)^2) + 0.1 mean((T - s)^2)). ``sparse_ops_mask.py``: groups of four of the flattened weight, the two
smallest |w| become 0, grad(w) = grad + 2e-4 (1 - mask) w. AdamW on all parameters, no clipping, EMA at every step.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_engine.export.families.uvit import SPARSE_LAYERS
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning.data import DataOptions, load_data
from sparse_engine.pruning.draws import Draws
from sparse_engine.pruning.finetune import masked_layers
from sparse_engine.pruning.loss import losses
from sparse_engine.pruning.processes import Processes
from sparse_engine.pruning.settings import Settings
from sparse_engine.pruning.trainer import Batch, Batches, Trainer

STEPS = 6


class AuthorsSparse(torch.autograd.Function):
    """The authors' ``Sparse``: forward the masked weight, backward the gradient and the decay."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, decay: float) -> Tensor:
        groups = weight.detach().abs().reshape(-1, 4)
        index = torch.argsort(groups, dim=1, stable=True)[:, :2]
        mask = torch.ones_like(groups).scatter_(dim=1, index=index, value=0).reshape(weight.shape)
        ctx.save_for_backward(weight)
        ctx.mask, ctx.decay = mask, decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad + ctx.decay * (1 - ctx.mask) * weight, None


class Sparse(nn.Module):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, weight: Tensor) -> Tensor:
        return AuthorsSparse.apply(weight, self.decay)


class Authors:
    """Their training of a network, a step at a time."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.teacher = model.network(model.checkpoint.state)
        self.student = copy.deepcopy(self.teacher).train().requires_grad_(True)
        for name, module in list(self.student.named_modules()):
            if isinstance(module, nn.Linear) and any(fnmatch(name, glob) for glob in SPARSE_LAYERS):
                parametrize.register_parametrization(module, "weight", Sparse(settings.mask_decay))
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.average = {name: each.detach().clone() for name, each in self.student.named_parameters()}

    def step(self, step: int, batch: Batch) -> tuple[float, float, float]:
        x0, eps, y = torch.from_numpy(batch.x0), torch.from_numpy(batch.noise), torch.from_numpy(batch.told["y"])
        t = torch.from_numpy(batch.t)
        log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
        alpha = torch.exp(log_alpha).float()[:, None, None, None]
        sigma = torch.sqrt(1 - torch.exp(2 * log_alpha)).float()[:, None, None, None]
        x_t, time = alpha * x0 + sigma * eps, (999 * t).float()
        s = self.student(x_t, time, y)
        with torch.no_grad():
            taught = self.teacher(x_t, time, y)
        noise = (eps - s).square().flatten(1).mean(1)
        distilled = (taught - s).square().flatten(1).mean(1)
        loss = (noise + 0.1 * distilled).mean()
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * min(1, (step + 1) / self.settings.warmup)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        rate = min(self.settings.ema, (1 + step) / (10 + step))
        for name, each in self.student.named_parameters():
            self.average[name] = rate * self.average[name] + (1 - rate) * each.detach()
        return loss.item(), noise.mean().item(), distilled.mean().item()


def plain(name: str) -> str:
    return name.replace("parametrizations.weight.original", "weight")


@pytest.mark.parametrize("decay", [2e-4, 0.3])  # the authors', and one that shows within a few steps
def test_losses_weights_and_averages(
    conditional_checkpoint: Path, tiny_data: Path, one_torch_thread: None, decay: float
) -> None:
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    settings = Settings(steps=STEPS, batch=8, lr=1e-3, warmup=3, mask_decay=decay)
    alone = Processes(0, 1, torch.device("cpu"))
    data = load_data(tiny_data, model, DataOptions())
    state = model.checkpoint.state
    ours = Trainer(model, state, state, masked_layers(model, settings)[0], settings, alone)
    batches = Batches(data, Draws(0, data.count, settings.batch), model, settings, alone)
    authors = Authors(model, settings)
    for step in range(STEPS):
        batch = batches.make(step, 0)
        found = ours.step(step, [lambda batch=batch: batch])
        expected = authors.step(step, batch)
        assert [found[name] for name in ("loss", "noise_loss", "teacher_loss")] == pytest.approx(expected, abs=1e-6)
        weights, averages = ours.raw(), ours.averaged()
        for name, each in authors.student.named_parameters():
            torch.testing.assert_close(weights[plain(name)], each.detach(), rtol=0, atol=1e-6)
            torch.testing.assert_close(averages[plain(name)], authors.average[name], rtol=0, atol=1e-6)
    moved = ours.raw()["mid_block.mlp.fc1.weight"].numpy() - state["mid_block.mlp.fc1.weight"]
    assert abs(moved).min() > 0  # pruned weights too


def test_the_loss_is_a_mean_over_the_batch_of_means() -> None:
    torch.manual_seed(0)
    s, eps, taught = (torch.randn(5, 3, 4, 4) for _ in range(3))
    by_sample = (eps - s).square().flatten(1).mean(1) + 0.1 * (taught - s).square().flatten(1).mean(1)
    assert losses(s, eps, taught).total.item() == pytest.approx(by_sample.mean().item(), abs=1e-6)
    assert losses(s, eps, None).teacher.item() == 0

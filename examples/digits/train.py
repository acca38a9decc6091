"""Train a class-conditional U-ViT on scikit-learn's digits, then make it 2:4 sparse the SparseDM way.

    python examples/digits/train.py

Two stages, about 25 minutes together on two CPU cores. The first trains a dense model. The second follows
SparseDM (arXiv 2404.10445): it starts from the dense weights, masks them in every forward pass (straight-through
gradients, plus SR-STE's decay on the pruned weights, arXiv 2102.04010), and learns from the dense model as its
teacher. What is stored is what SparseDM stores: the exponential average of the *dense* weights, without masks.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import data
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_engine.export.families.uvit import SPARSE_LAYERS, UViT, UViTConfig

HERE = Path(__file__).parent
BATCH = 128
EMA_RATE = 0.999
LABEL_DROPOUT = 0.1
MASK_DECAY = 2e-4  # SR-STE's lambda, SparseDM's default


class MagnitudeMask24(torch.autograd.Function):
    """Keep the 2 largest |w| of each 4 neighbours; gradients pass straight through, and pruned weights decay."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Weight [..., in] -> the same with two zeros in each group of four."""
        groups = weight.detach().abs().reshape(-1, 4)
        pruned = groups.argsort(dim=1, stable=True)[:, :2]
        mask = torch.ones_like(groups).scatter_(1, pruned, 0.0).reshape(weight.shape)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Straight-through, with the decay term of SR-STE."""
        weight, mask = ctx.saved_tensors
        return grad + MASK_DECAY * (1.0 - mask) * weight


class Masked(nn.Module):
    """The mask as a parametrization: the dense weight is what is stored and trained."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight; a convolution's is grouped along its input channels, tap by tap."""
        return MagnitudeMask24.apply(weight.movedim(1, -1)).movedim(-1, 1)


def diffuse(x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_t of the VP-SDE with beta 0.1..20 (Song et al., arXiv 2011.13456, eq. 32), and the network's time.

    x0: [B, C, H, W], t: [B] in 0..1.
    """
    log_alpha = (-0.25 * t**2 * 19.9 - 0.05 * t)[:, None, None, None]
    return log_alpha.exp() * x0 + (-torch.expm1(2 * log_alpha)).sqrt() * noise, t * 999


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """The weights alone, as ``nnet_ema.pth`` holds them."""
    torch.save(state, path.with_suffix(".pth"))


class Setting(NamedTuple):
    """What examples train differently.

    Attributes:
        tell: labels [B], the null class too -> what the network is told of them.
        diffuse: (x0, t in 0..1, noise) -> (x_t, the network's time).
        masked: globs of the layers that the mask is put on.
        save: writes a state dict to a path, which it gives its suffix.
    """

    tell: Callable[[Tensor], Tensor] = lambda y: y
    diffuse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = diffuse
    masked: Iterable[str] = SPARSE_LAYERS
    save: Callable[[dict[str, Tensor], Path], None] = save_state


def train(
    net: nn.Module, target: Callable[..., Tensor], steps: int, lr: float, title: str, setting: Setting
) -> nn.Module:
    """Minimise |net(x_t, t, told) - target|^2 for some steps; return the exponential average of the weights."""
    pixels, digits = (torch.from_numpy(array) for array in data.load())
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, steps))
    started = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(pixels), (BATCH,))
        x0, t, noise = pixels[rows], torch.rand(BATCH), torch.randn(BATCH, *pixels.shape[1:])
        y = torch.where(torch.rand(BATCH) < LABEL_DROPOUT, data.NULL_CLASS, digits[rows])
        (x_t, time_told), told = setting.diffuse(x0, t, noise), setting.tell(y)
        loss = (net(x_t, time_told, told) - target(x_t, time_told, told, noise)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _update_average(average, net, min(EMA_RATE, (1 + step) / (10 + step)))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"{title}: step {step + 1}/{steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return average


@torch.no_grad()
def _update_average(average: nn.Module, net: nn.Module, rate: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - rate)


def _warmup_then_cosine(step: int, steps: int, warmup: int = 200) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def mask_layers(net: nn.Module, globs: Iterable[str]) -> None:
    """Put the mask on layers whose names match."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and any(fnmatch(name, pattern) for pattern in globs):
            parametrize.register_parametrization(module, "weight", Masked())


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """The dense weights under their own names."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("parametrizations.weight.original", "weight")
        state[name] = tensor.clone()
    return state


def train_both(net: nn.Module, dense_steps: int, sparse_steps: int, out: Path, setting: Setting | None = None) -> None:
    """Train a network, then a 2:4 one from it; write both, as ``dense`` and ``sparsedm``.

    Args:
        net: forward(x, t, told), freshly initialised.
        dense_steps, sparse_steps: of each stage.
        out: the folder.
        setting: what differs from a network of pixels that is told labels.
    """
    setting = setting or Setting()
    out.mkdir(parents=True, exist_ok=True)
    teacher = train(net, lambda x, t, told, noise: noise, dense_steps, 1e-3, "dense", setting)
    setting.save(plain_state(teacher), out / "dense")

    student = copy.deepcopy(teacher).train().requires_grad_(True)
    mask_layers(student, setting.masked)

    @torch.no_grad()
    def teach(x: Tensor, t: Tensor, told: Tensor, noise: Tensor) -> Tensor:
        return teacher(x, t, told)

    student = train(student, teach, sparse_steps, 5e-4, "SparseDM", setting)
    setting.save(plain_state(student), out / "sparsedm")


def options(description: str | None, dense_steps: int, sparse_steps: int, out: Path) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-steps", type=int, default=dense_steps)
    parser.add_argument("--sparse-steps", type=int, default=sparse_steps)
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def main() -> None:
    """Train both models."""
    chosen = options(__doc__, dense_steps=6000, sparse_steps=3000, out=HERE)
    torch.manual_seed(0)
    config = UViTConfig.from_dict(json.loads((HERE / "config.json").read_text()))
    train_both(UViT(config), chosen.dense_steps, chosen.sparse_steps, chosen.out)


if __name__ == "__main__":
    main()

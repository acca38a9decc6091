"""An engine of the torch backend, loaded: a network with its products chosen, on a device, and the shared loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.device_loop import DeviceLoop
from sparse_engine.backends.device_noise import DeviceNoise
from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.manifest import Manifest

from .choose import Chooser, device_facts, tactics_of
from .device import TorchDevice
from .network import choose_attention, choose_products, config_of, rebuild
from .payload import read_network
from .plain import plain_defaults
from .threads import pool_of, torch_threads

if TYPE_CHECKING:
    from sparse_engine.export.families import FamilyConfig


class TorchRunner(DeviceLoop[torch.Tensor]):
    """A network on a device, walked by the shared loop.

    Args:
        network: in the engine's precision, on the device.
        config: of its family.
        device: where it runs.
        report: what was chosen, for ``describe``.
        threads: of PyTorch's pool within the engine's own work; None is the process's own, on no more than its cores.
    """

    def __init__(
        self,
        network: nn.Module,
        config: FamilyConfig,
        device: torch.device,
        report: dict[str, Any],
        threads: int | None = None,
    ) -> None:
        from sparse_engine.export.step_graph import step_of

        self._threads = pool_of(threads)
        step = step_of(network, config)
        cuda = device.type == "cuda"
        self._torch = TorchDevice(device, step, compiled=cuda)
        # On a CPU the definition itself draws, bit for bit.
        super().__init__(self._torch, noise=DeviceNoise(self._torch, tactics_of(device)) if cuda else None)
        self._description = {
            "library": f"torch {torch.__version__}",
            "threads": self._threads,
            **(facts := device_facts(device)),
            "device": str(device),
            **({"gpu": facts["device"]} if cuda else {}),
            **report,
        }

    @classmethod
    @plain_defaults()
    def load(cls, engine: EngineFile, threads: int | None, device: torch.device, autotune: bool) -> TorchRunner:
        """From an engine file.

        Raises:
            EngineFileError: its payload is damaged.
            BackendError: PyTorch fails, for want of memory for one.
        """
        stored = read_network(engine)
        config = config_of(engine.manifest)
        network = rebuild(engine.manifest, stored, str(engine.path))
        chooser = chooser_for(engine.manifest, device, autotune)
        try:
            network.to(device)
            example = _example(engine.manifest, device)
            with torch_threads(pool_of(threads)):
                report = {
                    "attention": choose_attention(network, example, chooser),
                    "layers": choose_products(
                        network, stored.packed, chooser, quantised=stored.quantised, inputs=example
                    ),
                }
        except RuntimeError as error:
            raise BackendError(f"{engine.path} cannot be loaded on {device}: {error}") from error
        return cls(network, config, device, report, threads)

    def _enqueue(self, state: Any, chunk: Any) -> None:
        with torch_threads(self._threads):
            super()._enqueue(state, chunk)

    def describe(self) -> dict[str, Any]:
        """See ``StepRunner.describe``."""
        return {**self._description, **self._torch.describe(), **super().describe()}

    def close(self) -> None:
        """See ``StepRunner.close``."""
        super().close()
        self._torch.close()


def chooser_for(manifest: Manifest, device: torch.device, autotune: bool) -> Chooser:
    """The chooser for an engine's layers and batches."""
    positions = {layer["name"]: layer["macs"] // layer["parameters"] for layer in manifest.layers}
    return Chooser(positions, manifest.batch, device, autotune)


def _example(manifest: Manifest, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of one network call with one sample, by name."""
    told = {
        each.name: torch.zeros(1, *each.shape, dtype=getattr(torch, each.dtype), device=device)
        for each in manifest.conditions
    }
    return {"x": torch.zeros(1, *manifest.data_shape, device=device), "t": torch.zeros(1, device=device), **told}


def find_device(name: str | None) -> torch.device:
    """ "cpu", "cuda" or "cuda:1" -> the device; None is CUDA where there is one. Raises UnsupportedError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UnsupportedError(f"device {name!r}: the torch backend runs on cpu, cuda and cuda:N")
    if not count:
        built = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise UnsupportedError(
            f"device {name!r}: torch {torch.__version__} {built}", "run on cpu, or install CUDA's torch"
        )
    if int(index or 0) >= count:
        raise UnsupportedError(f"device {name!r}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())

"""The network that an engine stands for: kept, or known by the place that it can be loaded from again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from sparse_engine.errors import CheckpointError, OptionError, UnsupportedError

KEEP = "leave keep_original at True"


def unwrapped(module: Any) -> Any:
    """The network inside what ``torch.compile`` made."""
    return getattr(module, "_orig_mod", module)


def weights_digest(network: nn.Module) -> str:
    """A hash of a network's weights and of the names, shapes and types that they have, at memory speed.

    Raises UnsupportedError where they are not there: offloaded, or never loaded.
    """
    state = network.state_dict()
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.is_meta:
            raise UnsupportedError(
                f"the network's weights are not in memory ({name} is on the meta device)",
                "use_engine before enable_sequential_cpu_offload or a device map",
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Original:
    """A pipeline's own network.

    Args:
        module: as the pipeline holds it, compiled or not.

    Attributes:
        kind: its class.
        config: its configuration.
        device, dtype: that it has.
        signature: of its ``forward``, "self" first.
        added_features: of SDXL's, how wide the pooled text and the sizes are together; None of others.
    """

    def __init__(self, module: Any) -> None:
        network = unwrapped(module)
        self._module: Any = module
        self._source: tuple[str, str] | None = None
        self.kind: Any = type(network)
        self.config: Mapping[str, Any] = dict(getattr(network, "config", {}))
        first = next(iter(network.parameters()), torch.empty(0))
        self.device, self.dtype = getattr(network, "device", first.device), getattr(network, "dtype", first.dtype)
        self.signature = inspect.signature(self.kind.forward)
        added = getattr(network, "add_embedding", None)
        self.added_features = getattr(getattr(added, "linear_1", None), "in_features", None)

    @property
    def kept(self) -> bool:
        """Whether the module itself is still held."""
        return self._module is not None

    def module(self) -> Any:
        """As the pipeline held it; loaded again where it was let go.

        Raises CheckpointError where it cannot be, or has other weights now.
        """
        if self._module is None and self._source is not None:
            self._module = self._loaded(*self._source)
        return self._module

    def network(self) -> Any:
        """The same, without what ``torch.compile`` puts around it."""
        return unwrapped(self.module())

    def let_go(self) -> None:
        """Free the weights, where the folder that they came from holds the very same.

        Raises OptionError where it does not.
        """
        path = self.config.get("_name_or_path")
        if not path or not Path(path).is_dir():
            raise OptionError(
                f"keep_original=False, and the network does not come from a folder that is there ({path or 'none'})",
                KEEP,
            )
        digest = weights_digest(self.network())
        try:
            self._loaded(path, digest)
        except CheckpointError as error:
            raise OptionError(
                f"keep_original=False: {error.what}", f"save the network and load it, or {KEEP}"
            ) from error
        self._module, self._source = None, (str(path), digest)

    def _loaded(self, path: str, digest: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # `dtype`, its new name, is not known to older versions
                network = self.kind.from_pretrained(path, torch_dtype=self.dtype, local_files_only=True)
        except Exception as error:  # of any kind, by what is wrong with the folder
            raise CheckpointError(
                f"{path}: the network cannot be loaded again: {error}", "restore the folder"
            ) from error
        if weights_digest(network) != digest:
            raise CheckpointError(f"{path} holds other weights than the network had", "restore the folder")
        return network.to(self.device).eval()

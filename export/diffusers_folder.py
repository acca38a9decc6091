"""Which of the files that diffusers writes into a folder are a network's weights.

A pipeline's folder holds ``model_index.json`` and a folder for each of its parts: ``transformer/`` or ``unet/`` is the
network, ``scheduler/`` says how it was trained (``diffusers_scheduler``). Old ones of a single network have all files
at the root. Beside the weights stands ``config.json``, whose ``_class_name`` says what the network is.
(huggingface/diffusers, ``ModelMixin.save_pretrained``.)
"""

from __future__ import annotations

import re
from pathlib import Path

from sparse_engine.errors import CheckpointError

PIPELINE = "model_index.json"
# The folders of a pipeline's network; those of averaged weights, which training scripts write, come first.
NETWORKS = ("transformer_ema", "transformer", "unet_ema", "unet")
DECODERS = ("vae", "vqvae", "movq")
WEIGHTS = re.compile(
    r"^diffusion_pytorch_model(?:\.(?P<variant>[a-z]\w*))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<of>\w+))?\.json)?$"
)
# Masks are the smallest weights', so the more digits the better; the others by name.
DIGITS = (None, "fp32", "fp16", "bf16")


def network_folder(folder: Path) -> Path | None:
    """The folder of a pipeline's network; None where ``folder`` is no pipeline's, or has the files at its root.

    Raises:
        CheckpointError: it holds two networks, or a pipeline with none.
    """
    if any(file.is_file() and _is_weights(file.name) for file in folder.iterdir()):
        return None
    found = [folder / name for name in NETWORKS if (folder / name).is_dir()]
    kinds = {part.name.removesuffix("_ema") for part in found}
    if len(kinds) > 1:
        raise CheckpointError(f"{folder} holds {' and '.join(sorted(kinds))}: two networks", "name one of the folders")
    if not found and (folder / PIPELINE).is_file():
        raise CheckpointError(
            f"{folder} has {PIPELINE} and no network; expected transformer/ or unet/ in it",
            "download that folder too; a pipeline without one has no denoiser that is taken",
        )
    return found[0] if found else None


def check_config(folder: Path) -> None:
    """A part of a pipeline has its configuration beside it. Raises CheckpointError where it is missing."""
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json; expected diffusers' configuration of the network beside its weights",
            "download it too: the number of heads and more cannot be read off the weights",
        )


def decoder_beside(weights: Path) -> Path | None:
    """The folder of what decodes a pipeline's latents, beside that of the network's file; None where there is none."""
    if weights.parent.name not in NETWORKS:
        return None
    pipeline = weights.parent.parent
    return next((pipeline / name for name in DECODERS if (pipeline / name).is_dir()), None)


def weights_in(folder: Path) -> tuple[Path, list[str]] | None:
    """The weights file of a network that diffusers saved, or the index of its shards, and what was decided.

    Full weights come before a variant's, safetensors before a pickle. None where there are none.
    """
    found = sorted(file for file in folder.iterdir() if file.is_file() and _is_weights(file.name))
    if not found:
        return None
    best = min(found, key=_rank)
    notes = [f"{best.name} taken, not {file.name}" for file in found if file is not best]
    variant = _variant(best.name)
    if variant is not None and variant != "fp32":
        notes.append(f"only {variant} weights are there: masks by magnitude are those of the rounded weights")
    return best, notes


def _is_weights(name: str) -> bool:
    return WEIGHTS.match(name) is not None


def _variant(name: str) -> str | None:
    match = WEIGHTS.match(name)
    return (match["variant"] or match["of"]) if match else None


def _rank(file: Path) -> tuple[int, bool, bool, str]:
    variant = _variant(file.name)
    digits = DIGITS.index(variant) if variant in DIGITS else len(DIGITS)
    return digits, ".safetensors" not in file.name, file.name.endswith(".json"), file.name

"""What a checkpoint says of its network, held against what is said of it: shapes, configurations, published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_engine.errors import CheckpointError, OptionError

from .base import Shapes

# embed_dim (and depth, where one size alone does not settle it) -> heads
PublishedHeads = Mapping[int | tuple[int, int], int]


def settle(
    given: dict[str, Any], read: Mapping[str, Any], published: PublishedHeads, kind: str = "U-ViT"
) -> tuple[int, list[str]]:
    """Hold a configuration's entries against what was read off the weights, and settle the number of heads.

    Args:
        given: by our names; what has been looked at is taken out.
        read: name -> what the weights say.
        published: embed_dim, or (embed_dim, depth) -> heads.
        kind: the family's name, for sentences.

    Returns:
        (heads, notes).
    """
    _check_ratio(given.pop("mlp_ratio", None), read["embed_dim"], read["mlp_hidden"])
    given.pop("qkv_bias", None)  # SparseDM's layers have a bias whatever its configuration says: the keys know
    agree(given, read)
    return _heads(read["embed_dim"], read["depth"], given.get("heads"), published, kind)


def agree(given: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Hold a configuration's entries against what was read off the weights. Raises CheckpointError."""
    for name, value in read.items():
        if name in given and given[name] != value:
            raise CheckpointError(
                f"{name} is {given[name]!r} in the given configuration, but the weights have {value}",
                "correct the configuration, or leave that entry out: it is read off the weights",
            )


MOST_RATIO = 1e6  # far beyond any network


def _check_ratio(ratio: Any, embed_dim: int, hidden: int) -> None:
    """A configuration's mlp_ratio has to be what the weights' widths are, or that rounded or cut as written."""
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= MOST_RATIO:
        raise CheckpointError(f"mlp_ratio is {ratio!r} in the given configuration; expected a number")
    product, decimals = ratio * embed_dim, len(repr(ratio).partition(".")[2])
    rounded = isinstance(ratio, float) and not ratio.is_integer() and round(hidden / embed_dim, decimals) == ratio
    if not rounded and hidden not in (int(product), round(product)):
        raise CheckpointError(
            f"mlp_ratio is {ratio!r} in the given configuration, {product:g} of embed_dim {embed_dim}, but the weights "
            f"have {hidden} ({hidden / embed_dim:.6g})",
            "correct the configuration, or leave that entry out: it is read off the weights",
        )


def shape_of(shapes: Shapes, name: str, ndim: int, kind: str = "U-ViT") -> tuple[int, ...]:
    """The shape of a key that has to be there. Raises CheckpointError."""
    if name not in shapes:
        raise CheckpointError(f"{name} is missing; a {kind} has it", "check that the checkpoint is complete")
    if len(shapes[name]) != ndim:
        raise CheckpointError(f"{name} has shape {list(shapes[name])}; expected {ndim} dimensions")
    return shapes[name]


def _heads(
    embed_dim: int, depth: int, given: int | None, published: PublishedHeads, kind: str
) -> tuple[int, list[str]]:
    """The number of heads leaves no trace in the weights: taken from the user or from the published sizes."""
    if given is not None:
        if given < 1 or embed_dim % given:
            raise OptionError(
                f"heads = {given} does not divide embed_dim = {embed_dim}",
                f"give the number the model was trained with, a divisor of {embed_dim}",
            )
        return given, []
    heads = published.get(embed_dim) or published.get((embed_dim, depth))
    if heads is None:
        raise CheckpointError(
            f"the number of attention heads cannot be read off the weights, and embed_dim {embed_dim} with depth "
            f"{depth} is no published size",
            "say it with --heads N, or in a configuration file beside the checkpoint",
        )
    return heads, [f"heads = {heads}: not in the weights; taken from the published {kind} of embed_dim {embed_dim}"]

"""A module to a graph beside the network: its weights in a file of their own, its batch dynamic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from sparse_engine.artifact import PayloadFile
from sparse_engine.backends.base import bytes_payload, weights_payload
from sparse_engine.errors import CheckpointError

from .step_graph import check_valid, to_graph, trace
from .weight_files import find_weights
from .weight_reading import read_weights


def graph_files(
    module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], graph_member: str, weights_member: str
) -> list[PayloadFile]:
    """Trace a module and lay its graph and its weights out as files of an engine.

    Args:
        module: in evaluation mode.
        example: argument of its ``forward`` -> [B, ...], B not 0 or 1; the first axis stays dynamic.
        outputs: what the graph calls its results.
        graph_member, weights_member: the files' names, in one folder of the engine.

    Raises:
        BackendError: torch cannot export it, or what comes out is no valid graph.
    """
    batch = torch.export.Dim("batch", min=1)
    dynamic = {name: {0: batch} for name in example}
    model = trace(module.eval(), dict(example), dynamic, list(example), list(outputs))
    graph = to_graph(model, PurePosixPath(weights_member).name)
    check_valid(graph.proto, graph_member)
    return [
        bytes_payload(graph_member, graph.proto.SerializeToString()),
        weights_payload(graph.weights, weights_member),
    ]


def read_tensors(folder: Path, names: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a folder of the Hub's: (name -> tensor, sha256 of their files).

    Args:
        folder: with weights whole or in shards, perhaps in several forms.
        names: of the files or indices that may hold them; the first that is there is read.

    Raises:
        CheckpointError: none is there, or it is damaged or holds something else than tensors.
    """
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights; expected {', '.join(names)}", "download the whole folder")
    files = find_weights(folder / found)
    held, _ = read_weights(files)
    if not held or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in held.items()):
        raise CheckpointError(f"{files.path} is no state dict of tensors", "download it again")
    return held, files.sha256()


def load_float32(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a module as float32: 16 bits are widened without loss.

    Raises CheckpointError where a weight is missing, unknown, of another shape, or not finite.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    lacking, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if lacking or unknown:
        what = f"lacks {lacking[0]}" if lacking else f"has {unknown[0]}, which its configuration does not call for"
        raise CheckpointError(f"{where} {what}", "check that weights and config.json are of one model")
    for name, shape in expected.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensor.shape)}; expected {list(shape)}",
                "check that weights and config.json are of one model",
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}, or not finite; expected plain float weights")
    module.load_state_dict({name: state[name].float() for name in expected})

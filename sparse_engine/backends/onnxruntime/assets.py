"""Sessions over the graphs that an engine holds beside the network: a text encoder, a decoder of latents."""

from __future__ import annotations

from typing import Any

import onnx

from sparse_engine.artifact import EngineFile
from sparse_engine.cores import pool_size
from sparse_engine.ending import keep_until_the_end, library_call
from sparse_engine.errors import BackendError, MissingDependencyError

from .choose import find_obstacle
from .forks import outlive_forks
from .group_norm import fuse_group_norms
from .library import load_onnxruntime
from .session import Prepared, create_session, weights_in_place


def asset_session(file: EngineFile, graph_member: str, weights_member: str, threads: int | None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, its weights mapped where they lie in the engine file.

    Args:
        file: the engine.
        graph_member, weights_member: names of the graph and of its weights in the file.
        threads: of its pool; None is one per core.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed; an engine of another backend runs without.
        EngineFileError: the engine has no such members, or they were altered.
        BackendError: ONNX Runtime refuses the graph.
    """
    try:
        onnxruntime = load_onnxruntime()
    except ImportError as error:
        raise MissingDependencyError(
            f"{file.path}: {graph_member} runs in onnxruntime; it is not installed", "pip install 'sparse-engine[cpu]'"
        ) from error
    obstacle = find_obstacle("fp32")
    data = file.read(graph_member)
    file.span(weights_member)
    try:
        with library_call():
            model = onnx.load_model_from_string(data)
            weights_in_place(model, file, weights_member)
            if obstacle is None:
                fuse_group_norms(model, lambda norm: [norm.node(pool_size(threads))])
            session = create_session(Prepared(model), file.path, threads)
            keep_until_the_end(session)
    except Exception as error:  # ONNX Runtime's own exceptions have no common public base
        file.verify()  # bytes that were altered are the likelier cause, and the clearer message
        raise BackendError(
            f"{file.path}: ONNX Runtime {onnxruntime.__version__} refuses {graph_member}: {error}"
        ) from error
    outlive_forks(session)
    return session

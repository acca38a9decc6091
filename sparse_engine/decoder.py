"""Latents to pixels: an engine's own decoder, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.ending import library_call
from sparse_engine.errors import BackendError, EngineFileError

GRAPH, WEIGHTS = "vae/decoder.onnx", "vae/decoder.bin"


class LatentDecoder:
    """An engine's decoder. Safe to call from several threads.

    Args:
        file: an engine whose manifest has ``assets["vae"]``.
        threads: of its session; None is one per core.

    Raises (on construction):
        MissingDependencyError: ``onnxruntime`` is not installed.
        EngineFileError: the engine says of its decoder what cannot be.
        BackendError: ONNX Runtime refuses the graph.
    """

    def __init__(self, file: EngineFile, threads: int | None = None) -> None:
        from sparse_engine.backends.onnxruntime.assets import asset_session

        self._session = asset_session(file, GRAPH, WEIGHTS, threads)
        self._picture = file.manifest.picture_shape
        takes, gives = self._session.get_inputs(), self._session.get_outputs()
        found = [(each.name, tuple(each.shape[1:])) for each in (*takes, *gives)]
        if found != [("latents", tuple(file.manifest.data_shape)), ("pixels", self._picture)]:
            raise EngineFileError(
                f"{file.path}: its decoder has {found}; its manifest says {file.manifest.data_shape} -> "
                f"{self._picture}",
                "rebuild the engine",
            )

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents, one image at a time: a decoder needs a hundred times the memory of what it decodes.

        Args:
            latents: float32 [B, C, H, W], as the network draws them.

        Returns:
            float32 [B, 3, H', W'], in -1..1 but for what the decoder overshoots; each image the same in any batch.

        Raises:
            BackendError: ONNX Runtime could not run it.
        """
        pixels = np.empty((len(latents), *self._picture), np.float32)
        for row, latent in zip(pixels, latents, strict=True):
            row[:] = self._decoded(np.ascontiguousarray(latent[None], np.float32))
        return pixels

    def _decoded(self, latent: np.ndarray) -> Any:
        try:
            with library_call():
                return self._session.run(("pixels",), {"latents": latent})[0][0]
        except Exception as error:  # ONNX Runtime's own exceptions have no common public base
            raise BackendError(f"ONNX Runtime could not run the decoder: {error}") from error

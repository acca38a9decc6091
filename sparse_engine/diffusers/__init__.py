"""An engine in place of a diffusers pipeline's network: one line in, one line out (extra ``diffusers``).

from sparse_engine.diffusers import restore, use_engine

use_engine(pipe, "sd15.sengine")  # or build=True
pipe("a red cube", num_inference_steps=20)
restore(pipe)
"""

from __future__ import annotations

from sparse_engine.errors import MissingDependencyError

try:
    import diffusers as _diffusers  # noqa: F401 - which brings torch
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"sparse_engine.diffusers needs {error.name}; it is not installed", "pip install 'sparse-engine[diffusers,cpu]'"
    ) from error

from .denoiser import EngineDenoiser
from .swap import restore, use_engine

__all__ = ["EngineDenoiser", "restore", "use_engine"]

"""CUDA C++ compiled where it runs, by NVIDIA's NVRTC over cuda-python."""

from __future__ import annotations

import functools
from typing import Any

from sparse_engine.errors import UnsupportedError

INSTALL = "pip install nvidia-cuda-nvrtc, of the major version of cuda-python"


@functools.cache
def compile_cubin(source: str, architecture: str) -> bytes:
    """A program as machine code of one compute capability ("86"), which needs no newer driver as PTX may.

    Raises UnsupportedError where there is no NVRTC, where it does not know the GPU, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc

        code, program = nvrtc.nvrtcCreateProgram(source.encode(), b"sparse_engine.cu", 0, [], [])
    except (ImportError, RuntimeError) as error:  # cuda-python, or the library that it looks for, is not there
        raise UnsupportedError(f"NVRTC is not there: {_first_line(error)}", INSTALL) from error
    _check(nvrtc, code, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture=sm_{architecture}".encode()]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _log(nvrtc, program)
            raise UnsupportedError(f"NVRTC does not compile for compute capability {architecture}: {log}", INSTALL)
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    lines = _text(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0 \n").splitlines()
    return lines[0] if lines else "no reason given"


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    """What NVRTC has of a program under ``nvrtcGet<what>``."""
    code, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, code, f"nvrtcGet{what}Size")
    data = b" " * size
    (code,) = getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    _check(nvrtc, code, f"nvrtcGet{what}")
    return data


def _check(nvrtc: Any, code: Any, call: str) -> None:
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnsupportedError(f"{call} failed: error {int(code)}", INSTALL)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

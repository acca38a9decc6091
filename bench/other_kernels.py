"""How far images drift where another machine's kernels draw them: the same engine and seed, under each instruction set.

    python -m sparse_engine.bench.other_kernels model.sengine --images 512 --steps 25

Our kernels run under every tier that this machine has, and without them ("scalar": all layers are ONNX Runtime's); the
kernel of each layer is the fastest, the slowest, or the one that is taken without timing. ONNX Runtime's own operators
stay those of this processor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from sparse_engine import tactics
from sparse_engine.images import psnr
from sparse_engine.kernels import library

CHOICES = ("fastest", "slowest", "untimed")
DRAW = """
import sys
from dataclasses import replace
import numpy as np
from sparse_engine import SparseEngine, tactics
fastest = tactics.fastest
def slowest(candidates):
    choice = fastest(candidates)
    times = {name: 1 / value for name, value in choice.milliseconds.items()}
    return replace(choice, kernel=min(times, key=times.get), milliseconds=times, noise=0.0)
if sys.argv[2] == "slowest":
    tactics.fastest = slowest
with SparseEngine.load(sys.argv[1], threads=1, autotune=sys.argv[2] != "untimed") as engine:
    np.save(sys.argv[3], engine.sample(int(sys.argv[4]), steps=int(sys.argv[5])))
"""


def draw(engine: Path, tier: str, choice: str, images: int, steps: int) -> np.ndarray | None:
    """uint8 [images, H, W, C], in a process of its own, its kernels capped at a tier; None where they cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "images.npy"
        command = [sys.executable, "-P", "-c", DRAW, str(engine), choice, str(output), str(images), str(steps)]
        places = {library.ISA_VARIABLE: tier, tactics.CACHE_VARIABLE: folder}
        done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
        if done.returncode and "UnsupportedError" in done.stderr:
            return None
        done.check_returncode()
        found: np.ndarray = np.load(output)
    return found


def drift(found: np.ndarray, expected: np.ndarray) -> str:
    """How far two sets of images are apart, in words."""
    apart = np.abs(found.astype(int) - expected.astype(int))
    share = np.count_nonzero(apart) / apart.size
    return f"at most {apart.max()} of 255, {share:.2%} of the values, {psnr(found, expected, (0, 255)):.1f} dB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    tiers = library.available_tiers()
    for engine in given.engine:
        expected = draw(engine, tiers[-1], CHOICES[0], given.images, given.steps)
        for tier in tiers:
            for choice in CHOICES:
                found = draw(engine, tier, choice, given.images, given.steps)
                if found is not None and expected is not None:
                    print(f"{engine.name} {tier} {choice}: {drift(found, expected)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

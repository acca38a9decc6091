"""What the emoji models draw, and what they were trained on that is most like it.

    python examples/emoji/pictures.py

Writes samples.png (twelve groups; of each, four pictures by the dense model and below them the 2:4 model's of the same
noise) and nearest.png (pictures by the 2:4 model; below each, the training picture that is nearest in pixels), and
prints how near: the median over 990 pictures, beside that of the training pictures to the nearest other one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions
from sparse_engine.export.build import build_engine

HERE = Path(__file__).parent
GROUPS = (
    "face-smiling", "cat-face", "heart", "person-role", "animal-mammal", "food-fruit",
    "transport-ground", "time", "clothing", "arrow", "geometric", "country-flag",
)  # fmt: skip
EACH, GUIDANCE, STEPS, SAMPLER, SCALE = 4, 2.0, 25, "dpm-solver++", 2


def drawn(name: str, labels: np.ndarray, guidance: float) -> np.ndarray:
    """Pictures by a model of this folder: uint8 [n, 32, 32, 3]."""
    with tempfile.TemporaryDirectory() as scratch:
        sparse = BuildOptions(sparse=name == "sparse")
        path, _ = build_engine(HERE / f"{name}.pth", Path(scratch) / "model.sengine", options=sparse)
        with SparseEngine.load(path) as engine:
            return engine.sample(
                len(labels), labels=labels, steps=STEPS, sampler=SAMPLER, guidance=guidance, batch_size=48
            )


def nearest(pictures: np.ndarray, others: np.ndarray, rank: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The other that is nearest to each picture, or next: its row, and how far it is (root mean square, 0 to 1)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (pictures, others))
    squared = (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)
    rows = np.argsort(squared, axis=1)[:, rank]
    return rows, np.sqrt(squared[np.arange(len(a)), rows].clip(0) / a.shape[1])


def sheet(rows: list[np.ndarray], path: Path) -> None:
    """Rows of pictures, uint8 [n, 32, 32, 3] each, as one PNG."""
    page = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    picture = Image.fromarray(page)
    picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Draw both pages, and print the distances."""
    groups = json.loads((HERE / "emoji.json").read_text(encoding="utf-8"))["groups"]
    real = np.load(HERE / "emoji.npz")["images"]
    labels = np.repeat([groups.index(name) for name in GROUPS], EACH)
    pairs = [drawn(name, labels, GUIDANCE) for name in ("dense", "sparse")]
    half = len(labels) // 2
    sheet([each[part] for part in (slice(half), slice(half, None)) for each in pairs], HERE / "samples.png")
    own = pairs[1][::2]
    sheet([own, real[nearest(own, real)[0]]], HERE / "nearest.png")
    unguided = drawn("sparse", np.repeat(np.arange(len(groups)), 10), 1.0)
    print(f"2:4 to the nearest training picture: {np.median(nearest(unguided, real)[1]):.3f}")
    print(f"training pictures to the nearest other: {np.median(nearest(real, real, rank=1)[1]):.3f}")


if __name__ == "__main__":
    main()

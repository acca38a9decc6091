"""An evaluation as a table, and as a page with the pictures side by side."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.files import replacing
from sparse_engine.images import encode_png, enlargement

from ..evaluate import Evaluation
from .page import STYLE, document, html_table

Row = dict[str, Any]
TITLES = {
    "psnr": "PSNR to the dense model's, dB",
    "ssim": "SSIM to the dense model's",
    "lpips": "LPIPS to the dense model's",
    "frechet": "Fréchet distance to the reference, pixels",
    "fid": "FID to the reference",
    "accuracy": "read right by a classifier",
}
DIGITS = {"psnr": ".2f", "ssim": ".4f", "lpips": ".4f", "frechet": ".3f", "fid": ".2f", "accuracy": ".1%"}
AMPLIFIED = 4  # the difference, so that it is seen
LARGEST = 128  # pixels of a picture on the page
PAIRS_STYLE = """
.pairs { display: flex; flex-wrap: wrap; gap: 0.9rem; }
.pair { font-size: 0.75rem; font-variant-numeric: tabular-nums; }
.pair img { image-rendering: pixelated; margin-right: 2px; vertical-align: top; border: 1px solid #ddd; }
"""


def evaluation_table(results: Row) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a metric each, mean and spread of both models."""
    headers = ["", "pruned", "dense", "tool"]
    rows = []
    for name, row in results["metrics"].items():
        cells = [_cell(row.get(whose), DIGITS.get(name, ".4g")) for whose in ("candidate", "dense")]
        rows.append([TITLES.get(name, name), *cells, row["tool"]])
    return headers, rows


def _cell(values: Row | None, digits: str) -> str:
    if values is None:
        return "-"
    spread = "" if values["spread"] is None else f" ± {values['spread']:{digits}}"
    return f"{values['mean']:{digits}}{spread}"


def remarks(results: Row) -> list[str]:
    """What the table does not say."""
    seeds = results["seeds"]
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    guided = f", guidance {results['guidance']:g}" if results["guidance"] != 1 else ""
    drawn = (
        f"{results['images']} images of each seed, {results['steps']} steps of {results['sampler']}{guided}; {over}."
    )
    against = [f"Reference: {results['reference']}."] if results["reference"] else []
    distances = {"frechet", "fid"} & results["metrics"].keys()
    fewer = ["Distances between distributions fall with the number of images: compare equal numbers alone."]
    return [drawn, *against, *(fewer if distances else []), *results["notes"]]


def write_page(path: Path, found: Evaluation) -> None:
    """Write the page, which needs nothing else. Raises OutputError."""
    with replacing(path) as stream:
        stream.write(page(found).encode())


def page(found: Evaluation) -> str:
    """The page's text."""
    results = found.results
    title = "sparse-engine evaluate: pruned against dense"
    models = "".join(
        f"<tr><th>{name}</th><td><code>{html.escape(str(results[key]['path']))}</code>, {results[key]['precision']}, "
        f"{results[key]['masked_layers']} masked layers</td></tr>"
        for name, key in (("pruned", "candidate"), ("dense", "dense"))
    )
    body = [f"<h1>{title}</h1>", f"<table>{models}</table>", html_table(*evaluation_table(results))]
    body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in remarks(results)) + "</ul>")
    for name, dense, pruned, psnr in found.pairs:
        shown = "".join(_pair(*each) for each in zip(dense, pruned, psnr.tolist(), strict=True))
        body.append(f"<h2>{html.escape(name)}</h2><p>dense, pruned, their difference x {AMPLIFIED}; PSNR</p>")
        body.append(f'<div class="pairs">{shown}</div>')
    return document(title, body, STYLE + PAIRS_STYLE)


def _pair(dense: np.ndarray, pruned: np.ndarray, psnr: float) -> str:
    difference = np.abs(dense.astype(np.int16) - pruned.astype(np.int16)) * AMPLIFIED
    pictures = {"dense": dense, "pruned": pruned, "difference": difference.clip(0, 255).astype(np.uint8)}
    if dense.shape[-1] == 4:  # an opacity of 0 would hide the difference
        pictures["difference"][..., 3] = 255
    return f'<div class="pair">{"".join(_picture(*each) for each in pictures.items())}<br>{psnr:.1f} dB</div>'


def _picture(name: str, image: np.ndarray) -> str:
    height, width = image.shape[:2]
    scale = min(enlargement(height, width), 8) if max(height, width) <= LARGEST else LARGEST / max(height, width)
    data = base64.b64encode(encode_png(image)).decode()
    size = f'width="{round(width * scale)}" height="{round(height * scale)}"'
    return f'<img alt="{name}" {size} src="data:image/png;base64,{data}">'

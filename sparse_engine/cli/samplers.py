"""``sparse-engine samplers``: what ``--sampler`` takes."""

from __future__ import annotations

from typing import Annotated

import typer

from sparse_engine import sampling

from .terminal import console, make_table, print_json, tell

COMMON_OPTIONS = ("t_start", "t_end", "spacing", "denoise_to_zero")


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the samplers, their options and sources."""
    rows = [sampler.to_dict() for sampler in sampling.SAMPLERS.values()]
    if as_json:
        print_json(rows)
        return
    table = make_table("sampler", "evaluations\nper step", "draws\nnoise", "flow\nmatching", "own options", "source")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["evaluations_per_step"]),
            "no" if row["deterministic"] else "yes",
            "yes" if row["flow_matching"] else "no",
            ", ".join(option for option in row["options"] if option not in COMMON_OPTIONS),
            row["source"],
        )
    console.print(table)
    tell(f"All take {', '.join(COMMON_OPTIONS)}. Steps count network evaluations.")

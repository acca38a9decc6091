"""``sparse-engine doctor``: what this machine can run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from sparse_engine.doctor import diagnose, to_dicts

from .terminal import console, make_table, print_json


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what this machine can run, and why not."""
    findings = diagnose()
    if as_json:
        print_json(to_dicts(findings))
        return
    table = make_table("", "what", "found", "what to do")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[yellow]--[/]"
        table.add_row(mark, finding.name, escape(finding.found), escape(finding.fix or ""))
    console.print(table)

"""Results as one self-contained page, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path
from typing import Any

from sparse_engine.errors import OutputError
from sparse_engine.files import check_writable, output_error, replacing

from ..results_file import rows_of
from .figures import Plot, plots
from .tables import Rows, layer_rows, remarks, tables, titled_rows

Row = dict[str, Any]
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.87rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid #ccc; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; } figcaption { font-weight: 600; }
code { overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def check_folder(folder: Path) -> None:
    """Say before the work that a report cannot be written there. Raises OutputError."""
    if os.path.isfile(folder):
        raise OutputError(f"--report {folder} is a file; expected a folder", "name a folder")
    if not os.path.exists(folder.parent):
        raise OutputError(f"--report {folder}: the folder {folder.parent} does not exist", "create it, or name another")
    check_writable(folder / "index.html" if os.path.isdir(folder) else folder)


def write_report(folder: Path, results: Row) -> list[Path]:
    """Write ``index.html``, which needs nothing else, and one PNG per figure.

    Returns the files written. Raises OutputError where they cannot be.
    """
    drawn = plots(results)
    contents = {"index.html": page(results, drawn).encode(), **{f"{plot.name}.png": plot.png() for plot in drawn}}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    for name, data in contents.items():
        with replacing(folder / name) as stream:
            stream.write(data)
    return [folder / name for name in contents]


def page(results: Row, drawn: list[Plot]) -> str:
    """The page's text. No script, nothing from elsewhere."""
    title = "sparse-engine bench: " + ("the paper's grid" if results["kind"] == "grid" else "one model")
    body = [f"<h1>{title}</h1>", _facts(results)]
    body += [f"<h2>{html.escape(name)}</h2>{html_table(*table)}" for name, table in tables(results, wide=True)]
    body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in remarks(results)) + "</ul>")
    body += [_figure(plot) for plot in drawn]
    if not any(row.get("quality") for row in rows_of(results)):
        body.append("<p>Quality was not measured: random weights have none to lose.</p>")
    body += [
        f"<details><summary>By layer: {html.escape(name)}</summary>{html_table(*layer_rows(row))}</details>"
        for name, row in titled_rows(results)
        if row.get("layers")
    ]
    return document(title, body)


def document(title: str, body: list[str], style: str = STYLE) -> str:
    """A page of its own: no script, nothing from elsewhere."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">\n'
        f"<style>{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _facts(results: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads = results["threads"] or "one per core"
    facts = {
        "command": results["command"],
        "machine": results["machine"]["processor"],
        "threads": threads,
        "versions": f"sparse-engine {results['tool_version']} (commit {results['commit'] or 'unknown'}), {versions}",
    }
    rows = "".join(
        f"<tr><th>{name}</th><td><code>{html.escape(str(text))}</code></td></tr>" for name, text in facts.items()
    )
    return f"<table>{rows}</table>"


def html_table(headers: list[str], rows: Rows) -> str:
    """A table; a cell in ** is bold."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    lines = "".join(f"<tr>{''.join(f'<td>{_bold(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _bold(cell: str) -> str:
    text = html.escape(cell)
    return f"<strong>{text.strip('*')}</strong>" if text.startswith("**") else text


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg()).decode()
    image = f'<img alt="{html.escape(plot.text)}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure id="{plot.name}"><figcaption>{html.escape(plot.title)}</figcaption>{image}</figure>'

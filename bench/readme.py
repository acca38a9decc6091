"""The README's performance section, written from the results files that are committed.

python -m sparse_engine.bench.readme
"""

from __future__ import annotations

from pathlib import Path

from .gpu.table import section as gpu_section
from .report import markdown
from .results_file import read_results

CHECKOUT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: python -m sparse_engine.bench.readme -->", "<!-- end of performance -->"
# Results file -> what stands above its table.
SECTIONS = {
    "cpu-uvit-s-fp32.json": "U-ViT-S (44 M parameters, 52 masked layers, 32x32 images), one solver step, fp32",
    "cpu-uvit-s-bf16.json": "The same in bf16: sparse products and attention, against the bf16 of other runtimes",
    "cpu-grid-quick-fp32.json": "The paper's grid at embed 512, depth 2, batch 4",
}


def section(folder: Path) -> str:
    """The section's text. Raises InputError where a results file is missing or of another schema."""
    parts = []
    for name, title in SECTIONS.items():
        results = read_results(folder / name)
        machine = _processor(results["machine"]["processor"])
        threads = f"{results['threads']} threads" if results["threads"] else "one thread per core"
        versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
        parts.append(f"{title} (`{results['command']}`; {machine}, {threads}; {versions}):")
        parts.append(markdown(results))
    return "\n\n".join(filter(None, [*parts, gpu_section(folder)]))


def _processor(facts: str) -> str:
    """Shorten "vendor_id : X; cpu family : 25; model : 17; model name : Y; ..." to "Y (family 25, model 17)"."""
    found = dict(fact.split(" : ", 1) for fact in facts.split("; ") if " : " in fact)
    if "model name" not in found:
        return facts
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def main() -> None:
    """Write the section into README.md, between its marks."""
    readme = CHECKOUT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{section(CHECKOUT / 'bench' / 'results')}\n{END}{after}")


if __name__ == "__main__":
    main()

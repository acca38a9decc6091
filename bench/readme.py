"""The performance sections of the READMEs, written from the results files that are committed.

python -m sparse_engine.bench.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import kernels
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
    "cpu-grid-1024-fp32.json": "The same at embed 1024, depth 2, batch 1",
    "cpu-avx2-uvit-s-fp32.json": "On a processor that has AVX2 and no AVX-512 (a Zen 3), U-ViT-S in fp32",
    "cpu-avx2-grid-quick-fp32.json": "There, the paper's grid at embed 512, depth 2, batch 4",
}
KERNEL_SECTIONS = {
    "kernels-fp32.json": "In fp32",
    "kernels-bf16.json": "In bf16",
    "kernels-avx2-fp32.json": "In fp32 on a processor that has AVX2 and no AVX-512 (a Zen 3)",
}


def section(folder: Path) -> str:
    """The README's section. Raises InputError where a results file is missing or of another schema."""
    parts = []
    for name, title in SECTIONS.items():
        results = read_results(folder / name)
        parts += [f"{title} ({_facts(results)}):", markdown(results)]
    return "\n\n".join(filter(None, [*parts, gpu_section(folder)]))


def kernels_section(folder: Path) -> str:
    """The section of the kernels' README. Raises as ``section`` does."""
    parts = []
    for name, title in KERNEL_SECTIONS.items():
        results = read_results(folder / name)
        parts += [f"{title} ({_facts(results)}):", kernels.markdown(results)]
    return "\n\n".join(parts)


def _facts(results: dict[str, Any]) -> str:
    """The command, the machine and the versions that a run's numbers depend on."""
    machine = _processor(results["machine"]["processor"])
    facts = [f"`{results['command']}`", machine]
    if results["kind"] != "kernels":  # whose table says it per row
        facts[-1] += f", {results['threads']} threads" if results["threads"] else ", one thread per core"
    return "; ".join([*facts, ", ".join(f"{package} {version}" for package, version in results["versions"].items())])


def _processor(facts: str) -> str:
    """Shorten "vendor_id : X; cpu family : 25; model : 17; model name : Y; ..." to "Y (family 25, model 17)"."""
    found = dict(fact.split(" : ", 1) for fact in facts.split("; ") if " : " in fact)
    if "model name" not in found:
        return facts
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


PAGES = {"README.md": section, "sparse_engine/kernels/README.md": kernels_section}


def main() -> None:
    """Write each section into its page, between its marks."""
    for name, write in PAGES.items():
        page = CHECKOUT / name
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{write(CHECKOUT / 'bench' / 'results')}\n{END}{after}")


if __name__ == "__main__":
    main()

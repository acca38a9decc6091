"""The performance sections of README and pages, written from the results files that are committed.

python -m sparse_engine.bench.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import kernels
from .arms import DENSE, SPARSE
from .gpu.table import section as gpu_section
from .report import markdown
from .report.tables import markdown_table, ratio_text
from .results_file import read_results

CHECKOUT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: python -m sparse_engine.bench.readme -->", "<!-- end of performance -->"
# Results file -> what stands above its table.
SECTIONS = {
    "cpu-uvit-s-fp32.json": "U-ViT-S (44 M parameters, 52 masked layers, 32x32 images), one solver step, fp32",
    "cpu-uvit-s-bf16.json": "The same in bf16: sparse products and attention, against the bf16 of other runtimes",
    "cpu-uvit-s-int8.json": "The same in int8, against the same Q/DQ graph in other runtimes, and all else they have",
    "cpu-grid-quick-fp32.json": "The paper's grid at embed 512, depth 2, batch 4",
    "cpu-grid-1024-fp32.json": "The same at embed 1024, depth 2, batch 1",
    "cpu-avx2-uvit-s-fp32.json": "On a processor that has AVX2 and no AVX-512 (a Zen 3), U-ViT-S in fp32",
    "cpu-avx2-grid-quick-fp32.json": "There, the paper's grid at embed 512, depth 2, batch 4",
}
# Networks of random weights in one table: results file -> what the network is.
NETWORKS = {
    "cpu-uvit-s-t2i-fp32.json": "U-ViT-S text-to-image, 334 tokens",
    "cpu-uvit-s-t2i-bf16.json": "U-ViT-S text-to-image, 334 tokens",
    "cpu-dit-b2-fp32.json": "DiT-B/2, 32x32 latents",
    "cpu-dit-b2-bf16.json": "DiT-B/2, 32x32 latents",
    "cpu-dit-l2-fp32.json": "DiT-L/2, 32x32 latents",
    "cpu-dit-l2-bf16.json": "DiT-L/2, 32x32 latents",
    "cpu-sparsedm-cifar10-fp32.json": "SparseDM's U-Net, 32x32",
    "cpu-sparsedm-cifar10-bf16.json": "SparseDM's U-Net, 32x32",
    "cpu-sparsedm-cifar10-int8.json": "SparseDM's U-Net, 32x32",
    "cpu-ddpm-cifar10-fp32.json": "google/ddpm-cifar10-32's U-Net, 32x32",
    "cpu-ddpm-cifar10-bf16.json": "google/ddpm-cifar10-32's U-Net, 32x32",
    "cpu-sd15-fp32.json": "Stable Diffusion 1.5's U-Net, 64x64 latents",
}
KERNEL_SECTIONS = {
    "kernels-fp32.json": "In fp32",
    "kernels-bf16.json": "In bf16",
    "kernels-int8.json": "In int8, floats in and floats out (ONNX Runtime's products are dense)",
    "kernels-avx2-fp32.json": "In fp32 on a processor that has AVX2 and no AVX-512 (a Zen 3)",
}


# One network in each precision, for the table of what each runtime is fastest in.
BY_PRECISION = ("cpu-uvit-s-fp32.json", "cpu-uvit-s-bf16.json", "cpu-uvit-s-int8.json")


def section(folder: Path) -> str:
    """The page of benchmarks. Raises InputError where a results file is missing or of another schema."""
    parts = []
    for name, title in SECTIONS.items():
        results = read_results(folder / name)
        parts += [f"{title} ({_facts(results)}):", markdown(results)]
    return "\n\n".join(filter(None, [*parts, networks_table(folder), gpu_section(folder)]))


def fastest_table(folder: Path) -> str:
    """U-ViT-S by runtime and precision, and how many times faster ours is. Raises as ``section`` does."""
    files = {results["precision"]: results for results in (read_results(folder / name) for name in BY_PRECISION)}
    last = files[list(files)[-1]]  # which has all precisions of the other runtimes
    batches = [row["batch"] for row in last["rows"]]
    peers = dict.fromkeys(facts["peer"] for facts in last["rows"][0]["candidates"].values() if "peer" in facts)
    rows = [["**2:4 sparse**", *(_by_batch(results["rows"], SPARSE) for results in files.values())]]
    for peer in peers:
        cells = [
            _by_batch(results["rows"], _of_peer(results["rows"][0], peer, each)) for each, results in files.items()
        ]
        rows.append([peer, *cells])
    over = [[ratio_text(row["speedups"][row["best_peer"]], "x") for row in each["rows"]] for each in files.values()]
    rows.append(["ours over the best of the same precision", *("; ".join(each) for each in over)])
    any_best = "; ".join(
        f"{ratio_text(row['speedups'][best], 'x')} ({best})"
        for row in last["rows"]
        for best in [row["best_peer_in_any_precision"]]
    )
    machines = ", ".join(dict.fromkeys(_processor(each["machine"]["processor"]) for each in files.values()))
    sizes = ", ".join(map(str, batches))
    title = f"U-ViT-S, one solver step, ms at batch {sizes}, each column one interleaved run ({machines}):"
    note = f"Our fastest over the fastest other in any precision: {any_best}."
    return "\n\n".join([title, markdown_table(["", *files], rows), note])


def _of_peer(row: dict[str, Any], peer: str, precision: str) -> str | None:
    """The candidate that is a runtime in a precision, if it was timed."""
    facts = {"peer": peer, "precision": precision}
    return next((name for name, found in row["candidates"].items() if facts.items() <= found.items()), None)


def _by_batch(rows: list[dict[str, Any]], name: str | None) -> str:
    """Medians of a candidate, batch by batch; "-" where it does not run."""
    return " / ".join(f"{row['milliseconds'][name]['median']:.0f}" for row in rows) if name else "-"


def networks_table(folder: Path) -> str:
    """The other networks, one row for each precision and batch; "" where none was measured.

    Raises as ``section`` does.
    """
    files = {name: read_results(folder / name) for name in NETWORKS if (folder / name).exists()}
    if not files:
        return ""
    first = next(iter(files.values()))
    command = f"sparse-engine bench --random NAME --precision P --peers --threads {first['threads']}"
    machines = ", ".join(dict.fromkeys(_processor(each["machine"]["processor"]) for each in files.values()))
    headings = ["network", "precision", "batch", "2:4, ms", "best other, ms", "over it", "our own dense, ms", "over it"]
    rows = [
        [NETWORKS[name], results["precision"], str(row["batch"]), *_against_others(row)]
        for name, results in files.items()
        for row in results["rows"]
    ]
    facts = f"`{command}`; {machines}; versions are in the files"
    title = f"Other networks, random weights, one solver step ({facts}):"
    note = (
        '"Over it" with its 99 % interval. The other runtimes are ONNX Runtime, OpenVINO and PyTorch, eager and '
        "compiled, in the same precision."
    )
    return "\n\n".join([title, markdown_table(headings, rows), note])


def _against_others(row: dict[str, Any]) -> list[str]:
    """Ours, the best other runtime of the same precision, if any ran, our own dense engine, and ours over both."""
    milliseconds, best = row["milliseconds"], row["best_peer"]
    other = [f"{milliseconds[best]['median']:.1f} ({best})", ratio_text(row["speedups"][best])] if best else ["-", "-"]
    dense = [f"{milliseconds[DENSE]['median']:.1f}", ratio_text(row["speedups"][DENSE])]
    return [f"{milliseconds[SPARSE]['median']:.1f}", *other, *dense]


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


PAGES = {"README.md": fastest_table, "docs/benchmarks.md": section, "sparse_engine/kernels/README.md": kernels_section}


def main() -> None:
    """Write each section into its page, between its marks."""
    for name, write in PAGES.items():
        page = CHECKOUT / name
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{write(CHECKOUT / 'bench' / 'results')}\n{END}{after}")


if __name__ == "__main__":
    main()

"""Every command and line of Python that the README shows, run in order; its numbers, held against the files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.slow
def test_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```(sh|python) run\n(.*?)```", README, re.S)
    assert {language for language, _ in blocks} == {"sh", "python"}
    (tmp_path / "examples").mkdir()
    shutil.copytree(REPOSITORY / "examples" / "digits", tmp_path / "examples" / "digits")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    for language, text in blocks:
        command = ["sh", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "digits.png").is_file()


def test_numbers_of_the_first_result_are_those_of_the_results_file() -> None:
    rows = json.loads((REPOSITORY / "examples" / "digits" / "results.json").read_text())["models"]
    for row in rows:
        assert f"| {row['model']} | {row['accuracy_w1']:.1%} | {row['frechet_w1']:.2f} |" in README
    trained = next(row for row in rows if row["model"].startswith("SparseDM"))
    assert f"at most {100 * trained['energy_removed']:.1f} % in a layer" in README


def test_files_that_the_readme_links_to_are_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_make_targets_of_the_readme_and_ci() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.findall(r"^make (\w+)", README, re.M) == ["demo", "test"]
    assert re.findall(r"^make (\w+)", (REPOSITORY / ".ci" / "run").read_text(), re.M) == ["lint", "test"]
    for target in ("demo", "test", "lint"):
        assert f"\n{target}:" in makefile


def test_performance_sections_are_the_results_files() -> None:
    from sparse_engine.bench.readme import BEGIN, END, PAGES

    assert set(PAGES) == {"README.md", "sparse_engine/kernels/README.md"}
    for page, section in PAGES.items():
        assert f"{BEGIN}\n{section(REPOSITORY / 'bench' / 'results')}\n{END}" in (REPOSITORY / page).read_text(), page


def test_the_table_of_precisions_is_the_results_file() -> None:
    rows = json.loads((REPOSITORY / "bench" / "results" / "engines-uvit-s-int8.json").read_text())["rows"]
    names = {"fp32-dense": "dense, fp32", "fp32-sparse": "2:4, fp32", "bf16-sparse": "2:4, bf16", "int8": "dense, int8"}
    for engine, name in names.items():
        cells = [f"{row['milliseconds'][engine]['median']:.1f} ms" for row in rows]
        if engine != "fp32-dense":
            ratios = [row["speedups"][engine] for row in rows]
            shown = [f"{each['median']:.2f} [{each['low']:.2f}, {each['high']:.2f}]x" for each in ratios]
            cells = [", ".join(pair) for pair in zip(cells, shown, strict=True)]
        assert " | ".join([f"| {name}", *cells]) + " |" in README

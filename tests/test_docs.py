"""README and pages: what they show is run, their links and numbers are held against the files, the site is built."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.test_bundle import make_sd

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.compile(r"```(sh|python) run\n(.*?)```", re.S)
PAGES_THAT_RUN = [page for page in sorted((REPOSITORY / "docs").glob("*.md")) if BLOCKS.search(page.read_text())]
TEXTS = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / "examples").glob("*/README.md"),
    REPOSITORY / "sparse_engine" / "kernels" / "README.md",
]


@pytest.mark.slow
def test_what_the_pages_show_runs(tmp_path: Path) -> None:
    """The README's blocks, then those of each page, one after the other in one folder."""
    (tmp_path / "examples").mkdir()
    shutil.copytree(REPOSITORY / "examples" / "digits", tmp_path / "examples" / "digits")
    make_sd(tmp_path / "small", length=77).save_pretrained(tmp_path / "stable-diffusion-v1-5")  # of docs/diffusers.md
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "SPARSE_ENGINE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for page in (REPOSITORY / "README.md", *PAGES_THAT_RUN):
        for language, text in BLOCKS.findall(page.read_text()):
            command = ["sh", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{page.name}\n{text}\n{done.stdout}\n{done.stderr}"
    for name in ("digits.png", "cube.png", "cube-engine.png"):
        assert (tmp_path / name).is_file()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and the reference from docstrings included; nothing is fetched."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-b",
        "html",
        "-d",
        tmp_path / "trees",
        "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert "SparseEngine.sample" in reference
    assert "the number, within its seed, of the first image" in re.sub("<[^>]+>", "", reference)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_are_linked_to_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_targets_of_the_readme_and_ci() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.findall(r"^make (\w+)", README, re.M) == ["demo", "test"]
    assert re.findall(r"^make (\w+)", (REPOSITORY / ".ci" / "run").read_text(), re.M) == ["lint", "test"]
    for target in ("demo", "test", "lint"):
        assert f"\n{target}:" in makefile


def test_performance_sections_are_the_results_files() -> None:
    from sparse_engine.bench.readme import BEGIN, END, PAGES

    assert set(PAGES) == {"README.md", "docs/benchmarks.md", "sparse_engine/kernels/README.md"}
    for page, section in PAGES.items():
        assert f"{BEGIN}\n{section(REPOSITORY / 'bench' / 'results')}\n{END}" in (REPOSITORY / page).read_text(), page

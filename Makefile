# `make demo` and `make test` set everything up on a fresh machine; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DIGITS := examples/digits
CPP := $(wildcard sparse_engine/kernels/src/*.h sparse_engine/kernels/src/*.cpp tests/kernels/*.cpp)
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS ?=
JOBS ?= 2

.PHONY: demo test gpu-check lint format docs wheel clean

demo: $(READY)
	mkdir -p out
	$(BIN)/sparse-engine build $(DIGITS)/sparsedm.pth --sparse -o out/digits.sengine
	$(BIN)/sparse-engine verify out/digits.sengine --against $(DIGITS)/sparsedm.pth
	$(BIN)/sparse-engine sample out/digits.sengine -n 60 --labels 0-9 --guidance 2 --steps 25 -o out/digits.png
	$(BIN)/python $(DIGITS)/compare.py out/digits.sengine
	$(BIN)/sparse-engine calibrate $(DIGITS)/sparsedm.pth --sparse -o out/calib.npz
	$(BIN)/sparse-engine build $(DIGITS)/sparsedm.pth --sparse --precision int8 --calib out/calib.npz -o out/digits-int8.sengine
	$(BIN)/sparse-engine evaluate out/digits-int8.sengine --against $(DIGITS)/dense.pth
	$(BIN)/sparse-engine bench --checkpoint $(DIGITS)/sparsedm.pth --batch 1,16,64 --repeat 3 --seconds 1
	$(BIN)/sparse-engine bench --random uvit-s --batch 1,4 --repeat 3 --seconds 4
	$(BIN)/sparse-engine bench --random uvit-s --precision int8 --batch 1,4 --repeat 3 --seconds 2
	@echo "Look at out/digits.png: digits drawn by the 2:4 sparse model, one class a column."

# Fixtures are made once a process: more of them than cores cost more than they gain.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --style=file:sparse_engine/kernels/.clang-format --dry-run -Werror $(CPP)

# Runs from the checkout with any Python that has torch with CUDA, numpy and onnx: nothing is installed.
# make gpu-check GPU_ARGS="--steps 1,3 --budget 200"
gpu-check:
	rm -rf out/path
	mkdir -p out/path/sparse_engine
	ln -s $(CURDIR)/sparse_engine/* $(CURDIR)/export $(CURDIR)/calibration $(CURDIR)/pruning $(CURDIR)/bench out/path/sparse_engine
	PYTHONPATH=$(CURDIR)/out/path $(GPU_PYTHON) -P -m sparse_engine.bench.gpu $(GPU_ARGS)

# The site, in out/site; a warning is an error, links included.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W -E -b html docs out/site

# What others install, in dist/: the sdist, and a wheel built out of it. Without the kernels that fails.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; build_sdist('dist')"
	SPARSE_ENGINE_REQUIRE_KERNELS=1 $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist dist/*.tar.gz

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format --style=file:sparse_engine/kernels/.clang-format -i $(CPP)

# torch first and alone: its exact pin lets a machine that has a CPU build use it.
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,export,bench,examples,dev,tensorrt-rtx]'
	touch $@

clean:
	rm -rf build dist out $(VENV) .mypy_cache .pytest_cache .ruff_cache

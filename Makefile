# make demo   set up, then two particles of "a green duck" on two ranks: about five minutes on two CPU cores
# make demo-mesh  the same in three stages, to textured meshes (GLB): some ten minutes
# make test   set up with what tests need too, then lint and all tests: some twelve minutes on two CPU cores; beside them, on every other Python
#             from 3.10 to 3.14 that is installed the tests of a minute, each in an environment of its own (minutes and gigabytes, once)
# make quick  the tests of a minute (tests/conftest.py); of another Python: make quick PYTHON=python3.13
# make compare  every objective on the same prompts, seeds and budget (resumable, some three hours); make compare-quick: 3 prompts
# make bench-gpu  on a machine with an NVIDIA GPU: what is right, promised and fast there, in under ten minutes (benchmarks/gpu.py)
# make gallery  twelve prompts in three stages: a table and pictures (resumable; 40 minutes on two CPU cores)

PYTHON ?= python3
TORCH ?= 2.13.0
# A Python that is named on the command line has an environment of its own beside the other.
VENV := .venv$(if $(findstring command line,$(origin PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
CORES := $(shell nproc 2>/dev/null || echo 1)
RANKS := $(shell [ $(CORES) -ge 2 ] && echo 2 || echo 1)
# Twice as many as ranks: some tests mostly wait, for Slurm or for ranks that are lost.
WORKERS := $(shell [ $(CORES) -ge 2 ] && echo 4 || echo 1)
DEMO := runs/demo
DEMO_MESH := runs/demo-mesh

.PHONY: demo demo-mesh test others quick gallery compare compare-quick bench-gpu lint clean

# torch first and pinned: left to the other packages, pip may choose a build with gigabytes of CUDA.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 14) else f"Python 3.10 to 3.14 is needed, {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed_for_quick: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed_for_tests: $(VENV)/.installed_for_quick
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deepspeed,bench]'
	touch $@

demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file launch_configs/cpu.yaml --num_processes $(RANKS) \
		-m dist_vsd train "a green duck" --preset embedded-multiview --num-particles 2 --run-dir $(DEMO) $(if $(wildcard $(DEMO)/config.yaml),--resume)

demo-mesh: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file launch_configs/cpu.yaml --num_processes $(RANKS) \
		-m dist_vsd train "a green duck" --preset object --num-particles 2 --run-dir $(DEMO_MESH) $(if $(wildcard $(DEMO_MESH)/config.yaml),--resume)
	$(BIN)/dist-vsd export $(DEMO_MESH) --format glb

test: $(VENV)/.installed_for_tests lint others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The environments of the other Pythons; what can't be made is named with its reason, and its tests are skipped.
others: $(VENV)/.installed_for_tests
	$(BIN)/python -m tests.pythons $(TORCH)

quick: $(VENV)/.installed_for_quick
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m quick

lint: $(VENV)/.installed_for_tests
	$(BIN)/ruff check .

gallery: $(VENV)/.installed
	$(BIN)/python benchmarks/gallery.py

compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py

compare-quick: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py --scale quick

# Beside the package it starts each launch configuration, those of DeepSpeed too.
bench-gpu: $(VENV)/.installed_for_tests
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv .venv-* build *.egg-info

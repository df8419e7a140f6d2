# Every target sets up what it needs: a virtual environment in .venv, the pinned requirements, the extension in place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml
CPP := $(filter csrc/%,$(NATIVE)) $(wildcard tests/cuda/emulation/*)

.PHONY: help demo test lint docs format bench bench-avx2 bench-readme clusters few-shot optimizers paper paper-times paper-curves ptxas gpu-check sanitize wheel check-wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      meta-train an optimizer, against tuned baselines, and MAML with and without clusters; pictures in runs (4 minutes)"
	@echo "make test      run the tests"
	@echo "make lint      ruff, mypy, import-linter, clang-format"
	@echo "make docs      build the documentation into site/, and check its links and anchors"
	@echo "make format    let ruff and clang-format rewrite the sources"
	@echo "make bench     measure the kernels against PyTorch (bench/results)"
	@echo "make bench-avx2  the same with the kernels for AVX2"
	@echo "make clusters  train with and without clusters, five seeds, and compare (two hours of two cores; goes on where it was stopped)"
	@echo "make few-shot  Meta-LSTM and the LSTM rule in the inner loop, against MAML, Meta-SGD and ANIL (half an hour of one core; goes on where it was stopped)"
	@echo "make optimizers  the shipped optimizer \"general\" against tuned baselines on tasks that it has never seen (hours of two cores; goes on where it was stopped)"
	@echo "make paper     the experiment of arXiv 2110.14459: times on every instruction set, curves, table and figure (45 minutes)"
	@echo "make paper-times, make paper-curves  its parts; curves go on where they were stopped"
	@echo "make ptxas     compile the CUDA kernels for every architecture; registers and spills (bench/results/ptxas.json)"
	@echo "make gpu-check on a machine with a GPU: build, tests, compute-sanitizer, benchmarks, by its own python3"
	@echo "make sanitize  run the kernels' tests under AddressSanitizer and UBSan"
	@echo "make wheel     build a source distribution and a wheel into dist/"
	@echo "make check-wheel  build them, install the wheel into an empty folder, import it"
	@echo "make clean     remove what was built, and the demo's runs; .venv, other runs, build/clusters, build/few_shot, build/optimizers and build/paper stay"

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "metakern needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "install Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing requirements into $(VENV) (a few minutes where they must be downloaded)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	@echo "building the extension"
	@$(BIN)/python -c "import setup; setup.Cuda.find()"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# The demo's MAML task: fit sinusoids, lines and parabolas from ten points, for about a minute.
FIT := --tasks regression-3 --iterations 1500
CLUSTERS := --clusters 12 --cluster-warmup 50 --cluster-begin 50 --cluster-eval-temperature 0.15

demo: $(VENV)/built
	$(BIN)/metakern train optimizer --episodes 60 --eval-every 10 --output runs/demo --overwrite
	$(BIN)/metakern eval optimizer runs/demo --networks 32 --speed
	$(BIN)/metakern train maml $(FIT) --output runs/fit/plain --overwrite
	$(BIN)/metakern train maml $(FIT) $(CLUSTERS) --output runs/fit/clusters --overwrite
	$(BIN)/metakern eval maml runs/fit/plain runs/fit/clusters --output runs/fit
	@echo "look at curves.png in runs/demo, and at learning.png, adaptation.png and fits.png in runs/fit/figures"

# Number of parallel processes, one thread each.
WORKERS ?= $(shell nproc)

test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# Warnings are errors: a link or an anchor that leads nowhere, a name of the reference that does not exist.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/built
	$(BIN)/python -m bench.lstm_step.compare
	$(BIN)/python -m bench.lstm_step.rules
	$(BIN)/python -m bench.hrnn_step.compare
	$(BIN)/python -m bench.mlp_inner_loop.compare
	$(BIN)/python -m bench.conv_inner_loop.compare
	$(BIN)/python -m bench.mlp_update_step.compare
	$(BIN)/python -m bench.task_conv2d.compare
	$(BIN)/python -m bench.task_norm_act_pool.compare
	$(BIN)/python -m bench.optimizee_groups
	$(BIN)/python -m bench.evolution
	$(BIN)/python -m pytest bench/*/bench_*.py --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name

bench-avx2:
	METAKERN_CPU_CAPABILITY=avx2 $(MAKE) bench

clusters: $(VENV)/built
	$(BIN)/python -m bench.clusters --workers $(WORKERS)

few-shot: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.few_shot --workers $(WORKERS)

optimizers: $(VENV)/built
	$(BIN)/python -m bench.optimizers

# The times of each instruction set take about 10 minutes, half of them torch.compile's; the curves 20 on two cores.
paper-times: $(VENV)/built
	if grep -q avx512f /proc/cpuinfo; then $(BIN)/python -m bench.paper.timing; fi
	METAKERN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m bench.paper.timing

paper-curves: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.paper.curves --workers $(WORKERS)

paper: paper-times paper-curves
	$(BIN)/python -m bench.paper.report

# The tables of docs/benchmarks.md and the README's, from bench/results.
bench-readme: $(VENV)/built
	$(BIN)/python -m bench.report

# Also builds the extension with CUDA for one architecture, to check that the operators compile and link.
ptxas: $(VENV)/installed
	$(BIN)/python -m bench.ptxas
	METAKERN_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/python setup.py -q build_ext --build-lib build/with-cuda

# Without a virtual environment: whatever torch and CUDA the machine has. SITE: a folder of further Python packages.
gpu-check:
	$(if $(SITE),PYTHONPATH="$(SITE)$${PYTHONPATH:+:$$PYTHONPATH}") $(PYTHON) -m bench.gpu_check $(ARGS)

sanitize: $(VENV)/built
	PYTHON=$(abspath $(BIN))/python bash tests/sanitizers/run.sh

wheel: $(VENV)/built
	$(BIN)/python -m build --no-isolation --outdir dist .

# Builds sdist and wheel, installs the wheel into an empty folder, imports it from elsewhere. Without the CUDA kernels,
# which `make ptxas` compiles.
check-wheel: $(VENV)/built
	rm -rf build/check-wheel
	METAKERN_CUDA=0 $(BIN)/python -m build --no-isolation --outdir build/check-wheel . > /dev/null
	$(BIN)/pip install --quiet --no-deps --target build/check-wheel/site build/check-wheel/*.whl
	cd build/check-wheel && PYTHONPATH=site $(abspath $(BIN))/python -P -c "import metakern; assert metakern.__file__.endswith('site/metakern/__init__.py'), metakern.__file__; assert metakern.build_info()['compiled']; metakern.rules.CoordinatewiseLSTM.pretrained('digits_lstm')"
	@echo "the wheel works"

clean:
	rm -rf $(filter-out build/clusters build/few_shot build/optimizers build/paper,$(wildcard build/*)) dist site runs/demo runs/fit *.egg-info metakern/*.so $(VENV)/built

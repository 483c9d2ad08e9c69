# make demo          the main job on drawn images, in about half a minute and without a download
# make test          the tests of every folder of the package, in minutes
# make test-robustness   kills, full disks, broken files and downloads, several processes, the examples, in minutes more
# make test-readme   types every command of the documents, in minutes
# make test-browser  drops photos onto an exported web page in Chromium, in minutes
# make lint          ruff and mypy
# make coverage      the tests again, and which lines of the library they run
# make torture       kills runs a hundred times and goes on with them, in a quarter of an hour
# make parity        against Keras, torchvision, timm and transformers themselves, in minutes
# make parity-all    the same with ResNet101, ResNet152 and more at 224 pixels, in minutes more
# make mutations     thousands of damaged weights files, in minutes
# make bench         against Keras, PyTorch and ONNX Runtime on this machine, in about a quarter of an hour
# make tpu-report    what the TPU compiler says of it, on a machine without a TPU, in minutes
# make demo-weights  the demo backbone again, in one to two hours
# The first of them makes a virtual environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Two tests at a time: most of one is spent in Python and in compiling, on one core.
TOGETHER = -n 2 --dist worksteal
# Tests that are slow or of rare faults.
ELSEWHERE = tests/robustness tests/e2e
# Tests that need nothing but Python, and have no target of their own.
HERE = not browser and not parity and not readme
# onnxruntime-web, of the version in the code, unless CIFAR_JAX_ORT_WEB names a copy.
ORT_WEB = onnxruntime-web@$(shell sed -n 's/^ORT_VERSION = "\(.*\)"$$/\1/p' cifar_jax/export/web.py)
CIFAR_JAX_ORT_WEB ?= $(INSTALLED_ORT_WEB)
INSTALLED_ORT_WEB = $(abspath $(VENV))/npm/$(ORT_WEB)/node_modules/onnxruntime-web/dist
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-robustness test-readme test-browser lint coverage torture parity parity-all mutations bench tpu-report demo-weights clean

demo: $(VENV)/.runtime
	$(BIN)/python train.py --preset demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "$(HERE) and not slow" $(TOGETHER) $(ELSEWHERE:%=--ignore=%)

test-robustness: $(VENV)/.dev
	$(BIN)/python -m pytest -m "$(HERE)" $(TOGETHER) $(ELSEWHERE)
	$(BIN)/python -m pytest -m "slow and $(HERE)" $(TOGETHER) $(ELSEWHERE:%=--ignore=%)

# The commands of a file build on each other, so files go to one process each.
test-readme: $(VENV)/.dev
	$(BIN)/python -m pytest -m readme -n 2 --dist loadfile --durations=0 --durations-min=1 tests/readme

# Needs Debian's packages chromium and chromium-driver, or the same from elsewhere. $CIFAR_JAX_PHOTOS names a folder of
# photos; without it they are drawn.
test-browser: $(VENV)/.browser $(CIFAR_JAX_ORT_WEB)
	CIFAR_JAX_ORT_WEB=$(CIFAR_JAX_ORT_WEB) $(BIN)/python -m pytest -m browser --durations=5 tests/browser

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -m "$(HERE)" $(TOGETHER) --cov=cifar_jax --cov-report=term-missing:skip-covered

torture: $(VENV)/.dev
	$(BIN)/python -m tests.robustness.torture --kills 100

parity: $(VENV)/.parity
	CIFAR_JAX_REQUIRE_PARITY=1 $(BIN)/python -m pytest -m "parity and not slow" -n 2 --dist loadfile tests/parity

parity-all: $(VENV)/.parity
	CIFAR_JAX_REQUIRE_PARITY=1 $(BIN)/python -m pytest -m parity -n 2 --dist loadfile tests/parity

mutations: $(VENV)/.dev
	CIFAR_JAX_MUTATIONS=10000 $(BIN)/python -m pytest tests/robustness/test_mutations.py

# Keeps its figures in benchmarks/results and puts their tables into docs/benchmarks.md. OPTIONS="--only backbone head" measures less.
bench: $(VENV)-bench/.bench
	$(VENV)-bench/bin/python -m benchmarks $(OPTIONS)

# In an environment of its own: where libtpu is installed and no TPU is, JAX complains whenever it starts.
tpu-report: $(VENV)-tpu/.tpu
	$(VENV)-tpu/bin/python -m benchmarks.tpu_report

# Needs cifar100_subset in TFDS_DATA_DIR; goes on where it was stopped.
demo-weights: $(VENV)/.runtime
	$(BIN)/python train.py --preset pretrain --out runs/pretrain --resume
	PYTHONPATH=. $(BIN)/python weights/export_demo.py runs/pretrain 2

$(VENV)/.runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/.browser: $(VENV)/.dev requirements-browser.txt
	$(PIP) -r requirements-browser.txt
	touch $@

$(INSTALLED_ORT_WEB):
	npm install --silent --prefix $(VENV)/npm/$(ORT_WEB) $(ORT_WEB)

$(VENV)-tpu/.tpu: BIN = $(VENV)-tpu/bin
$(VENV)-tpu/.tpu: requirements.txt requirements-tpu.txt
	$(PYTHON) -m venv $(VENV)-tpu
	$(PIP) -r requirements.txt -r requirements-tpu.txt
	touch $@

# tf_keras asks for the package `tensorflow`, whose place `tensorflow-cpu` takes here. torchvision asks for the one PyTorch
# that its operators were built for, of which no network needs any, and timm for torchvision. Hence --no-deps.
$(VENV)/.parity: $(VENV)/.dev requirements-parity.txt
	$(PIP) -r requirements-parity.txt
	$(PIP) --no-deps "tf_keras>=2.21,<2.22" "torchvision==0.29.2" "timm==1.0.31"
	touch $@

# What is compared with stays out of the environment that the project is developed in. For torchvision see above; where
# there is an NVIDIA GPU, JAX for it comes along.
$(VENV)-bench/.bench: BIN = $(VENV)-bench/bin
$(VENV)-bench/.bench: requirements.txt requirements-bench.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(PIP) -r requirements.txt -r requirements-bench.txt $(if $(wildcard /proc/driver/nvidia/version),"jax[cuda13]")
	$(PIP) --no-deps "torchvision==0.29.2"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-tpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

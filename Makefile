# Two commands: `make demo` and `make test`. Both make .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A link with the package's name, so that mypy sees the root as `conceptshift`.
LINK := $(VENV)/src/conceptshift

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/conceptshift demo --out checkpoints/demo

# Two processes with a core each are faster than one with two: most of the models are tiny.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-test $(LINK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p conceptshift

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is named by its exact version first: asked for more loosely, the index gives builds with gigabytes of CUDA.
$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
# Without what it requires for pictures (torchvision, timm, OpenCV): it is not used, and large.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps overcomplete einops
	touch $@

$(LINK): | $(VENV)/bin/python
	mkdir -p $(VENV)/src
	ln -sfn ../.. $@

clean:
	rm -rf $(VENV) build dist *.egg-info

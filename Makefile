# Every target makes the virtual environment and installs what it needs, and is quick the second time.
# One environment serves all of them; the sets of packages are nested, and `make sample` takes no torch.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
PINS   := pyproject.toml .ci/constraints.txt
OUT    ?= out/gpu
RUNS   := bench/results/runs
READMES := $(wildcard README.md */README.md engine/networks/README.md)
WORKERS ?= 2
DATA   := .data/usr/share/datasets/fashion-mnist

SAMPLE_EXTRAS := cpu
TEST_EXTRAS   := cpu,torch,export,diffusers,evaluate,sign,bench,test
DEV_EXTRAS    := $(TEST_EXTRAS),dev

.PHONY: help sample demo test check triton format oldest-torch types bench bench-cpu-limit bench-report bench-compare bench-baseline readme-tables evaluate families outside pipeline-latency data pictograms pictograms-data bundle pictograms-bundle fuzz gpu clean

help:
	@echo "make sample   draw clothes with the shipped model in 6 (fitted), 10, 20 and 50 steps (out/sample/grid.png)"
	@echo "make demo     draw them in your browser: a page at http://127.0.0.1:8017 (needs npm, for onnxruntime-web)"
	@echo "make test     run the test suite, without the slow tests"
	@echo "make check    formatting, lint, types and all tests, slow ones included: what CI runs"
	@echo "make triton   compile the kernels under the oldest supported Triton, and run the GPU gate dry under it"
	@echo "make oldest-torch  run the tests of what a GPU runs with the oldest supported torch (5 GB)"
	@echo "make format   format the sources"
	@echo "make bench    all CPU measurements; writes bench/results/ and the tables of all READMEs"
	@echo "make bench-report  make one HTML page with plots from the committed runs (bench/results/report)"
	@echo "make bench-compare   measure a few cases and fail if skipstep is slower than this machine class's baseline"
	@echo "make bench-baseline  measure them with more rounds and make that the baseline"
	@echo "make evaluate measure every sampler on the shipped model; writes bench/results/evaluation/"
	@echo "make families measure what each family of networks and each pipeline was tested with; writes findings and engine/networks/README.md"
	@echo "make outside  run Ray and Triton Inference Server on this machine, and measure both"
	@echo "make pipeline-latency  time text to picture at Stable Diffusion 1.5's size beside diffusers and OpenVINO"
	@echo "make data     fetch Fashion-MNIST (31 MB, a Debian package) into .data/"
	@echo "make pictograms  train the model that draws pictograms from their names, some hours (needs npm); goes on where it was"
	@echo "make bundle   compile the shipped checkpoint into the shipped bundle again"
	@echo "make pictograms-bundle  make a bundle from a trained folder, engine/demo/pictograms, and tune plans for it"
	@echo "make fuzz     attack every public argument, and the readers with a hundred thousand damaged files of each kind"
	@echo "make gpu      on a machine with a CUDA GPU: correctness, proofs and benchmarks, under ten minutes (\$$OUT, out/gpu)"
	@echo "make gpu-wheels  download what make gpu needs on a machine without a registry"
	@echo "make clean    remove the environment and everything built"

sample: $(VENV)/.sample
	$(BIN)/skipstep sample --steps 6 10 20 50 --num 10 --out out/sample

# The packages are those of the lock file; no script of theirs runs.
DEMO := build/demo
demo: $(VENV)/.demo $(DEMO)/node_modules
	$(BIN)/python -m skipstep.demo.browser --packages $(DEMO)/node_modules --out $(DEMO)/site

$(DEMO)/node_modules: engine/demo/web/package.json engine/demo/web/package-lock.json
	mkdir -p $(DEMO)
	cp engine/demo/web/package.json engine/demo/web/package-lock.json $(DEMO)
	cd $(DEMO) && npm ci --silent --ignore-scripts
	@touch $@

# One process a core with one thread each: more threads would wait for each other. Exports are shared (tests/engines.py).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(VENV)/.test
	$(PYTEST)

check: $(VENV)/.dev triton
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types
	SKIPSTEP_FUZZ=1500 $(PYTEST) -m ""

# The kernels, compiled as a launch does under the oldest Triton that pyproject.toml allows, and executed as PTX, without
# torch and a GPU; under the newest the suite does the same (tests/kernels/test_aot.py, tests/ptx).
# The gate for a GPU runs dry under it, too, next to everything else of the environment.
OLDEST_TRITON := build/oldest-triton
triton: $(VENV)/.dev
	test -x $(OLDEST_TRITON)/bin/python || $(PYTHON) -m venv $(OLDEST_TRITON)
	$(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check 'triton==3.6.*' numpy
	$(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	$(OLDEST_TRITON)/bin/python tests/kernels/compile_launches.py
	$(OLDEST_TRITON)/bin/python tests/ptx/run_ptx.py --architectures 75 90 100
	test -d $(OLDEST_TRITON)/alone || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(OLDEST_TRITON)/alone 'triton==3.6.*'
	PYTHONPATH=$(OLDEST_TRITON)/alone $(BIN)/python -m skipstep.bench.gpu --dry-run --out $(OLDEST_TRITON)/gate
	grep --quiet '"triton": "3.6.' $(OLDEST_TRITON)/gate/kernels.json
	$(OLDEST_TRITON)/bin/python tests/ptx/run_norms.py --architectures 75 90 100

# The oldest torch, with its Triton, before everything else of the environment, on what a GPU runs. Gigabytes, once.
OLDEST_TORCH := build/oldest-torch
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
oldest-torch: $(VENV)/.test
	test -x $(OLDEST_TORCH)/bin/python || $(PYTHON) -m venv $(OLDEST_TORCH)
	$(OLDEST_TORCH)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.11.*'
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$($(OLDEST_TORCH)/bin/python $(SITE))/others.pth
	OMP_NUM_THREADS=1 $(OLDEST_TORCH)/bin/python -m pytest tests/backends tests/loops tests/cuda tests/kernels/test_*.py \
		tests/export/test_onnx_model.py tests/export/test_partition.py tests/bench/test_host_work.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Four folders become one import root, which type checkers do not follow; a plain install shows it to them.
types: $(VENV)/.dev
	rm -rf build/types build/stubs build/lib build/bdist.*
	$(BIN)/python .ci/tensorrt_stubs.py build/stubs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/types .
	cp -r bench/quality build/types/skipstep/bench/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p skipstep

# To measure one part, run its line alone. After an interruption, what was measured at this commit is kept.
CONTENDERS := textbook,skipstep,skipstep-openvino,skipstep-torch,diffusers,diffusers-compile,onnxruntime,network,openvino
BENCH := bench --resume --contenders $(CONTENDERS)
bench: $(VENV)/.dev
	$(BIN)/skipstep $(BENCH) --model fashion-mnist --plans 10,20,50 --batch 1,4,16 --budget 20 --rounds 9 \
		--measure throughput,process --out out/bench/fashion-mnist-cpu.json
	$(BIN)/skipstep $(BENCH) --model cifar10-architecture --plans 10 --batch 1 --budget 15 --rounds 7 --measure process \
		--out out/bench/cifar10-cpu.json
	cp out/bench/fashion-mnist-cpu.json out/bench/cifar10-cpu.json $(RUNS)
	$(MAKE) readme-tables
	$(MAKE) bench-report

# The CPU's peers, whole calls and cold start, the longest calls in a run of their own; and what bfloat16 costs.
CPU_PEERS := --contenders textbook,diffusers,skipstep,skipstep-openvino,skipstep-openvino-bfloat16,onnxruntime,openvino,$\
	openvino-bfloat16,aot-inductor,torch-bfloat16
CPU_LIMIT := bench $(CPU_PEERS) --plans 10 --rounds 7 --compile-budget 900 --resume
bench-cpu-limit: $(VENV)/.dev
	$(BIN)/skipstep $(CPU_LIMIT) --model fashion-mnist --batch 1,4,16 --model cifar10-architecture@1,4 --budget 30 \
		--measure process --out out/bench/cpu-limit.json
	$(BIN)/skipstep $(CPU_LIMIT) --model cifar10-architecture --batch 16 --budget 60 --out out/bench/cpu-limit-16.json
	$(BIN)/python -m skipstep.bench.finding out/bench/cpu-limit.json out/bench/cpu-limit-16.json \
		--command "make bench-cpu-limit" --out bench/results/findings/cpu-limit.json
	$(BIN)/python -m skipstep.bench.quality.cpu_precisions --steps 4 6 8 10 20 50 --num 64 \
		--out bench/results/findings/cpu-precisions.json

# A page and its plots, from what is committed.
bench-report: $(VENV)/.dev
	$(BIN)/skipstep report $(RUNS)/*.json --evaluation bench/results/evaluation --out bench/results/report

# A baseline is measured once and compared with often: it has three times the rounds.
GATE_CASES := --model fashion-mnist --plans 10,20 --batch 1,4 --contenders textbook,skipstep,skipstep-torch
bench-compare: $(VENV)/.dev
	$(BIN)/skipstep bench $(GATE_CASES) --budget 10 --rounds 15 --out out/bench/now.json
	$(BIN)/skipstep compare bench/results/baselines out/bench/now.json --measure-again --out out/bench/comparison.json

bench-baseline: $(VENV)/.dev
	$(BIN)/skipstep bench $(GATE_CASES) --budget 30 --rounds 45 --out out/bench/baseline.json
	$(BIN)/skipstep compare bench/results/baselines out/bench/baseline.json --accept

readme-tables: $(VENV)/.dev
	$(BIN)/python -m skipstep.bench.report bench/results $(READMES)

# With fitted plans of more step counts than the bundle carries; and fitted plans alone on a second network, without
# classes (bench/quality/train_unet.py has its recipe).
evaluate: $(VENV)/.dev $(DATA)
	test -d out/evaluated.bundle || { mkdir -p out && cp -r engine/demo/fashion-mnist.bundle out/tuned.bundle && \
		$(BIN)/skipstep tune out/tuned.bundle --steps 5 10 --guidance 2 --rounds 4 && mv out/tuned.bundle out/evaluated.bundle; }
	$(BIN)/skipstep evaluate --model out/evaluated.bundle --out bench/results/evaluation --data $(DATA)
	test -d out/unconditional.bundle || { $(BIN)/skipstep export --model bench/quality/unconditional --steps 10 \
		--license Apache-2.0 --out out/untuned.bundle --overwrite && $(BIN)/skipstep tune out/untuned.bundle --steps 4 5 6 8 10 \
		--nodes 112 --rounds 4 && mv out/untuned.bundle out/unconditional.bundle; }
	$(BIN)/skipstep evaluate --model out/unconditional.bundle --nodes 112 --tables fitted-plans --data $(DATA) \
		--out bench/results/evaluation-unconditional

bundle: $(VENV)/.dev
	$(BIN)/skipstep export --model engine/demo/fashion-mnist --out engine/demo/fashion-mnist.bundle --overwrite \
		--license "Apache-2.0; trained on Fashion-MNIST (MIT)" --steps 10 20 50
	$(BIN)/skipstep tune engine/demo/fashion-mnist.bundle --steps 4 6 8 --guidance 2 --rounds 4

# Of the folder that `make pictograms` wrote. Plans are fitted to a third of the names that it was evaluated with, and
# compared on another third.
NAMES := import json; n = json.load(open("bench/results/findings/pictograms.json"))["names"]; \
	print(*n[::3], *n[1::3], sep="\n")
pictograms-bundle: $(VENV)/.dev
	$(BIN)/skipstep export --model engine/demo/pictograms --out engine/demo/pictograms.bundle --overwrite \
		--license "Apache-2.0; trained on Noto Emoji (Google, Apache-2.0)" --notice engine/demo/pictograms-notice.txt \
		--steps 10 20 50
	$(BIN)/python -c '$(NAMES)' | xargs --delimiter='\n' \
		$(BIN)/skipstep tune engine/demo/pictograms.bundle --steps 4 6 8 --guidance 3 --rounds 4 --prompt
	$(BIN)/skipstep sample --steps 6 20 --out out/pictograms/sample --prompt "red apple" "blue heart" "crescent moon" \
		"cat face" hamburger sunflower rocket snowman "blue apple" "red cat face"
	cp out/pictograms/sample/grid.png bench/results/pictograms.png

# The attacks, a hundred thousand cases of each kind of file, and how many there were, if none succeeded.
ATTACKS := tests/test_public_arguments.py tests/test_further_arguments.py tests/test_kills.py \
	tests/networks/test_hostile_checkpoint.py \
	$(addprefix tests/bundles/,test_manifest.py test_harmed_bundle.py test_hostile_bundle.py)
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 SKIPSTEP_FUZZ=100000 SKIPSTEP_ATTACKS=bench/results/findings/attacks.json \
		$(BIN)/python -m pytest $(ATTACKS) -m "" -k "any_ or arguments or kill or hostile_checkpoint" --timeout 7200

# Ray and Triton Inference Server, each in an environment of its own: both are large, and the server wants numpy 1.
# The tests that need them run with the slow ones from then on.
outside: $(VENV)/.test
	for name in ray triton-server; do test -x build/$$name/bin/python || $(PYTHON) -m venv build/$$name; done
	build/ray/bin/python -m pip install --quiet --disable-pip-version-check 'ray[data,serve]==2.60.*' -e '.[cpu]'
	build/triton-server/bin/python -m pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 onnx \
		-e '.[cpu]'
	$(BIN)/python -m pytest tests/serving/test_ray.py tests/serving/test_triton_model.py -m ""
	build/ray/bin/python tests/serving/ray_run.py --out bench/results/findings/ray.json
	build/triton-server/bin/python tests/serving/triton_run.py --out bench/results/findings/triton-server.json

# Text to picture beside diffusers and openvino_genai, which is in an environment that sees this one. 20 GB of memory.
GENAI := build/genai
PIPELINE_LATENCY := --side 256 --rounds 3 --guidance 1 --out bench/results/findings/pipeline-latency.json
pipeline-latency: $(VENV)/.test
	test -x $(GENAI)/bin/python || $(PYTHON) -m venv $(GENAI)
	$(GENAI)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'openvino-genai==2026.4.*' \
		'openvino-tokenizers==2026.4.*'
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$($(GENAI)/bin/python $(SITE))/others.pth
	$(GENAI)/bin/python -m skipstep.bench.pipeline_latency $(PIPELINE_LATENCY)

# What each family of networks can do, and how far it is from its own loop.
families: $(VENV)/.dev
	OMP_NUM_THREADS=1 SKIPSTEP_FAMILIES=bench/results/findings/families.json \
		$(BIN)/python -m pytest tests/networks/test_matrix.py -m ""
	OMP_NUM_THREADS=1 SKIPSTEP_PIPELINES=bench/results/findings/pipelines.json \
		$(BIN)/python -m pytest tests/pipelines -m ""
	$(MAKE) readme-tables

# Debian's package of Fashion-MNIST, unpacked here: no root is needed, and nothing is installed.
data: $(DATA)
$(DATA):
	mkdir -p .data
	cd .data && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .

# Noto Emoji as npm carries it, drawn at 32x32 (20 s), and a model of it. Nothing but the model is ever committed.
PICTOGRAMS := build/pictograms
pictograms-data: $(PICTOGRAMS)/pictograms.npz
$(PICTOGRAMS)/pictograms.npz: | $(VENV)/.test
	mkdir -p $(PICTOGRAMS)
	npm install --silent --ignore-scripts --no-save --prefix $(PICTOGRAMS) @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PICTOGRAMS)/python resvg-py==0.5.0
	PYTHONPATH=$(PICTOGRAMS)/python $(BIN)/python -m skipstep.bench.quality.pictograms \
		--packages $(PICTOGRAMS)/node_modules --out $@

pictograms: $(VENV)/.dev $(PICTOGRAMS)/pictograms.npz
	$(BIN)/python -m skipstep.bench.quality.train_pictograms --keep-every 2500 --out out/pictograms
	$(BIN)/python -m skipstep.bench.quality.evaluate_pictograms out/pictograms/model-* out/pictograms/model \
		--out bench/results/findings/pictograms.json

# On the GPU machine torch and triton are there already, and there may be no registry: nothing is downloaded. What else
# is needed comes from .gpu-wheels, if `make gpu-wheels` was run where there is a registry, and travels with the sources.
gpu:
	rm -rf build/gpu build/gpu-deps build/lib build/bdist.*
	$(PYTHON) bench/gpu/wheels.py .gpu-wheels build/gpu-deps
	$(PYTHON) -m pip install --quiet --no-deps --no-index --no-build-isolation --target build/gpu .
	PYTHONPATH=build/gpu:build/gpu-deps $(PYTHON) -m skipstep.bench.gpu --out $(OUT)

# pip matches these names exactly, so there is one for every C library that wheels are built for. The commit goes along,
# for a machine that gets the sources without git.
GPU_PLATFORMS := $(foreach glibc,1 2010 2014 _2_17 _2_24 _2_27 _2_28 _2_31 _2_34,--platform manylinux$(glibc)_x86_64)
.PHONY: gpu-wheels
gpu-wheels: $(VENV)/bin/python
	rm -rf .gpu-wheels && mkdir .gpu-wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: $(GPU_PLATFORMS) \
		--python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
		--dest .gpu-wheels --requirement .ci/gpu-wheels.txt
	git rev-parse --short HEAD > .gpu-wheels/COMMIT

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.sample: $(PINS) | $(VENV)/bin/python
	@echo "installing skipstep[$(SAMPLE_EXTRAS)] into $(VENV)"
	$(INSTALL) --editable '.[$(SAMPLE_EXTRAS)]'
	@touch $@

$(VENV)/.demo: $(PINS) | $(VENV)/bin/python
	@echo "installing skipstep[$(SAMPLE_EXTRAS)] and onnx's tools into $(VENV)"
	$(INSTALL) --editable '.[$(SAMPLE_EXTRAS)]' onnx onnxscript
	@touch $@ $(VENV)/.sample

$(VENV)/.test: $(PINS) | $(VENV)/bin/python
	@echo "installing skipstep[$(TEST_EXTRAS)] into $(VENV)"
	$(INSTALL) --editable '.[$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.sample $(VENV)/.demo

$(VENV)/.dev: $(PINS) | $(VENV)/bin/python
	@echo "installing skipstep[$(DEV_EXTRAS)] into $(VENV)"
	$(INSTALL) --editable '.[$(DEV_EXTRAS)]'
	@touch $@ $(VENV)/.test $(VENV)/.sample $(VENV)/.demo

clean:
	rm -rf $(VENV) .data build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= python3
APT := apt-get

.PHONY: train test test-all gpu install libraries dmcgb drawerworld

train: install
	.venv/bin/python algos/mdpo.py --env-id bigfish $(ARGS)

# Tests run in parallel, one thread per worker. What takes long has the mark `slow` and is only in `test-all`.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(shell getconf _NPROCESSORS_ONLN) --dist worksteal

test: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install
	@$(METAWORLD) || echo "warning: no Meta-World, so the tests of benchmark/suites/drawerworld.py are skipped" >&2
	@$(SLURM) || echo "warning: no Slurm, so the tests of launch.py on one are skipped" >&2
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTEST) $(ARGS)

# What a GPU shows: its tests, speed and memory. benchmark/gpu.py
gpu: install
	.venv/bin/python benchmark/gpu.py $(ARGS)

install: libraries .venv/installed

# What benchmark/suites/drawerworld.py needs besides.
METAWORLD = .venv/bin/python -m pip install --disable-pip-version-check --no-deps -r benchmark/suites/requirements-drawerworld.txt

# A Slurm for the tests, on Debian as root; nothing of it is started but by them.
SLURM = { command -v slurmctld && command -v munged; } >/dev/null || \
	{ $(APT) update && DEBIAN_FRONTEND=noninteractive $(APT) install -y --no-install-recommends slurm-wlm munge; }

drawerworld: install
	$(METAWORLD)

# DMC-GB's colours and clips (80 MB), which are not ours to give: into data/dmcgb, where drqv2_pieg.py looks for them.
DMCGB := https://github.com/nicklashansen/dmcontrol-generalization-benchmark

dmcgb:
	@test ! -e data/dmcgb || { echo "error: data/dmcgb is there already" >&2; exit 1; }
	rm -rf data/dmcgb.git data/dmcgb.part && mkdir -p data
	git clone --depth 1 --filter=blob:none --sparse $(DMCGB) data/dmcgb.git
	git -C data/dmcgb.git sparse-checkout set src/env/data
	cp -r data/dmcgb.git/src/env/data data/dmcgb.part && cp data/dmcgb.git/LICENSE data/dmcgb.part
	rm -rf data/dmcgb.git && mv data/dmcgb.part data/dmcgb

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "error: Python 3.11 or 3.12 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

# The Debian packages of what is missing: `python3 -m venv`, two libraries that Procgen's Qt draws with (on aarch64 that
# Qt itself), and what DeepMind Control renders with (EGL, and Mesa where there is no GPU's driver; or OSMesa, which is
# left as it is). macOS has what it needs, but for what a script asks for when it starts.
needs = $(shell $(PYTHON) -c '$(1)' 2>/dev/null || echo $(2))
ifeq ($(shell uname -s),Linux)
MISSING = $(strip $(call needs,import venv; import ensurepip,python3-venv) \
	$(call needs,import ctypes; ctypes.CDLL("libGL.so.1"),libgl1) \
	$(call needs,import ctypes; ctypes.CDLL("libgthread-2.0.so.0"),libglib2.0-0) \
	$(if $(filter aarch64,$(shell uname -m)),$(call needs,import ctypes; ctypes.CDLL("libQt5Gui.so.5"),libqt5gui5)) \
	$(call needs,import ctypes; ctypes.CDLL("libEGL.so.1"),libegl1) \
	$(call needs,import glob; glob.glob("/usr/lib/*/dri/*") or glob.glob("/usr/lib/*/libEGL_nvidia*") or 1 / 0,libgl1-mesa-dri))
endif

libraries:
	@missing="$(MISSING)"; test -z "$$missing" || \
	if test "$$(id -u)" = 0 && command -v $(APT) >/dev/null; then \
		$(APT) update && DEBIAN_FRONTEND=noninteractive $(APT) install -y --no-install-recommends $$missing; \
	else \
		echo "error: missing system packages; on Debian or Ubuntu: sudo $(APT) install $$missing" >&2; exit 1; \
	fi

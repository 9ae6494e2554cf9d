# make serve | train | test | test-fast | test-ray | check | bench | soak | docs | docker-check | clean. Each target
# installs the Python packages that it needs in .venv (test-ray: .venv-ray). `make serve PYTHON=python3.12` uses another
# interpreter. make test-tools | browser | promtool | compiler install programs that tests need, as root on Debian.
PYTHON ?= python3
BUNDLE ?= bundles/default
PORT ?= 8000
CONFIG ?= configs/quickstart.toml
MINUTES ?= 60

RUN = .venv/bin/python

APT = apt-get -qq -o DPkg::Lock::Timeout=300

.PHONY: serve train test test-fast test-ray check check-native bench soak docs docker-check clean
.PHONY: test-tools apt-lists browser promtool compiler

serve: .venv
	@$(RUN) -m server --bundle $(BUNDLE) --port $(PORT)

train: .venv
	@$(RUN) -m training.run $(CONFIG)

test: .venv check
	$(RUN) -m pytest -q -m "not ray"

test-fast: .venv
	$(RUN) -m pytest -q -m "not slow"

# Ray listens on every interface, so the tests get a network that has the loopback interface alone.
test-ray: .venv-ray
	unshare -rn sh -c 'ip link set lo up && exec .venv-ray/bin/python -m pytest -q tests/server/operation/test_ray_serve.py'

check: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Runs the native step under the address, undefined-behaviour and thread sanitizers; takes some minutes.
check-native: .venv
	PYTHONPATH=. $(RUN) tests/support/native_check.py

bench: .venv
	$(RUN) -m benchmarks.training
	$(RUN) -m benchmarks.load --bundle $(BUNDLE)
	$(RUN) -m benchmarks.stall --bundle $(BUNDLE)

soak: .venv
	@$(RUN) -m benchmarks.soak --bundle $(BUNDLE) --minutes $(MINUTES)

# This needs docker, podman or buildah, but no .venv.
docker-check:
	deploy/docker-check.sh

docs: .venv
	@$(RUN) -m server.reference

clean:
	rm -rf .venv .venv-ray .cache build *.egg-info

# Installs every program outside .venv that a test needs. Without a program its tests are skipped; in CI they fail.
test-tools: browser promtool compiler
	@command -v curl > /dev/null && command -v ip > /dev/null || $(APT) install -y --no-install-recommends curl iproute2

apt-lists:
	@$(APT) update

# Chromium, for the tests of the page at /.
browser: apt-lists
	$(APT) install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core

# promtool, for the tests of the alerts and the dashboard; without its package, which would start Prometheus too.
promtool: apt-lists
	folder=$$(mktemp -d) && chown _apt $$folder && cd $$folder && $(APT) download prometheus \
	    && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 -C /usr/local/bin ./usr/bin/promtool \
	    && rm -r $$folder

# A C++ compiler, for torch.compile on a CPU and for exports in the format pt2.
compiler: apt-lists
	@command -v g++ > /dev/null || $(APT) install -y --no-install-recommends g++

# pip installs torch first and alone: it then takes a CPU build if it finds one, and later packages keep that version.
.venv: EXTRAS = test
.venv-ray: EXTRAS = server,ray,pytest
.venv .venv-ray: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -m venv $@ || { echo "venv is missing: apt-get install python3-venv"; rm -rf $@; exit 1; }
	@echo "setting up $@ (once, a few minutes)"
	@$@/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" || { rm -rf $@; exit 1; }
	@$@/bin/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" || { rm -rf $@; exit 1; }
	@$@/bin/python -m model.frozen.native.build || true
	@touch $@

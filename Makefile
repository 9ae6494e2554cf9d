# make serve | train | test | test-fast | check | bench | soak | docs | browser | docker-check | test-ray. Each sets up all it needs in .venv;
# `PYTHON=python3.12 make serve` picks another interpreter.
PYTHON ?= python3
BUNDLE ?= bundles/default
PORT ?= 8000
CONFIG ?= configs/quickstart.toml
MINUTES ?= 60

RUN = .venv/bin/python

.PHONY: serve train test test-fast check check-native bench soak docs browser docker-check test-ray clean

serve: .venv
	@$(RUN) -m server --bundle $(BUNDLE) --port $(PORT)

train: .venv
	@$(RUN) -m training.run $(CONFIG)

test: .venv check
	.venv/bin/python -m pytest -q

test-fast: .venv
	.venv/bin/python -m pytest -q -m "not slow"

# With the extra `ray`; in a network of its own, since Ray opens ports on every interface.
test-ray: .venv
	unshare -rn sh -c 'ip link set lo up && exec $(RUN) -m pytest -q tests/test_ray_serve.py'

check: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The native step under the address, undefined-behaviour and thread sanitizers; some minutes.
check-native: .venv
	PYTHONPATH=. $(RUN) tests/model/native_check.py

bench: .venv
	$(RUN) -m benchmarks.training
	$(RUN) -m benchmarks.load --bundle $(BUNDLE)
	$(RUN) -m benchmarks.stall --bundle $(BUNDLE)

soak: .venv
	@$(RUN) -m benchmarks.soak --bundle $(BUNDLE) --minutes $(MINUTES)

# needs docker, podman or buildah, and no .venv
docker-check:
	deploy/docker-check.sh

# What the tests of the page at / need; without it they are skipped. As root, on Debian.
browser:
	apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium-headless-shell fonts-dejavu-core

docs: .venv
	@$(RUN) -m server.reference

clean:
	rm -rf .venv .cache build *.egg-info

# torch comes first and alone: pip then takes a CPU build where one is at hand, and nothing after it changes the version.
.venv: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "venv is missing: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	@echo "setting up .venv (once, a few minutes)"
	@.venv/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" || { rm -rf .venv; exit 1; }
	@.venv/bin/pip install --quiet --disable-pip-version-check --editable ".[test]" || { rm -rf .venv; exit 1; }
	@touch .venv

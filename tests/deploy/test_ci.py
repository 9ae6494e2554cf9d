"""Tests of CI: it runs every test through commands of the Makefile, and skips none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_passes(): ...

@pytest.mark.xfail
def test_is_known_to_fail(): assert False

@pytest.mark.skipif(True, reason="no browser")
def test_needs_a_browser(): ...

def test_skips_itself():
    pytest.skip("no network")
"""
A_FILE_THAT_SKIPS_ITSELF = """
import pytest

pytest.importorskip("no_such_package", reason="it is an extra")
"""
FOR_A_GPU = """
import pytest

@pytest.mark.gpu
def test_uses_the_gpu():
    import torch

    assert torch.ones(1, device="cuda").item() == 1

def test_uses_none(): ...
"""


def run_pytest(folder: Path, *, ci: str) -> str:
    """Return the output of pytest on a folder of tests, with this project's conftest."""
    shutil.copy(ROOT / "tests/conftest.py", folder)
    command = [sys.executable, "-m", "pytest", "-q", "-rsfE", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder)]
    environment = {**os.environ, "CI": ci}
    return subprocess.run(
        [*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_a_skip_is_a_failure_in_ci_that_names_the_test_and_the_reason(tmp_path):
    (tmp_path / "test_skips.py").write_text(TESTS)
    said = run_pytest(tmp_path, ci="true")
    assert re.search("test_skips.py::test_needs_a_browser is skipped, but CI must run every test. .*no browser", said)
    assert re.search("test_skips.py::test_skips_itself is skipped, but CI must run every test. .*no network", said)
    assert re.search(r"^1 failed, 1 passed, 1 xfailed, 1 error in", said, flags=re.MULTILINE)


def test_a_file_that_skips_itself_is_a_failure_in_ci(tmp_path):
    (tmp_path / "test_optional.py").write_text(A_FILE_THAT_SKIPS_ITSELF)
    said = run_pytest(tmp_path, ci="true")
    assert re.search("test_optional.py is skipped, but CI must run every test. .*it is an extra", said)
    assert "1 error in" in said


def test_a_developer_may_skip(tmp_path):
    (tmp_path / "test_skips.py").write_text(TESTS)
    (tmp_path / "test_optional.py").write_text(A_FILE_THAT_SKIPS_ITSELF)
    said = run_pytest(tmp_path, ci="")
    assert re.search(r"^1 passed, 3 skipped, 1 xfailed in", said, flags=re.MULTILINE)


def test_tests_for_a_gpu_are_left_out_where_there_is_none_and_that_is_no_skip(tmp_path):
    import torch

    (tmp_path / "test_gpu.py").write_text(FOR_A_GPU)
    found = "2 passed" if torch.cuda.is_available() else "1 passed, 1 deselected"
    assert f"{found} in" in run_pytest(tmp_path, ci="true")


def test_ci_runs_what_people_run():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    targets = [line.split()[1] for line in lines if line.lstrip().startswith("make ")]
    assert targets == ["test-tools", "test", "check-native", "test-ray"]
    plan = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts = [
        "chromium-headless-shell",
        "promtool",
        "g++",
        "ruff check .",
        "mypy",
        "native_check.py",
        '-m "not ray"',
        "test_ray_serve.py",
    ]
    assert [part for part in parts if part not in plan] == []

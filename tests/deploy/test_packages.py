"""Tests that the image and the wheel contain all the files that they need."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy.test_image import sent_to_the_builder

ROOT = Path(__file__).parents[2]
PACKAGES = ("allattn", "export", "model", "server", "training")
IMPORT_ALL = """
import importlib, pathlib
for file in sorted(pathlib.Path().rglob("*.py")):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    if not name.endswith("__main__") and name != "server.ray_serve":  # Ray is in a venv of its own
        assert pathlib.Path(importlib.import_module(name).__file__) == file.resolve(), name
"""


def tracked_files() -> list[str]:
    """Return the paths of the repository's files, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the builder of the image gets."""
    folder = tmp_path_factory.mktemp("app").resolve()
    for path in filter(sent_to_the_builder, tracked_files()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def run_in_the_image(folder: Path, *arguments: str, status: int = 0) -> str:
    """Return the output of python with that folder and the installed packages on its path, but not this repository.

    -S: otherwise the .pth file of the editable installation would add the repository to the path.
    """
    places = [str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-S", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("server", "--help"),
        ("allattn", "--help"),
        ("allattn", "serve", "--help"),
        ("allattn", "generate", "--help"),
        ("allattn", "export", "--help"),
    ],
)
def test_a_command_of_the_image_has_all_that_it_needs(words, image_folder):
    said = run_in_the_image(image_folder, "-m", *words)
    assert " ".join(("usage:", *words[:-1], "")) in said.replace("python -m ", "")


@pytest.mark.slow
def test_the_image_generates_and_its_probe_runs(image_folder):
    generate = ["-m", "allattn", "generate", "It was", "--device", "cpu", "--max-new-tokens", "5"]
    assert run_in_the_image(image_folder, *generate).strip()
    run_in_the_image(image_folder, "-m", "deploy.probe", status=1)  # the probe finds no server


@pytest.mark.slow
def test_every_module_of_the_image_can_be_imported_there(image_folder):
    run_in_the_image(image_folder, "-W", "ignore", "-c", IMPORT_ALL)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_every_package(tmp_path):
    source = tmp_path / "source"
    shipped = [path for path in tracked_files() if path.startswith(tuple(f"{name}/" for name in PACKAGES))]
    for path in ["pyproject.toml", "README.md", "LICENSE", *shipped]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"allattn-{version}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == set(shipped)

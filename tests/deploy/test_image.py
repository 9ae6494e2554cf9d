"""Tests of Dockerfile, .dockerignore and compose files: settings, files, ports and times exist. They build no image."""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings, load_settings
from server.config.sources import ENV_PREFIX
from tests.support.http_harness import make_link, serving

ROOT = Path(__file__).parents[2]
LAST_S = 4  # seconds for the server's last writes and the end of its engine, after shutdown_timeout_s
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, each as a word and the rest of its line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def the(word: str) -> str:
    """Return the text of the last instruction with this word, which is the instruction in force."""
    return [rest for name, rest in instructions() if name == word][-1]


def image_environment() -> dict[str, str]:
    last_stage = max(number for number, (word, _) in enumerate(instructions()) if word == "FROM")
    said = [rest for word, rest in instructions()[last_stage:] if word == "ENV"]
    return dict(item.partition("=")[::2] for rest in said for item in shlex.split(rest))


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def sent_to_the_builder(path: str) -> bool:
    """Return whether the builder gets a file: the last line of .dockerignore that matches it or a parent decides."""
    parts = path.split("/")
    above = ["/".join(parts[: number + 1]) for number in range(len(parts))]
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            anywhere = pattern.startswith("**/") and pattern.removeprefix("**/") in parts
            if anywhere or any(fnmatch(folder, pattern) for folder in above):
                sent = line.startswith("!")
    return sent


def default_of(text: str) -> str:
    """Return the text of a compose file with the default of each ${NAME:-default}."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s", text)[1])


def test_hadolint_finds_nothing_wrong():
    assert HADOLINT, "it comes with the extra `test`"
    done = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_the_base_is_python_slim_unless_told_otherwise():
    assert ("ARG", "PYTHON_IMAGE=python:3.11-slim-bookworm") in instructions()
    assert {rest.split()[0] for word, rest in instructions() if word == "FROM"} == {"${PYTHON_IMAGE}"}


def test_the_image_is_not_root_and_python_hears_its_signals():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", the("USER"))  # a number, since Kubernetes cannot look names up
    assert json.loads(the("ENTRYPOINT")) == ["python", "-m", "server"]
    assert "CMD" not in [word for word, _ in instructions()]
    assert "STOPSIGNAL" not in [word for word, _ in instructions()]


def test_the_image_listens_everywhere_on_the_port_that_it_exposes():
    settings = load_settings([], environ=image_environment())
    assert settings.host == "0.0.0.0"
    assert settings.port == int(the("EXPOSE")) == Settings().port
    assert sent_to_the_builder(f"{settings.bundle}/model.safetensors")


def test_the_image_says_what_it_is():
    labels = dict(item.partition("=")[::2] for item in shlex.split(the("LABEL")))
    kinds = {name.removeprefix("org.opencontainers.image.") for name in labels}
    assert kinds >= {"title", "description", "licenses", "version", "revision"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ("ARG", f"VERSION={project['version']}") in instructions()
    assert labels["org.opencontainers.image.licenses"] == project["license"]


def test_the_image_installs_an_extra_that_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert ("ARG", "EXTRAS=server") in instructions()
    assert "server" in extras


@pytest.mark.parametrize(
    ("path", "is_sent"),
    [
        ("pyproject.toml", True),
        ("LICENSE", True),
        ("allattn/generate.py", True),
        ("model/attention.py", True),
        ("server/__main__.py", True),
        ("export/run.py", True),
        ("deploy/probe.py", True),
        ("bundles/default/tokenizer.json", True),
        ("bundles/mine/model.safetensors", False),
        ("bundles/default.run/metrics.jsonl", False),
        ("server/__pycache__/app.pyc", False),
        ("training/run.py", False),
        ("tests/oracle.py", False),
        ("benchmarks/load.py", False),
        ("deploy/smoke.py", False),
        (".git/config", False),
        (".venv/bin/python", False),
        (".env", False),
    ],
)
def test_the_builder_gets_what_the_image_holds_and_nothing_else(path, is_sent):
    assert sent_to_the_builder(path) == is_sent


def test_no_file_names_the_host_of_a_registry():
    for path in [ROOT / "Dockerfile", ROOT / "compose.yaml", *(ROOT / "deploy").rglob("*.*")]:
        assert not re.search(r"index-url|https?://(?!prometheus:)|\.(io|com|org)/[\w./-]+:\d", path.read_text()), path


def probe(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    command = [sys.executable, *json.loads(the("HEALTHCHECK").partition("CMD ")[2])[1:]]
    return subprocess.run(
        command, cwd=ROOT, env=kept | environ, capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.parametrize("keys", [{}, {"ALLATTN_API_KEYS": "a-key-of-the-right-length,another-one-of-them"}])
def test_the_health_check_tells_a_server_that_takes_work_from_others(keys):
    async def check() -> list[tuple[int, str]]:
        link = make_link()
        settings = load_settings([], environ=keys)
        async with serving(link, api_keys=settings.api_keys) as port:
            environ = {"ALLATTN_HOST": "0.0.0.0", "ALLATTN_PORT": str(port), **keys}
            said = []
            for state in ("ready", "restarting", "draining"):
                link.state = state
                said.append(await asyncio.to_thread(probe, environ))
            if keys:
                link.state = "ready"
                said.append(await asyncio.to_thread(probe, environ | {"ALLATTN_API_KEYS": "not-one-of-the-keys"}))
        return [(done.returncode, done.stderr) for done in said]

    (ready, silence), *others = asyncio.run(check())
    assert (ready, silence) == (0, "")
    assert [status for status, _ in others] == [1] * len(others)
    assert [text.partition(":")[0] for _, text in others] == ["503", "503", "401"][: len(others)]


def test_the_health_check_of_nobody_fails():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = probe({"ALLATTN_PORT": str(port)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"127.0.0.1:{port}: ")


def test_docker_check_probes_as_the_image_does():
    script = (ROOT / "deploy/docker-check.sh").read_text()
    found = re.search(r"^PROBE=\((.*?)\)", script, flags=re.MULTILINE)
    assert found
    assert found[1].split() == json.loads(the("HEALTHCHECK").partition("CMD ")[2])
    plan = subprocess.run(["make", "-n", "docker-check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "deploy/docker-check.sh" in plan
    assert subprocess.run(["bash", "-n", "deploy/docker-check.sh"], cwd=ROOT, check=False).returncode == 0


def test_compose_runs_the_server_as_the_image_wants_it():
    server = compose()["services"]["allattn"]
    settings = load_settings(
        [], environ=image_environment() | {name: default_of(text) for name, text in server["environment"].items()}
    )
    (port,) = server["ports"]
    assert port == f"127.0.0.1:{Settings().port}:{settings.port}"
    (volume,) = server["volumes"]
    ours, theirs, mode = volume.split(":")
    assert Path(the("WORKDIR"), settings.bundle).is_relative_to(theirs)
    assert (ROOT / ours / Path(the("WORKDIR"), settings.bundle).relative_to(theirs)).is_dir()
    assert mode == "ro"
    assert server["read_only"] is True
    assert server["tmpfs"] == image_environment()["HOME"] == "/tmp"
    assert seconds(server["stop_grace_period"]) >= settings.shutdown_timeout_s + LAST_S
    assert f"--stop-timeout {seconds(server['stop_grace_period'])}" in (ROOT / "Dockerfile").read_text()


def test_compose_mounts_files_that_exist_and_pins_what_it_pulls():
    parts = compose()
    for name, service in parts["services"].items():
        for volume in service["volumes"]:
            ours = volume.split(":")[0]
            assert (ROOT / ours).exists() if ours.startswith("./") else ours in parts["volumes"], volume
        assert "build" in service or re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), name
    over = yaml.safe_load((ROOT / "deploy/compose-gpu.yaml").read_text())
    assert over["services"].keys() <= parts["services"].keys()


def test_prometheus_and_grafana_find_what_they_show():
    services = compose()["services"]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"allattn:{the('EXPOSE')}"]}]
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/datasource.yml").read_text())["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provider.yml").read_text())["providers"]
    places = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert places["./deploy/grafana/dashboard.json"] == f"{provider['options']['path']}/dashboard.json"
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in places.values()

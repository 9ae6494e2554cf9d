"""Tests of the manifests: they are valid, and their endpoints, settings, port and draining time fit the server."""

import asyncio
import copy
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.config import Settings, load_settings
from server.config.keys import read_key_file
from server.config.sources import ENV_PREFIX
from tests.support.http_harness import make_client, make_link

ROOT = Path(__file__).parents[2]
PATCHES = ("gpu", "keys")
VERSIONS = ("1.30", "1.37")
NAMED = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}
LAST_S = 4  # seconds for the server's last writes and the end of its engine, after shutdown_timeout_s
DOCKERFILE = (ROOT / "Dockerfile").read_text()

Object = dict[str, Any]


def read(name: str) -> list[Object]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


def objects() -> list[Object]:
    """Return all objects that kubectl applies as they are."""
    return read("kubernetes.yaml") + read("kubernetes-hpa.yaml")


def the(kind: str) -> Object:
    (found,) = (thing for thing in objects() if thing["kind"] == kind)
    return found


def patched(thing: Any, patch: Any, *, key: str = "") -> Any:
    """Merge a patch as kubectl does: mappings by key, null deletes, lists in NAMED by an item's name, others whole."""
    if isinstance(patch, dict) and isinstance(thing, dict):
        merged = {name: value for name, value in thing.items() if not (name in patch and patch[name] is None)}
        for name, value in patch.items():
            if value is not None:
                merged[name] = patched(merged.get(name), value, key=name)
        return merged
    if isinstance(patch, list) and isinstance(thing, list) and key in NAMED:
        items = {item[NAMED[key]]: item for item in thing}
        for item in patch:
            items[item[NAMED[key]]] = patched(items.get(item[NAMED[key]]), item)
        return list(items.values())
    return copy.deepcopy(patch)


def deployment(*patches: str) -> Object:
    thing = the("Deployment")
    for name in patches:
        (patch,) = read(f"kubernetes-{name}.yaml")
        thing = patched(thing, patch)
    return thing


DEPLOYMENTS = [deployment(), *(deployment(name) for name in PATCHES), deployment(*PATCHES)]
every_deployment = pytest.mark.parametrize("thing", DEPLOYMENTS, ids=["plain", *PATCHES, "both"])


def pod_of(thing: Object) -> Object:
    return thing["spec"]["template"]["spec"]


def container_of(thing: Object) -> Object:
    (container,) = pod_of(thing)["containers"]
    return container


def environment_of(thing: Object) -> dict[str, str]:
    """Return the environment, with the values that Kubernetes fills in from the resources in whole units."""
    container = container_of(thing)
    found = {"ALLATTN_HOST": "0.0.0.0"}
    for item in container["env"]:
        if "value" in item:
            found[item["name"]] = item["value"]
        else:
            kind, name = item["valueFrom"]["resourceFieldRef"]["resource"].split(".")
            found[item["name"]] = container["resources"][kind][name]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("thing", [*objects(), *DEPLOYMENTS[1:]], ids=lambda thing: thing["kind"])
def test_kubernetes_takes_the_manifest(thing, version):
    kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize(
    "patch",
    [
        {"spec": {"template": {"spec": {"enableServiceLink": False}}}},
        {"spec": {"replicas": "2"}},
        {"spec": {"selector": None}},
        {"spec": {"template": {"spec": {"containers": [{"name": "allattn", "env": [{"name": "X", "value": 25}]}]}}}},
    ],
)
def test_a_wrong_manifest_is_noticed(patch):
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(patched(deployment(), patch), VERSIONS[-1], strict=True)


@every_deployment
def test_the_environment_is_settings_that_the_server_takes(thing, tmp_path):
    environ = environment_of(thing)
    if file := environ.get("ALLATTN_API_KEY_FILE"):
        (mount,) = (mount for mount in container_of(thing)["volumeMounts"] if file.startswith(mount["mountPath"] + "/"))
        assert any(volume["name"] == mount["name"] and "secret" in volume for volume in pod_of(thing)["volumes"])
        environ["ALLATTN_API_KEY_FILE"] = str(tmp_path / "keys")
        (tmp_path / "keys").write_text("a-key-of-the-right-length\n")
        assert read_key_file(tmp_path / "keys")
    assert all(name.startswith(ENV_PREFIX) for name in environ)
    settings = load_settings([], environ=environ)
    assert settings.num_threads == int(container_of(thing)["resources"]["limits"]["cpu"])


@every_deployment
def test_the_variables_of_services_stay_out(thing):
    """Otherwise Kubernetes sets ALLATTN_PORT=tcp://10.0.0.1:80, and the server ends at its start."""
    assert the("Service")["metadata"]["name"].upper() + "_" == ENV_PREFIX
    assert pod_of(thing)["enableServiceLinks"] is False


@every_deployment
def test_draining_has_the_time_it_needs(thing):
    settings = load_settings(
        [], environ={"ALLATTN_SHUTDOWN_TIMEOUT_S": environment_of(thing)["ALLATTN_SHUTDOWN_TIMEOUT_S"]}
    )
    command = container_of(thing)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    assert pod_of(thing)["terminationGracePeriodSeconds"] >= int(command[1]) + settings.shutdown_timeout_s + LAST_S


@every_deployment
def test_ports_lead_to_the_server(thing):
    (port,) = container_of(thing)["ports"]
    assert port["containerPort"] == Settings().port
    assert f"EXPOSE {port['containerPort']}\n" in DOCKERFILE
    (service,) = the("Service")["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    annotations = thing["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"


@every_deployment
def test_the_container_may_do_nothing_that_it_does_not_need(thing):
    pod, container = pod_of(thing)["securityContext"], container_of(thing)["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}\n" in DOCKERFILE
    assert container["readOnlyRootFilesystem"] is True
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    writable = [mount["mountPath"] for mount in container_of(thing)["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    assert pod_of(thing)["automountServiceAccountToken"] is False


@every_deployment
def test_probes_ask_what_the_server_answers(thing):
    """Probes work with keys and without. Only readiness changes while the server replaces its engine."""
    container = container_of(thing)
    keys = ("a-key-of-the-right-length",) if "ALLATTN_API_KEY_FILE" in environment_of(thing) else ()
    image_probe = json.loads(re.search(r"CMD (\[.*deploy\.probe.*\])", DOCKERFILE)[1])

    async def ask(state: str) -> dict[str, int]:
        link, codes = make_link(), {}
        link.state = state
        async with make_client(link, api_keys=keys) as client:
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container[name]
                assert ("exec" in probe) != ("httpGet" in probe)
                if "exec" in probe:  # tests/deploy/test_image.py runs this probe
                    assert probe["exec"]["command"] == image_probe
                    path, headers = "/health/ready", {"Authorization": f"Bearer {keys[0]}"}
                else:
                    assert probe["httpGet"]["port"] == container["ports"][0]["name"]
                    path, headers = probe["httpGet"]["path"], {}
                codes[name] = (await client.get(path, headers=headers)).status_code
        return codes

    assert set(asyncio.run(ask("ready")).values()) == {200}
    assert asyncio.run(ask("restarting")) == {"startupProbe": 503, "readinessProbe": 503, "livenessProbe": 200}


def test_objects_find_each_other():
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    assert deployment()["spec"]["selector"]["matchLabels"] == labels
    assert the("Service")["spec"]["selector"] == labels
    assert the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    scaler = the("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment()["metadata"]["name"]
    assert (
        scaler["minReplicas"] == deployment()["spec"]["replicas"] > the("PodDisruptionBudget")["spec"]["maxUnavailable"]
    )


def test_replicas_follow_a_metric_that_the_server_has():
    async def ask() -> str:
        async with make_client(make_link()) as client:
            return (await client.get("/metrics")).text

    (metric,) = the("HorizontalPodAutoscaler")["spec"]["metrics"]
    kinds = {family.name: family.type for family in text_string_to_metric_families(asyncio.run(ask()))}
    assert kinds[metric["pods"]["metric"]["name"]] == "gauge"


def test_the_first_lines_name_the_other_files():
    text = (ROOT / "deploy/kubernetes.yaml").read_text()
    named = set(re.findall(r"deploy/(kubernetes[\w-]*\.yaml)", text))
    assert named == {path.name for path in (ROOT / "deploy").glob("kubernetes*.yaml")}

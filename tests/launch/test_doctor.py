"""What doctor says: of made-up machines, of this one, of two nodes, and of what is broken."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse
from launch import doctor_checks as checks
from launch import doctor_cluster, doctor_pairs
from launch.doctor import _of_config, findings, show
from launch.doctor_checks import GIB, Finding
from launch.doctor_node import PACKAGES, NodeFacts, gather
from launch.doctor_pairs import rounds

NODE = NodeFacts(
    name="a",
    python="3.12.1",
    packages=dict.fromkeys(PACKAGES, "1.0"),
    driver="580.1",
    gpus=("NVIDIA H100",) * 8,
    memory=512 * GIB,
    shm_total=256 * GIB,
    shm_free=250 * GIB,
    open_files=(1 << 20, 1 << 20),
    listening=(),
    ray_auth="token",
)
OTHER = replace(NODE, name="b")


def levels(found: Any) -> list[str]:
    return [finding.level for finding in found]


def test_nodes_that_are_alike_pass() -> None:
    for check in (checks.versions, checks.drivers, checks.shared_memory, checks.open_files, checks.bytecode):
        found = list(check([NODE, OTHER]))
        assert found, check
        assert set(levels(found)) == {"pass"}, check
    assert set(levels(checks.security([NODE, OTHER], address="10.0.0.1:6379"))) == {"pass"}


def test_a_version_that_differs_or_is_missing_fails_and_names_the_node() -> None:
    newer = replace(OTHER, packages=NODE.packages | {"torch": "2.0"})
    (found,) = checks.versions([NODE, newer])
    assert (found.level, found.said) == ("fail", "torch differs: a 1.0, b 2.0")
    (found,) = checks.versions([NODE, replace(OTHER, packages=NODE.packages | {"ray": None})])
    assert (found.level, found.said) == ("fail", "ray is missing on b")


def test_drivers_and_gpus_that_differ_are_warned_of() -> None:
    found = list(checks.drivers([NODE, replace(OTHER, driver="570.2", gpus=("NVIDIA A100",))]))
    assert levels(found) == ["warn", "warn"]
    assert "a 580.1, b 570.2" in found[1].said


@pytest.mark.parametrize(("total", "free", "level"), [(0.06, 0.06, "fail"), (8, 8, "warn"), (256, 0.5, "fail")])
def test_small_shared_memory_is_found(total: float, free: float, level: str) -> None:
    node = replace(NODE, shm_total=int(total * GIB), shm_free=int(free * GIB))
    (found,) = checks.shared_memory([node])
    assert found.level == level
    assert found.remedy


@pytest.mark.parametrize(("limits", "level"), [((1024, 1024), "fail"), ((1024, 1 << 20), "warn")])
def test_few_open_files_are_found(limits: tuple[int, int], level: str) -> None:
    (found,) = checks.open_files([replace(NODE, open_files=limits)])
    assert found.level == level


def test_packages_that_every_process_compiles_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = checks.bytecode([replace(NODE, uncompiled=("torch", "ray"))])
    assert found.level == "warn" and "compiles torch, ray anew" in found.said
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert set(gather().uncompiled) >= {"torch", "ray", "transformers"}
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert not gather().uncompiled, "the first process keeps what it compiles"


@pytest.mark.parametrize(("free_gib", "level"), [(10, "fail"), (50, "warn"), (200, "pass")])
def test_disk_must_hold_the_checkpoints(free_gib: int, level: str) -> None:
    found = checks.disk(free_gib * GIB, parameters=GIB, dtype="bfloat16", keep=2, run_dir="runs")
    assert found.level == level
    assert "3 checkpoints of 14.0 GiB need 42.0 GiB" in found.said


def test_clocks_are_judged_by_what_is_certain() -> None:
    offsets = {"slow to answer": (-3.0, 4.0), "ahead": (2.0, 2.1), "far behind": (-60.1, -60.0)}
    assert levels(checks.clocks(offsets)) == ["pass", "warn", "fail"]


def test_a_cluster_without_a_token_fails_and_foreign_listeners_are_named() -> None:
    found = list(checks.security([replace(NODE, ray_auth="")], address="10.0.0.1:6379"))
    assert found[0].level == "fail"
    assert "RAY_AUTH_MODE=token" in found[0].remedy
    open_ray = replace(NODE, listening=("raylet 0.0.0.0:1", "python3 0.0.0.0:2"))
    found = list(checks.security([open_ray], address="10.0.0.1:6379"))
    assert found[1].level == "warn"
    assert "python3" in found[1].said
    assert "raylet" not in found[1].said


def test_a_port_that_is_taken_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert checks.port("monitor.port", taken).level == "fail"
    assert checks.reachable().level == "pass"


def test_listening_sockets_are_seen_and_loopback_is_not() -> None:
    with socket.create_server(("", 0)) as server, socket.create_server(("127.0.0.1", 0)) as quiet:
        seen = gather().listening
        assert any(one.endswith(f":{server.getsockname()[1]}") for one in seen)
        assert not any(one.endswith(f":{quiet.getsockname()[1]}") for one in seen)


def test_loopback_as_ipv6_writes_it_is_loopback() -> None:
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::ffff:127.0.0.1", 0))
        server.listen()
        assert not any(one.endswith(f":{server.getsockname()[1]}") for one in gather().listening)


def test_every_pair_meets_once_and_nobody_is_in_two_places() -> None:
    for count in range(2, 8):
        members = [f"n{index}" for index in range(count)]
        plan = rounds(members)
        met = [frozenset(pair) for together in plan for pair in together]
        assert len(met) == len(set(met)) == count * (count - 1) // 2
        for together in plan:
            busy = [member for pair in together for member in pair]
            assert len(busy) == len(set(busy))


def test_two_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_pairs, "START_S", 500.0)
    (found,) = doctor_pairs.local_pairs(0)
    assert found.level == "pass", found
    assert "gloo" in found.said


def test_a_pair_that_hangs_is_named_when_the_deadline_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_pairs, "_answer", time.sleep)  # called with (rank, ...): ends at once, says nothing
    monkeypatch.setattr(doctor_pairs, "START_S", 0.0)
    monkeypatch.setattr(doctor_pairs, "DEADLINE_S", 0.5)
    (found,) = doctor_pairs.local_pairs(0)
    assert (found.level, found.said) == ("fail", "two processes: no answer within 0 s")


def test_a_model_that_is_not_whole_fails_with_its_remedy(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes()[:-100])
    (found,), folder = checks.model(parse(f"{{model: {broken}, data: {{name: chain_sum}}}}"))
    assert (found.level, found.remedy, folder) == ("fail", "fetch the model again", None)


def test_a_model_with_code_of_its_own_is_warned_of(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    found, _ = checks.model(parse(f"{{model: {folder}, data: {{name: chain_sum}}}}"))
    assert [finding.level for finding in found if finding.check == "remote code"] == ["warn"]


def test_lines_are_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show([Finding("disk", "fail", "[0] bytes", "free some"), Finding("clock", "pass", "fine")])
    assert capsys.readouterr().out == "fail  disk: [0] bytes -> free some\npass  clock: fine\n"


def test_gates_that_are_not_there_fail_with_their_remedy(tiny_model_dir: Path) -> None:
    recipe = f"{{model: {tiny_model_dir}, data: {{name: chain_sum}}}}"
    gated = ["sparse.mode=draft", "sparse.selector=gate", "sparse.gate=/nowhere", "rollout.block_size=64"]
    missing = {finding.check: finding for finding in _of_config(parse(recipe, gated), "runs")}
    assert missing["sparse attention"].level == "fail" and "paceline gate train" in missing["sparse attention"].remedy
    found = {finding.check: finding for finding in _of_config(parse(recipe, ["sparse.mode=draft"]), "runs")}
    assert found["sparse attention"].level == "pass"


def test_a_recipe_of_a_whole_model_passes_and_a_missing_model_is_exit_3(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny_model_dir}\ndata: {{name: chain_sum}}\n")
    command = [sys.executable, "-c", "from launch.cli import main; main()", "doctor", "recipe.yaml", "--json"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([*command, "model=/nowhere"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert "checks failed: model; the remedies stand beside them" in done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is False
    by_check = {finding["check"]: finding for finding in report["findings"]}
    assert by_check["model"]["remedy"] == "correct it"
    machine = {"versions", "drivers", "shared memory", "open files", "ray token", "listening", "ports", "all-reduce"}
    assert set(by_check) >= machine | {"sandbox"}


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two Ray nodes simulated on this machine, with a token; RAY_ADDRESS names them."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "launch.simulated_nodes", "1", "1"]  # CPUs of each
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as nodes:
        assert nodes.stdin is not None and nodes.stdout is not None
        monkeypatch.setenv("RAY_ADDRESS", nodes.stdout.readline().decode().strip())
        yield
        nodes.stdin.close()


@pytest.mark.slow
def test_every_node_of_a_cluster_answers_and_every_two_add_up(two_nodes: None) -> None:
    code = (
        "import json; from dataclasses import asdict; from launch.doctor import findings;"
        "print(json.dumps([asdict(one) for one in findings(None, every_node=True)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    by_check: dict[str, list[dict[str, str]]] = {}
    for finding in found:
        by_check.setdefault(finding["check"], []).append(finding)
    assert by_check["nodes"][0]["said"].startswith("2 answer: ")
    assert by_check["versions"][0]["said"].startswith("2 nodes alike: ")
    assert [one["level"] for one in by_check["ray token"]] == ["pass", "pass"]
    assert [one["level"] for one in by_check["clock"]] == ["pass", "pass"]
    (pair,) = by_check["all-reduce"]
    assert pair["level"] == "pass", pair
    assert pair["said"].endswith("by gloo")


def test_a_cluster_of_which_no_node_answers_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Finding("nodes", "fail", "a does not answer", "start its Ray again")
    monkeypatch.setattr(doctor_cluster, "connect", lambda: None)
    monkeypatch.setattr(doctor_cluster, "ask", lambda: ([], {}, [silent]))
    assert list(findings(None, every_node=True)) == [silent]


def test_all_nodes_of_no_cluster_is_a_preflight_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from configs.errors import PreflightError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PreflightError, match="RAY_ADDRESS names none"):
        list(findings(None, every_node=True))

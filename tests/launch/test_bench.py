"""`paceline bench` on a tiny geometry: what it verifies, what it reports, and one line for what is missing."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError, ResourceError
from launch import bench, bench_options, bench_vllm
from launch.bench_report import plain_table
from launch.exits import outcome

# Stands in for the python of vLLM's environment: has every package, and takes 2 ms a token whatever the batch.
PEER = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit(0)
def say(**answer):
    print(json.dumps(answer), flush=True)
job = json.loads(sys.stdin.readline())
say(versions=dict(vllm="0"), import_s=0.0, ready_s=3.0, first_token_s=0.5, settings=job)
for line in sys.stdin:
    order = json.loads(line)
    say(seconds=0.1 + 0.002 * order["new_tokens"])
"""


@pytest.fixture
def peer_python(tmp_path: Path) -> Path:
    python = tmp_path / "python"
    python.write_text(PEER.format(python=sys.executable))
    python.chmod(0o755)
    return python


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a measurement on the tiny geometry, on a CPU: its JSON."""

    def run(command: str, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "results" / "out.json"
        given = [command, "--geometry", "tiny", "--device", "cpu", "--json", str(out), *arguments]
        result = CliRunner().invoke(bench.app, given, catch_exceptions=False)
        assert result.exit_code == 0
        assert "tiny" in result.stdout
        written: dict[str, Any] = json.loads(out.read_text())
        for name in ("command", "commit", "packages", "gpu", "seed"):
            assert name in written, name
        return written

    return run


@pytest.fixture
def failure() -> Callable[..., tuple[int, str]]:
    """Run what cannot work: exit code and the line for the user."""

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(bench.app, list(arguments), standalone_mode=False)
        assert isinstance(result.exception, BaseException)
        return outcome(result.exception)

    return run


def test_decode_times_both_sides_in_turns_and_states_limit_and_ratio(
    measure: Callable[..., dict[str, Any]], peer_python: Path
) -> None:
    peer = ("--peer", "vllm", "--peer-python", str(peer_python))
    result = measure("decode", "--batches", "1,3", "--new-tokens", "8", "--rounds", "2", *peer)
    (model,) = result["models"]
    assert model["verified"]["agreement"] == 1.0
    assert model["peer"]["ready_s"] == 3.0
    assert model["peer"]["settings"]["load_format"] == "dummy"
    # several peers stand at once: none may take what memory it finds
    assert model["peer"]["settings"]["kv_bytes"] > 0
    assert [cell["batch"] for cell in model["cells"]] == [1, 3]
    for cell in model["cells"]:
        assert len(cell["paceline"]["step_ms"]["rounds"]) == 2  # the warm-up is left out
        assert cell["vllm"]["step_ms"]["median"] == pytest.approx(2.0)
        assert cell["ratio"] == pytest.approx(cell["paceline"]["step_ms"]["median"] / 2.0)
        assert cell["limit"] == 1.0


def test_a_cycle_verifies_full_trees_and_is_stated_in_plain_steps(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure("cycle", "--batches", "2", "--new-tokens", "4", "--rounds", "1", "--graph-batch", "1")
    assert set(result["verified"]) == {"plain", "cycle"}
    assert all(found["agreement"] == 1.0 for found in result["verified"].values())
    (cell,) = result["cells"]
    assert cell["ratio"] == pytest.approx(cell["cycle"]["median"] / cell["plain"]["median"])
    assert result["graphs"]["ratio"] is None  # a CPU has none


def test_a_cycles_parts_can_be_measured_alone(
    measure: Callable[..., dict[str, Any]], failure: Callable[..., tuple[int, str]]
) -> None:
    timed = measure("cycle", "--batches", "1", "--new-tokens", "4", "--rounds", "1", "--graph-batch", "0")
    assert len(timed["cells"]) == 1 and timed["graphs"] is None
    weighed = measure("cycle", "--batches", "", "--graph-batch", "2")
    assert weighed["cells"] == [] and weighed["graphs"]["batches"] == [1, 2]
    code, line = failure("cycle", "--geometry", "tiny", "--batches", "", "--graph-batch", "0")
    assert code == 2 and "--graph-batch" in line


def test_timed_cycles_are_kept_where_their_graphs_cannot_be_weighed(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise ResourceError("no room for graphs")

    monkeypatch.setattr("launch.bench_cycle.graph_memory", full)
    out = tmp_path / "out.json"
    small = ("--batches", "1", "--new-tokens", "4", "--rounds", "1", "--device", "cpu")
    assert failure("cycle", "--geometry", "tiny", *small, "--json", str(out)) == (4, "no room for graphs")
    assert len(json.loads(out.read_text())["cells"]) == 1


def test_gains_are_taken_round_by_round_against_an_engine_without_drafts(
    measure: Callable[..., dict[str, Any]],
) -> None:
    result = measure("gain", "--batches", "2", "--new-tokens", "12", "--rounds", "2")
    (cell,) = result["cells"]
    assert cell["off"]["gain"]["rounds"] == [1.0, 1.0]
    rates = [cell[name]["tokens_per_s"]["rounds"] for name in ("chosen", "off")]
    assert cell["chosen"]["gain"]["rounds"] == pytest.approx([a / b for a, b in zip(*rates, strict=True)])
    assert cell["never matching"]["accept_length"]["median"] == 1.0
    assert result["choosers"]["chosen"]["choice"] == "goodput"
    assert cell["chosen"]["gain"]["q1"] <= cell["chosen"]["gain"]["median"] <= cell["chosen"]["gain"]["q3"]
    assert len(cell["warm"]) == 1 and len(cell["chosen"]["happened"]) == 2


def test_kernels_are_measured_beside_torch(measure: Callable[..., dict[str, Any]]) -> None:
    shapes = ("--batches", "1,2", "--contexts", "32,60", "--max-keys", "64", "--tokens", "2", "--logprob-rows", "4")
    result = measure("kernels", *shapes)
    attention = [cell["size"] for cell in result["cells"] if cell["kernel"] == "attention, decode"]
    assert attention == ["1 x 32", "2 x 32", "1 x 60"]  # 2 x 60 is over --max-keys
    named = {cell["kernel"].partition(",")[0] for cell in result["cells"]}
    assert named == {"attention", "linear", "gated linear", "sample", "log-probs"}
    assert all(cell["baseline_us"]["median"] > 0 for cell in result["cells"])


def test_prefill_is_measured_beside_the_module_which_gets_its_own_attention_back(
    measure: Callable[..., dict[str, Any]], peer_python: Path
) -> None:
    peer = ("--peer", "vllm", "--peer-python", str(peer_python))
    result = measure("prefill", "--lengths", "16,64", "--total-tokens", "64", "--rounds", "1", *peer)
    assert [(cell["length"], cell["batch"]) for cell in result["cells"]] == [(16, 4), (64, 1)]
    for cell in result["cells"]:
        assert cell["vllm"]["median"] == pytest.approx(64 / 0.102)
        assert cell["paceline"]["median"] > 0
        assert cell["transformers"]["median"] > 0


def test_drift_finds_equal_rollouts_with_drafts_and_without(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure("drift", "--prompts", "2", "--samples", "2", "--new-tokens", "20")
    assert result["rollouts_equal"] == result["rollouts"] == 4
    assert result["agreement"] == 1.0
    assert result["tokens_a_forward"]["on"] > 2.0  # or verification was not put to the test
    assert result["drift"]["on"]["max"] < 1e-3


@pytest.mark.slow
def test_starts_are_measured_in_fresh_processes_cold_then_warm(
    measure: Callable[..., dict[str, Any]], peer_python: Path
) -> None:
    result = measure("start", "--peer", "vllm", "--peer-python", str(peer_python))
    ours, theirs = result["sides"]["paceline"], result["sides"]["vllm"]
    assert 0 < ours["cold"]["first_token_s"] <= ours["cold"]["steady_s"]
    assert len(ours["warm"]["first_token_s"]["rounds"]) == 1
    assert theirs["cold"]["first_token_s"] == 3.5


@pytest.mark.parametrize("batches", ["", "1,x", "0,1", "8,8"])
def test_a_bad_list_of_batches_is_a_usage_error(batches: str, failure: Callable[..., tuple[int, str]]) -> None:
    code, line = failure("decode", "--geometry", "tiny", "--batches", batches)
    assert code == 2
    assert "--batches" in line and "1,8,32" in line


def test_an_unknown_geometry_is_a_usage_error_that_names_the_known(failure: Callable[..., tuple[int, str]]) -> None:
    code, line = failure("decode", "--geometry", "qwen9")
    assert code == 2
    assert "qwen9" in line and "qwen3-8b" in line


def test_a_measurement_needs_one_model(failure: Callable[..., tuple[int, str]]) -> None:
    for given in ((), ("--geometry", "tiny", "--model", "x")):
        code, line = failure("cycle", *given)
        assert code == 2
        assert "--geometry" in line and "--model" in line


@pytest.mark.parametrize("command", ["decode", "sparse-drift"])
def test_a_model_that_is_not_there_is_named_as_it_was_given(
    command: str, failure: Callable[..., tuple[int, str]]
) -> None:
    code, line = failure(command, "--model", "nope")
    assert code == 3
    assert "--model 'nope' is neither a folder" in line and "model=" not in line


def test_options_are_named_for_the_keys_they_stand_for_and_keys_where_they_can_be_set() -> None:
    said = "sparse.weights=fp8: sparse.gate of model='x'; the model's sparse.weights=int8, sparse.window"

    def options(model: str, gate: str, weights: str) -> None:
        raise ConfigError(said)

    def keys(model: str, weights: str, overrides: list[str]) -> None:
        raise ConfigError(said)

    with pytest.raises(ConfigError) as caught:
        bench_options.in_options(options)(model="x", gate="g", weights="fp8")
    assert str(caught.value) == "--weights fp8: --gate of --model 'x'; the model's --weights int8, sparse.window"
    with pytest.raises(ConfigError) as caught:
        bench_options.in_options(keys)(model="x", weights="fp8", overrides=[])
    assert str(caught.value) == said.replace("model='x'", "--model 'x'")


def test_a_result_that_could_not_be_written_is_refused_before_it_is_measured(
    failure: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for command in ("decode", "start", "kernels"):
        for out in (tmp_path / "file" / "out.json", tmp_path):
            # a geometry that is not there either: it would be found out later
            code, line = failure(command, "--geometry", "nope", "--json", str(out))
            assert code == 6
            assert f"--json {out}" in line


def test_no_column_is_cut_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = plain_table("a title that is longer than forty columns are wide", ["a column of twenty"] * 4)
    shown.add_row(*("a value of twenty or so" for _ in range(4)))
    bench_options.show({}, shown, None)
    lines = capsys.readouterr().out.splitlines()
    assert max(line.count("a value of twenty or so") for line in lines) == 4


def test_a_peer_that_is_not_installed_is_a_preflight_error(failure: Callable[..., tuple[int, str]]) -> None:
    code, line = failure("decode", "--geometry", "tiny", "--peer", "vllm")
    assert code == 3
    assert "pip install vllm" in line and "--peer-python" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_a_preflight_error(failure: Callable[..., tuple[int, str]]) -> None:
    code, line = failure("decode", "--geometry", "tiny", "--device", "cuda")
    assert code == 3
    assert "--device" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("prefill --lengths 16,4096", "4096"),
        ("decode --batches 1 --prompt-len 4000", "4144 tokens exceed the model's context of 4096"),
        ("cycle --batches 1 --prompt-len 4090", "fewer new tokens"),
        ("gain --batches 1 --new-tokens 4096", "fewer new tokens"),
        ("drift --new-tokens 4096", "fewer new tokens"),
        ("kernels --contexts 15,64", "--contexts: give at least 16"),
        ("decode --geometry tiny,tiny", "names one twice"),
    ],
)
def test_what_no_model_or_kernel_can_hold_is_a_usage_error(
    arguments: str, said: str, failure: Callable[..., tuple[int, str]]
) -> None:
    command, *given = arguments.split()
    code, line = failure(command, "--device", "cpu", "--geometry", "tiny", *given)
    assert code == 2
    assert said in line


def test_a_prompt_that_just_fits_the_context_is_measured(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure("prefill", "--lengths", "4095", "--total-tokens", "1", "--rounds", "1")
    assert result["cells"][0]["batch"] == 1


def test_measuring_imports_neither_ray_nor_deepspeed_nor_tasks() -> None:
    modules = [f"bench_{name}" for name in ("decode", "cycle", "gain", "kernels", "prefill", "drift", "start")]
    unwanted = ("ray", "deepspeed", "reasoning_gym", "math_verify", "datasets")
    code = f"import sys, launch.cli, {', '.join(f'launch.{name}' for name in modules)}\n"
    code += f"sys.exit(', '.join(name for name in {unwanted} if name in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_peers_script_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(bench_vllm.__file__).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {"configs", "kernels", "drafter", "rollout", "rl", "launch"}
    assert not {module.partition(".")[0] for module in modules} & ours

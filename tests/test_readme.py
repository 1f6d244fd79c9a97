"""The README says what the result files say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_steps_beside_trl_come_from_their_result_file() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "docs" / "results" / "trl_step_time.json").read_text())
    assert len(result["arms"]) == 3
    for arm in result["arms"]:
        step = arm["seconds"]
        assert f"{step['median']:.2f}" in readme, arm["name"]
        assert f"{step['min']:.2f} to {step['max']:.2f}" in readme, arm["name"]
    assert f"{result['speedup']['paceline off']['step']:.2f}" in readme


def test_the_decode_steps_beside_vllm_come_from_their_result_file() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "docs" / "results" / "decode_h100.json").read_text())
    assert len(result["models"]) == 3
    for model in result["models"]:
        cells = model["cells"]
        assert [cell["batch"] for cell in cells] == [1, 8, 32, 128, 256]
        steps = (
            f"{cell['paceline']['step_ms']['median']:.2f} / {cell['vllm']['step_ms']['median']:.2f}" for cell in cells
        )
        assert f"| {' | '.join(steps)} |" in readme, model["model"]
        ratios = " | ".join(f"{cell['ratio']:.2f}" for cell in cells)
        assert f"| {ratios} |" in readme, model["model"]


def test_start_up_and_several_gpus_are_as_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    sides = json.loads((ROOT / "docs" / "results" / "start_h100.json").read_text())["sides"]["paceline"]
    assert f"{sides['cold']['first_token_s']:.1f} s with empty" in readme
    assert f"{sides['warm']['first_token_s']['median']:.1f} s with kept" in readme
    cell = json.loads((ROOT / "docs" / "results" / "tensor_parallel_h200.json").read_text())["cells"][0]
    assert f"{cell['speedup']:.2f} times the speed of one at batch {cell['batch']}" in readme


def test_the_learning_curve_reaches_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "docs" / "results" / "smollm2_gpu.json").read_text())
    rewards = [record["reward_mean"] for record in result["evaluations"]]
    for reward in (rewards[0], rewards[1], rewards[-1]):
        assert f"{reward:.2f}" in readme
    assert f"{result['wall_seconds']} s" in readme


def test_the_long_tail_is_as_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    arms = json.loads((ROOT / "docs" / "results" / "longtail_h100.json").read_text())["arms"]
    gains = {
        name: {part: f"{arms[name]['gain'][part]['total']:.2f}" for part in ("rollout", "step")}
        for name in ("tlt", "ours")
    }
    assert f"rolls out {gains['ours']['rollout']} times as fast" in readme
    assert f"{gains['ours']['step']} times less a step" in readme
    assert f"{gains['tlt']['rollout']} and {gains['tlt']['step']}" in readme


def test_what_drafts_cost_where_they_bring_nothing_is_as_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    cells = json.loads((ROOT / "docs" / "results" / "gain_h100.json").read_text())["cells"]
    cells.sort(key=lambda cell: cell["batch"])
    assert [cell["batch"] for cell in cells] == [1, 8, 32, 128, 256]
    assert ", ".join(f"{cell['chosen']['gain']['median']:.2f}" for cell in cells) in readme


def test_idle_time_is_used_as_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    learn = json.loads((ROOT / "docs" / "results" / "idle_h200.json").read_text())["arms"]["learn"]
    assert f"spends {learn['used']['median']:.0%} of that time".replace("%", " %") in readme

"""The README says what the result files say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_beside_trl_comes_from_its_result_file() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "docs" / "results" / "trl_step_time.json").read_text())
    assert len(result["arms"]) == 3
    for arm in result["arms"]:
        step = arm["seconds"]
        assert f"| {step['median']:.2f} | {step['min']:.2f} to {step['max']:.2f} |" in readme, arm["name"]
    for gain in result["speedup"].values():
        assert f"| {gain['step']:.2f} |" in readme


def test_the_learning_curve_reaches_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "docs" / "results" / "smollm2_gpu.json").read_text())
    rewards = [record["reward_mean"] for record in result["evaluations"]]
    for reward in (rewards[0], rewards[1], rewards[-1]):
        assert f"{reward:.2f}" in readme
    assert f"{result['wall_seconds']} s" in readme

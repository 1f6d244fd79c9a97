"""The config loader: what it accepts, what it says about the rest."""

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from configs.errors import ConfigError
from configs.load import changes, dump, find_recipe, load, parse, recipes
from configs.schema import Config

BASE = "data: {name: chain_sum}\n"
SHIPPED = sorted(Path(str(files("configs"))).glob("*.yaml"))


def complaint(text: str, *overrides: str) -> list[str]:
    """The lines of the error a config raises."""
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides)
    return str(caught.value).splitlines()


def count_leaves(node: object) -> int:
    return sum(map(count_leaves, node.values())) if isinstance(node, dict) else 1


def test_there_is_a_shipped_recipe() -> None:
    assert "smoke" in recipes()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_shows_at_most_30_keys(path: Path) -> None:
    load(path)
    assert count_leaves(OmegaConf.to_container(OmegaConf.load(path))) <= 30


def test_bare_recipe_name_is_the_shipped_file() -> None:
    assert load(Path("smoke")) == load(Path(str(files("configs") / "smoke.yaml")))


def test_missing_file_names_the_shipped_recipes() -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml does not exist.*smoke"):
        find_recipe(Path("nope.yaml"))


def test_folder_instead_of_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        find_recipe(tmp_path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load(tmp_path / "binary.yaml")


def test_empty_sections_are_defaults() -> None:
    assert parse(BASE + "train:\nspec:\n") == parse(BASE)


def test_values_arrive_with_their_types() -> None:
    options = "data.options={min_terms: 3, sign: +}"
    config = parse(BASE, ["train.lr=1e-5", "train.max_grad_norm=2", "train.betas=[0.8, 1e-1]", options])
    assert config.train.lr == 1e-5
    assert type(config.train.max_grad_norm) is float
    assert config.train.betas == (0.8, 0.1)
    assert config.data.options == {"min_terms": 3, "sign": "+"}


def test_unquoted_off_is_the_word() -> None:
    assert parse(BASE, ["spec.source=off"]).spec.source == "off"
    assert parse(BASE + "spec: {source: off}").spec.source == "off"


def test_text_that_may_be_empty_is_emptied_by_nothing_which_shells_make_of_two_quotes() -> None:
    assert parse(BASE, ["drafter.init=head", "drafter.init="]).drafter.init == ""
    assert complaint(BASE, "run.name=") == ["run.name=null: expected text, not null"]


def test_interpolation_reads_given_and_default_keys() -> None:
    config = parse(BASE + "run: {name: 'g${rollout.group_size}s${train.steps}'}", ["train.steps=7"])
    assert config.run.name == "g8s7"


def test_override_adds_to_a_mapping_and_the_file_replaces_it() -> None:
    assert parse(BASE, ["reward.functions.format=0.1"]).reward.functions == {"task": 1.0, "format": 0.1}
    assert parse(BASE + "reward: {functions: {math: 1}}").reward.functions == {"math": 1.0}


def test_all_mistakes_are_listed_at_once() -> None:
    lines = complaint(BASE, "train.stepz=3", "train.lr=abc", "rollout.group_size=1", "nonsense")
    assert lines == [
        "override 'nonsense' is not of the form a.b=c, as in train.steps=20",
        "unknown key train.stepz; did you mean train.steps?",
        "train.lr='abc': expected a finite number, not text",
        "rollout.group_size=1: must be at least 2: an advantage compares the rollouts of one prompt",
    ]


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("rollout.temprature", "rollout.temperature"),
        ("train.learning_rate", "train.lr"),
        ("steps", "train.steps"),
        ("rollout.steps", "train.steps"),
        ("trian", "train"),
        ("seed", "run.seed"),
    ],
)
def test_unknown_key_names_the_closest_known_one(unknown: str, meant: str) -> None:
    assert complaint(BASE, f"{unknown}=1") == [f"unknown key {unknown}; did you mean {meant}?"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=true", "train.steps=true: expected an integer, not a boolean"),
        ("train.steps=1.5", "train.steps=1.5: expected an integer, not a fraction"),
        ("train.lr=.inf", "train.lr=inf: expected a finite number"),
        ("train.lr=", "train.lr=null: expected a finite number, not null"),
        ("train.gradient_checkpointing=1", "expected a boolean, not an integer"),
        ("train.betas=[0.9]", "train.betas=[0.9]: expected a list of 2"),
        ("train.betas=[0.9, x]", "train.betas[1]='x': expected a finite number"),
        ("train=5", "train=5: expected a mapping"),
        ("run.name=12", "run.name=12: expected text (quote it)"),
        ("reward.functions.task=high", "reward.functions.task='high': expected a finite number"),
        ("train.zero_stage=4", "train.zero_stage=4: expected one of 0, 1, 2, 3"),
        ("train.zero_stage=true", "train.zero_stage=true: expected one of 0, 1, 2"),
        ("compute.device=gpu", "compute.device='gpu': expected one of auto, cpu, cuda"),
        ("spec.choice=best", "spec.choice='best': expected one of auto, goodput, beg_mab, fixed"),
        ("data.options=[1,", "has a value that is not valid YAML"),
        ("=3", "is not of the form a.b=c"),
        ("run.name=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_wrong_value_is_one_line_with_key_value_and_expectation(override: str, said: str) -> None:
    (line,) = complaint(BASE, override)
    assert said in line


@pytest.mark.parametrize(
    "override",
    [
        "rollout.top_p=0",
        "rollout.top_p=1.1",
        "rollout.min_p=1",
        "rollout.temperature=0",
        "rollout.kv_tokens=100",
        "train.updates_per_step=0",
        "train.updates_per_step=65",
        "train.warmup_steps=101",
        "train.betas=[0.9, 1.0]",
        "train.lr=0",
        "spec.num_verify=0",
        "spec.below=-1",
        "drafter.lr=0",
        "drafter.budget=1.5",
        "drafter.window=0",
        "compute.workers=2",
        "reward.functions.nope=1",
        "reward.functions={task: 1, a b:c: 1}",
        "reward.answer='no group'",
        "reward.format='('",
        "data.name=''",
        "data.template=plain",
        "data.max_bad_fraction=2",
        "warmstart.solutions=nowhere",
        "checkpoint.keep=0",
        "model=''",
        "run.name=a/b",
    ],
)
def test_value_that_cannot_work_is_named(override: str) -> None:
    (line,) = complaint(BASE, override)
    assert line.startswith(override.split("=")[0].rpartition(".nope")[0] or override.split("=")[0])


def test_programs_are_rewarded_where_rows_have_tests() -> None:
    (line,) = complaint(BASE, "reward.functions.code=1")
    assert line.startswith("reward.functions={'task': 1.0, 'code': 1.0}: 'code' runs a row's tests")
    assert line.endswith("data.source=reasoning_gym has none; leave it out")
    parse(BASE, ["reward.functions.code=1", "reward.on_error=zero"])  # it counts as zero, as was asked for
    parse(BASE, ["reward.functions.code=1", "data.source=file"])


def test_cache_that_holds_one_sequence_only_without_its_last_block_is_refused() -> None:
    sizes = ["data.max_prompt_tokens=20", "rollout.max_new_tokens=10", "rollout.block_size=16"]
    (line,) = complaint(BASE, *sizes, "rollout.kv_tokens=31")
    assert line.startswith("rollout.kv_tokens=31: one sequence may take 30")
    assert "32 in blocks of 16" in line
    assert parse(BASE, [*sizes, "rollout.kv_tokens=32"]).rollout.kv_tokens == 32


def test_draft_lengths_do_not_matter_when_speculation_is_off() -> None:
    assert parse(BASE, ["spec.source=off", "spec.num_verify=0"]).spec.num_verify == 0


@pytest.mark.parametrize("source", ["eagle", "auto"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["drafter.init=''", "drafter.train=false"],
        ["drafter.batch_tokens=100", "drafter.feature_window=101"],
        ["spec.top_k=16", "spec.depth=5", "spec.num_verify=60"],
    ],
    ids=" ".join,
)
def test_what_a_learned_drafter_cannot_do_is_refused_where_there_is_one(source: str, overrides: list[str]) -> None:
    parse(BASE, overrides)
    (line,) = complaint(BASE, f"spec.source={source}", *overrides)
    assert line.startswith(overrides[0].partition("=")[0])


@pytest.mark.parametrize("text", ["train: [1,\n  b: 2", "train: {steps: 1, steps: 2}", "- a", "a: b: c"])
def test_text_that_is_no_mapping_is_refused_in_one_line(text: str) -> None:
    assert len(complaint(text)) == 1


VALUES = st.integers() | st.booleans() | st.text("ab${}\\: ")


@given(
    system=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    options=st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
)
@example(system="0e0", options={}, lr=1.0)
def test_dumped_config_loads_back_equal(system: str, options: dict[str, object], lr: float) -> None:
    config = parse(BASE)
    config = replace(
        config, data=replace(config.data, system=system, options=options), train=replace(config.train, lr=lr)
    )
    assert parse(dump(config)) == config


def test_changes_are_the_overrides_that_make_one_config_of_the_other() -> None:
    before = parse("data: {name: chain_sum}")
    overrides = ["train.betas=[0.8,0.9]", "reward.functions.format=0.1", "spec.source=off"]
    assert changes(before, before) == []
    asked = changes(before, parse("data: {name: chain_sum}", overrides))
    assert sorted(each.partition("=")[0] for each in asked) == ["reward.functions", "spec.source", "train.betas"]
    assert parse("data: {name: chain_sum}", asked) == parse("data: {name: chain_sum}", overrides)


def test_configs_import_neither_torch_nor_numpy() -> None:
    code = "import sys, configs.load; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_schema_defaults_satisfy_every_check_but_the_task_name() -> None:
    (line,) = complaint(dump(Config()))
    assert line.startswith("data.name")

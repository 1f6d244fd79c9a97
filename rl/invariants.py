"""What holds after every step, whatever befell it: asserted before the policy learns from the step."""

from collections.abc import Sequence

from rl.types import Group
from rollout.types import Prompt


def check_step(groups: Sequence[Group], prompts: Sequence[Prompt], *, num_samples: int, version: int) -> None:
    """No prompt is lost or doubled, no sample of a group is, and one version of the policy said every token."""
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in prompts], "prompts were lost or doubled"
    for group in groups:
        samples = [rollout.sample for rollout in group.rollouts]
        assert samples == list(range(num_samples)), f"prompt {group.prompt.id} has samples {samples}"
        for rollout in group.rollouts:
            said = sum(count for _, count in rollout.version_spans)
            assert said == len(rollout.token_ids) == len(rollout.logprobs), f"{rollout.prompt_id}: tokens of no version"
            versions = {span for span, _ in rollout.version_spans}
            assert versions <= {version}, f"{rollout.prompt_id}: versions {versions} in the step after {version}"

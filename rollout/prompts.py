"""What a prompt must satisfy before any engine takes it."""

from collections.abc import Sequence

from configs.errors import DataError
from rollout.types import Prompt, Sampling


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, *, context: int) -> None:
    """Raise DataError for a prompt that cannot be rolled out: without tokens, given twice, or too long to answer.

    context: the most tokens, prompt and response together, that the model has positions for.
    """
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"prompt {prompt.id!r} is given twice in one step; give each prompt an id of its own")
        seen.add(prompt.id)
        if not prompt.token_ids:
            raise DataError(f"prompt {prompt.id!r} has no tokens; remove it from the data")
        if len(prompt.token_ids) + sampling.max_new_tokens > context:
            raise DataError(
                f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens and max_new_tokens={sampling.max_new_tokens}"
                f" exceed the model's context of {context}; lower rollout.max_new_tokens or data.max_prompt_tokens"
            )

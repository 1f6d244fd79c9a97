"""From a question to the tokens the policy reads: template, chat template, and the two limits on their number."""

from dataclasses import dataclass, field
from typing import Any

from configs.errors import ConfigError
from configs.schema import DataConfig
from rl.quarantine import BadRowError
from rollout.types import Prompt

# tokens a tokenizer may add where the question meets the chat template, such as a leading space
BOUNDARY_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and what its reward needs, before tokenisation. Fields as in Prompt."""

    id: str
    question: str
    answer: str
    task: dict[str, Any] = field(default_factory=dict)


class Template:
    """Renders problems for one tokenizer; a tokenizer without a chat template reads them as plain text."""

    def __init__(self, config: DataConfig, tokenizer: Any, *, context_length: int, max_new_tokens: int) -> None:
        """Raises ConfigError when no prompt could ever fit, or the chat template refuses the messages."""
        if "{question}" not in config.template:
            raise ConfigError(f"data.template={config.template!r} has no {{question}}; say where the question goes")
        if max_new_tokens >= context_length:
            raise ConfigError(
                f"rollout.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{context_length} tokens; lower it"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._max_new_tokens = max_new_tokens
        self._limit = min(config.max_prompt_tokens, context_length - max_new_tokens)
        self._frame_tokens = len(self._checked_token_ids("")) + BOUNDARY_TOKENS

    def token_ids(self, question: str) -> list[int]:
        """The prompt's tokens, generation prompt included."""
        # replace, not str.format: questions contain braces
        text = self._config.template.replace("{question}", question)
        system = self._config.system
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(f"{system}\n\n{text}" if system else text).input_ids)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def prompt(self, problem: Problem) -> Prompt:
        """The problem, tokenised. Raises BadRowError when it is too long."""
        token_ids = self.token_ids(problem.question)
        if len(token_ids) > self._limit:
            raise BadRowError(self._too_long(len(token_ids)))
        task = {"question": problem.question, **problem.task}
        return Prompt(id=problem.id, token_ids=token_ids, answer=problem.answer, task=task)

    def check_length(self, question: str) -> None:
        """Raises BadRowError when the question is too long; tokenises only where that is in doubt."""
        # every token of a byte-level or byte-fallback vocabulary covers a byte at least
        if self._frame_tokens + len(question.encode()) <= self._limit:
            return
        num_tokens = len(self.token_ids(question))
        if num_tokens > self._limit:
            raise BadRowError(self._too_long(num_tokens))

    def _checked_token_ids(self, question: str) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.token_ids(question)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses data.system and data.template: {error}") from error

    def _too_long(self, num_tokens: int) -> str:
        config = self._config
        if self._limit == config.max_prompt_tokens:
            return f"prompt of {num_tokens} tokens exceeds data.max_prompt_tokens={config.max_prompt_tokens}; raise it"
        return (
            f"prompt of {num_tokens} tokens exceeds the {self._limit} that rollout.max_new_tokens="
            f"{self._max_new_tokens} leaves of the model's context of {self._context_length}; lower it"
        )

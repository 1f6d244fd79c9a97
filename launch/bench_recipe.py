"""What a benchmark of runs is told to run: a recipe, its keys, and a known geometry in place of its model's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from configs.load import load
from configs.schema import Config
from launch.geometry import geometry, random_policy
from rollout.pretrained import load_tokenizer, resolve


@dataclass(frozen=True, slots=True)
class Asked:
    """A recipe as it was asked for. shape: a geometry, whose random weights go under the recipe's own tokenizer."""

    recipe: str
    shape: str | None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        stem = Path(self.recipe).stem
        return f"{stem}@{self.shape}" if self.shape else stem

    def config(self, fixed: Sequence[str]) -> Config:
        """Its configuration, with keys that the benchmark sets itself. Raises ConfigError."""
        return load(Path(self.recipe), [*self.overrides, *fixed])


def asked(words: Sequence[str]) -> list[Asked]:
    """RECIPE[@GEOMETRY] [a.b=c ...], as often as there are recipes: keys belong to the recipe before them.

    Raises ConfigError.
    """
    found: list[Asked] = []
    for word in words:
        if "=" in word.partition("@")[0]:
            if not found:
                raise ConfigError(f"{word} stands before any recipe; give the recipe first, as in smollm2_gpu {word}")
            last = found[-1]
            found[-1] = Asked(last.recipe, last.shape, (*last.overrides, word))
            continue
        recipe, _, shape = word.partition("@")
        if shape:
            geometry(shape, asked=word)
        found.append(Asked(recipe, shape or None))
    if not found:
        raise ConfigError("no recipe is named; give one, as in smollm2_gpu")
    return found


def random_folder(model: str, shape: str, folder: Path, *, device: str, dtype: str, seed: int) -> Path:
    """A model folder with random weights of a known shape, under the given model's tokenizer.

    Raises ConfigError where the tokenizer has more tokens than the shape.
    """
    source = resolve(model)
    tokenizer = load_tokenizer(source)
    vocab_size = geometry(shape).get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ConfigError(f"@{shape} has {vocab_size} tokens, the tokenizer of {model} {len(tokenizer)}; name another")
    policy = random_policy(shape, device=device, dtype=dtype, seed=seed)
    # a model of random weights ends its answers by chance; where the tokenizer says
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.config.bos_token_id = policy.generation_config.bos_token_id = tokenizer.bos_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Natural text for measurements that random tokens would falsify: what attention reads depends on what is said."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, DataError

PYTHON_TOPICS = "the documentation of Python's topics"


def natural_tokens(tokenizer: Any, path: Path | None) -> tuple[str, list[int]]:
    """The name and the tokens of a file's text; of Python's own documentation, which every machine has, without one.

    Raises DataError for a file that cannot be read.
    """
    if path is None:
        from pydoc_data import topics

        name, text = PYTHON_TOPICS, "\n\n".join(topics.topics.values())
    else:
        name, text = str(path), read_text(path)
    return name, tokens_of(tokenizer, text)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without any that begin or end one."""
    # said once for all of it: that it is longer than the model's context is meant
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return token_ids


def read_text(path: Path) -> str:
    """The text of --text. Raises DataError for a file that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path} cannot be read as UTF-8 ({error}); give another file") from error


def whole_pieces(tokens: Sequence[int], length: int) -> list[list[int]]:
    """One after the other, from the beginning; what is left over at the end is left out."""
    return [list(tokens[begin : begin + length]) for begin in range(0, len(tokens) - length + 1, length)]


def last_pieces(name: str, tokens: list[int], count: int, length: int) -> list[list[int]]:
    """So many pieces from the text's end, which whoever learns from its beginning has not seen. Raises ConfigError."""
    if count * length > len(tokens):
        raise ConfigError(
            f"{count} texts of {length} tokens are {count * length}, and {name} has {len(tokens)}; ask for fewer or "
            "shorter ones, or give a longer --text FILE"
        )
    begin = len(tokens) - count * length
    return [tokens[at : at + length] for at in range(begin, len(tokens), length)]


def overlapping_pieces(name: str, tokens: list[int], count: int, length: int) -> list[list[int]]:
    """So many pieces that begin at places evenly apart, and so differ from their first token on. Raises ConfigError."""
    apart = (len(tokens) - length) // max(1, count - 1)
    if apart < min(1, count - 1):
        raise ConfigError(
            f"{count} texts of {length} tokens cannot differ in {name}, which has {len(tokens)}; ask for shorter ones, "
            "or give a longer --text FILE"
        )
    return [tokens[number * apart : number * apart + length] for number in range(count)]

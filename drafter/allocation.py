"""What is said where the drafter's memory is not to be had."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.errors import ResourceError


@contextmanager
def allocating(what: str, num_bytes: int, remedy: str) -> Iterator[None]:
    """So many bytes are allocated inside. Raises ResourceError, which tells what for and the remedy, where they are
    not to be had."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"no memory for {what} ({num_bytes / 1e9:.2f} GB); {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises for a GPU's memory, or for a CPU's, whose error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )

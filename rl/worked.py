"""Worked solutions to reasoning-gym tasks, for the warm start: each takes a Prompt and gives a full response."""

from rollout.types import Prompt


def chain_sum(prompt: Prompt) -> str:
    """A chain of additions and subtractions, one a line, each line going on from the result before.

    "98 + 93 - 77" becomes "98 + 93 = 191" and "191 - 77 = 114". The answer is the last number.
    """
    first, *rest = prompt.task["metadata"]["expression"].split()
    total = int(first)
    if not rest:
        return first
    lines = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{before} {operator} {term} = {total}")
    return "\n".join(lines)


def running_sum(prompt: Prompt) -> str:
    """The terms added one a line, each line under its term's number; the answer ends the last line.

    47, 12 and 30 become "1: 47", "2: 47 + 12 = 59" and "3: 59 + 30 = 89".
    """
    first, *rest = prompt.task["metadata"]["terms"]
    lines, total = [f"1: {first}"], first
    for number, term in enumerate(rest, 2):
        before, total = total, total + term
        lines.append(f"{number}: {before} + {term} = {total}")
    return "\n".join(lines)

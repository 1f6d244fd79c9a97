"""What sparse attention is in each layer: the section sparse, and the ranges in which sparse.layers changes it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import inf

from configs.errors import ConfigError
from configs.schema import SparseConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds where layers attend sparsely, and the keys that say who selects, and how much is read.

    name: of the range in sparse.layers; "" is all layers that no range names.
    """

    name: str
    sparse: SparseConfig
    selector_key: str
    budget_key: str


def settings(sparse: SparseConfig) -> Iterator[Setting]:
    """All that is set for layers that are not dense: first for those that no range names, where there may be any."""
    ranges = list(_ranges(sparse))
    if not ranges or not _name_all(sparse):
        yield Setting("", sparse, "sparse.selector", "sparse.budget_tokens")
    yield from ranges


def _ranges(sparse: SparseConfig) -> Iterator[Setting]:
    """What is set for the ranges that are not dense."""
    for name, layers in sparse.layers.items():
        if layers.selector == "dense" or span_of(name) is None:
            continue
        selector = sparse.selector if layers.selector == "default" else layers.selector
        yield Setting(
            name,
            replace(sparse, selector=selector, budget_tokens=layers.budget_tokens or sparse.budget_tokens),
            "sparse.selector" if layers.selector == "default" else f"sparse.layers.{name}.selector",
            f"sparse.layers.{name}.budget_tokens" if layers.budget_tokens else "sparse.budget_tokens",
        )


def by_layer(sparse: SparseConfig, num_layers: int) -> list[Setting | None]:
    """What holds in each of a policy's layers; None: it attends to everything.

    Raises ConfigError for layers that the policy does not have.
    """
    if sparse.dense_layers > num_layers:
        raise ConfigError(f"sparse.dense_layers={sparse.dense_layers}: the policy has {num_layers} layers; set fewer")
    found = {setting.name: setting for setting in settings(sparse)}
    of_layers = [None] * sparse.dense_layers + [found.get("")] * (num_layers - sparse.dense_layers)
    for name in sparse.layers:
        span = span_of(name)
        assert span is not None, f"{name!r} names no layers"
        first, last = span
        if max(first, last or 0) >= num_layers:
            raise ConfigError(f"sparse.layers.{name}: the policy's layers are 0 to {num_layers - 1}; name those alone")
        for layer in range(first, num_layers if last is None else last + 1):
            of_layers[layer] = found.get(name)
    return of_layers


def runs(sparse: SparseConfig, num_layers: int) -> list[tuple[range, SparseConfig]]:
    """Neighbouring layers that attend sparsely in the same way. Raises ConfigError, as by_layer."""
    numbered = enumerate(by_layer(sparse, num_layers))
    found = []
    for alike, run in groupby(numbered, key=lambda each: each[1] and each[1].sparse):
        layers = [layer for layer, _ in run]
        if alike is not None:
            found.append((range(layers[0], layers[-1] + 1), alike))
    return found


def span_of(name: str) -> tuple[int, int | None] | None:
    """The first and last layer of a range, None as the last where it is the policy's; None where it names none."""
    found = re.fullmatch(r"(\d+)(?:(-)(\d*))?", name)
    if found is None:
        return None
    first = int(found[1])
    if not found[2]:
        return first, first
    if not found[3]:
        return first, None
    return (first, int(found[3])) if first <= int(found[3]) else None


def _name_all(sparse: SparseConfig) -> bool:
    """Whether the ranges leave no layer to what the section has, whatever the policy: the last of them is open."""
    begin = sparse.dense_layers
    for first, last in sorted(filter(None, map(span_of, sparse.layers)), key=lambda span: span[0]):
        if last is None or first > begin:
            return first <= begin
        begin = last + 1
    return False


def layer_problems(sparse: SparseConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with the ranges, whatever the policy: keys and remedies."""
    spans: list[tuple[int, float, str]] = []
    for name, layers in sparse.layers.items():
        span = span_of(name)
        if span is None:
            yield "sparse.layers", f"{name!r} names no layers; write 4, or 2-9, or 10- for all from 10 on"
            continue
        first, last = span
        spans.append((first, inf if last is None else last, name))
        if first < (count := sparse.dense_layers):
            yield (
                f"sparse.layers.{name}",
                f"layer {first} is dense by sparse.dense_layers={count}; set that to {first}, or begin at {count}",
            )
        if layers.budget_tokens < 0:
            yield f"sparse.layers.{name}.budget_tokens", "must be at least 1, or 0 for sparse.budget_tokens"
        if layers.budget_tokens and layers.selector == "dense":
            yield f"sparse.layers.{name}.budget_tokens", "dense layers read everything; set 0, or another selector"
    for (_, end, name), (begin, _, other) in pairwise(sorted(spans)):
        if begin <= end:
            yield f"sparse.layers.{other}", f"layer {begin} is in {name} too; take it out of one"

"""YAML that a person can read and put under version control."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]


class _Dumper(yaml.SafeDumper):
    """Text of several lines in block style; nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def documents(*parts: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """The parts as one YAML file, comments first."""
    head = "".join(f"# {line}\n" for line in comments)
    body: str = yaml.dump_all(parts, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return head + body

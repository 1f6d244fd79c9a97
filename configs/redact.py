"""Secrets taken out of what a run writes and of what is sent to others to read.

A secret is known by what it is called (hf_token: ..., API_KEY=...), by where it stands (a URL's user and password), by
its shape (hf_..., AKIA...), or because a variable of this process's environment that is called like one holds it.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 6  # characters of an environment's secret: shorter ones, as "none", are words

# A name that ends like this. A tokenizer's special tokens are no secrets.
_SPECIAL = "".join(rf"(?<!{name}_)" for name in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "image"))
_ENDS = (
    rf"[\w.-]*?(?:{_SPECIAL}token|secret|passw(?:or)?d|(?<=_)(?:pwd|pass)|passphrase|credentials?|authorization|cookie"
    r"|signature|(?:api|access|private|signing|secret)[_-]?key)"
)
_CALLED = rf"(?<![\w.-]){_ENDS}"
_NAME = re.compile(rf"(?i)^{_CALLED}$")
# A line of YAML: the value is what follows on it.
_LINE = re.compile(rf"(?im)^([ \t]*(?:-[ \t]+)?{_CALLED}[ \t]*:[ \t]+)(?![\s\"'|>&*!\[{{])(\S.*)$")
# Else after the name "=" or ":" and a value in quotes, or up to a space or what ends a value in JSON, YAML and URLs.
_ASSIGNED = re.compile(
    rf"""(?i)({_CALLED}\\?["']?\s*[=:]\s*(?:(?:bearer|basic)\s+)?)"""
    r"""("(?:\\.|[^"\\\n])*"|'[^'\n]*'|\\"[^"\\\n]*\\"|(?![\s"'\\])(?:[^\s"'\\,;&}\])]|(?<=\S)[,;](?=\S))+)"""
)
# An option of a command and, after a space, its value.
_OPTION = re.compile(rf"(?i)((?<!\S)--{_ENDS}[ \t]+)([^\s\"'-][^\s\"']*)")
_PLAIN = re.compile(r"""(?i)["'\\]*(?:null|none|true|false|\*+|[\d.]{0,5})["'\\]*""")  # values that hide nothing
_IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@\"'?#]+@")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|nvapi-[\w-]{16,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----"
)


def redact(text: str) -> str:
    """The text with every secret in it replaced by ***."""
    for secret in _environment():
        text = text.replace(secret, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _SHAPES.sub(HIDDEN, text)
    return _OPTION.sub(_hide, _ASSIGNED.sub(_hide, _LINE.sub(_hide, text)))


def redacted(value: Any) -> Any:
    """The value, of JSON's types, with every secret in its strings, or called like one, replaced by ***."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: HIDDEN if is_secret(str(key), item) else redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def is_secret(name: str, value: Any) -> bool:
    """Whether a string is called like a secret."""
    return isinstance(value, str) and bool(_NAME.match(name)) and not _PLAIN.fullmatch(value)


def holds_secret(text: str) -> bool:
    """Whether a text has the shape of a secret, or a URL with a password in it."""
    return bool(_SHAPES.search(text) or _IN_URL.search(text))


def _hide(found: re.Match[str]) -> str:
    name, value = found.groups()
    if _PLAIN.fullmatch(value):
        return found[0]
    quote = next((quote for quote in ('\\"', '"', "'") if value.startswith(quote)), "")
    return f"{name}{quote}{HIDDEN}{quote}"


def _environment() -> list[str]:
    """Values of environment variables that are called like secrets, as they are and as JSON writes them."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _NAME.match(name)}
    values |= {json.dumps(value)[1:-1] for value in values}
    return sorted(values, key=len, reverse=True)

"""JSON values that remember the Python types JSON lacks, so that a record can cross processes and come back equal."""

import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

Plain = None | bool | int | float | str | list[Any] | dict[str, Any]


def to_plain(value: Any) -> Plain:
    """The value as JSON: a type JSON lacks becomes an object with one key, such as {"$tuple": [1, 2]}.

    Knows tuples, sets, bytes, Decimal, Fraction, numpy scalars and dictionaries with any keys. Raises TypeError for
    the rest.
    """
    match value:
        case None | bool():
            return value
        case int() | float() | str():
            # a subclass (numpy's str_ and float64, an IntEnum) prints as JSON only by luck
            return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))
        case list():
            return [to_plain(item) for item in value]
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {str(key): to_plain(item) for key, item in value.items()}
            return {"$dict": [[to_plain(key), to_plain(item)] for key, item in value.items()]}
        case tuple():
            return {"$tuple": [to_plain(item) for item in value]}
        case set() | frozenset():
            # sorted: equal sets give equal text whatever the hash seed
            tag = "$set" if isinstance(value, set) else "$frozenset"
            return {tag: sorted((to_plain(item) for item in value), key=repr)}
        case Decimal():
            return {"$decimal": str(value)}
        case Fraction():
            return {"$fraction": str(value)}
        case bytes():
            return {"$bytes": value.decode("latin-1")}
    numpy = sys.modules.get("numpy")  # not imported for its sake: nothing of numpy's exists before it is
    if numpy is not None and isinstance(value, numpy.generic):
        return to_plain(value.item())
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def from_plain(value: Plain) -> Any:
    """What to_plain was given; numpy scalars come back as Python's."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$dict": items}:
            return {from_plain(key): from_plain(item) for key, item in items}
        case {"$tuple": items}:
            return tuple(from_plain(item) for item in items)
        case {"$set": items}:
            return {from_plain(item) for item in items}
        case {"$frozenset": items}:
            return frozenset(from_plain(item) for item in items)
        case {"$decimal": text}:
            return Decimal(text)
        case {"$bytes": text}:
            return text.encode("latin-1")
        case {"$fraction": text}:
            return Fraction(text)
    return {key: from_plain(item) for key, item in value.items()}

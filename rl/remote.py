"""Tests call a program across a socket: they run in one process, the program in another, and only values pass.

So a program can neither see what its tests expect nor touch how they judge it; to pass them it must return what they
want. What passes by value is what rl.plain knows; another object stays with the program, and the tests hold a Remote.
Standard library only: the cell reads it too.
"""

import ast
import builtins
import contextlib
import importlib
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

from rl.frames import FrameError, receive, send
from rl.plain import from_plain, to_plain

MAX_REPLY_BYTES = 64 << 20


class ProgramEndedError(BaseException):
    """The program's process is gone; no test can go on."""


class TestError(Exception):
    """A test asks for what cannot be: whoever wrote the tests must mend them."""

    __test__ = False  # pytest collects nothing here


class Remote:
    """An object of the program. Called, read, iterated and indexed there; never equal to anything but itself."""

    def __init__(self, caller: "Caller", number: int) -> None:
        self.__dict__["_caller"], self.__dict__["_number"] = caller, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller.call(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._caller.ask({"get": self._number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        self._caller.ask({"set": self._number, "name": name, "value": self._caller.pack(value)})

    def __iter__(self) -> Iterator[Any]:
        return iter(self._caller.ask({"iterate": self._number}))

    def __bool__(self) -> bool:
        return bool(self._caller.ask({"truth": self._number}))

    def __next__(self) -> Any:
        return self._caller.ask({"next": self._number})

    def __len__(self) -> int:
        try:
            return int(self.__getattr__("__len__")())
        except AttributeError as error:
            raise TypeError(str(error)) from error  # which list() knows to mean a length unknown

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__getattr__("__setitem__")(key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(self.__getattr__("__contains__")(item))

    def __str__(self) -> str:
        return str(self.__getattr__("__str__")())

    def __repr__(self) -> str:
        return str(self.__getattr__("__repr__")())


class Caller:
    """The tests' end of the socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._told = False  # anything by the program but which names are its functions

    def find(self, name: str) -> Any:
        """What the program calls by this name. A module is imported here instead. Raises NameError."""
        found = self.ask({"find": name})
        if isinstance(found, types.SimpleNamespace):
            try:
                return importlib.import_module(found.module)
            except ImportError:
                raise NameError(f"name {name!r} is not defined") from None
        return found

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an object. Lists, dictionaries and sets that it changes are changed here as well."""
        given = [self.pack(value) for value in args]
        named = {name: self.pack(value) for name, value in kwargs.items()}
        changed: dict[str, Any] = {}
        result = self.ask({"call": number, "args": given, "kwargs": named}, changed)
        for index, value in changed.items():
            _refill(args[int(index)], value)
        return result

    def ask(self, request: dict[str, Any], changed: dict[str, Any] | None = None) -> Any:
        """One exchange. Raises what the program raised, as the builtin error it derives from."""
        try:
            send(self._channel, request)
            reply = receive(self._channel, limit_bytes=MAX_REPLY_BYTES)
        except (OSError, FrameError) as error:
            raise ProgramEndedError from error
        if not isinstance(reply, dict):
            raise ProgramEndedError
        self._told |= "find" not in request or reply.keys().isdisjoint(("object", "error"))
        if "error" in reply:
            raise _error(str(reply["error"]), "next" in request)(str(reply.get("text")))
        try:
            if changed is not None:
                changed.update({index: from_plain(item) for index, item in reply.get("changed", {}).items()})
            return self._read(reply)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ProgramEndedError from error  # no honest program writes such a reply

    def _read(self, reply: dict[str, Any]) -> Any:
        match reply:
            case {"value": value}:
                return from_plain(value)
            case {"object": int(number)}:
                return Remote(self, number)
            case {"objects": [*items]}:
                return [self._read(item) for item in items]
            case {"module": str(name)}:
                return types.SimpleNamespace(module=name)
        raise ValueError("no such reply")

    def pack(self, value: Any) -> Any:
        """An argument as JSON. Raises TestError for what cannot be sent, TypeError if the program caused that."""
        if isinstance(value, Remote):
            return {"object": value._number}
        try:
            return {"value": to_plain(value)}
        except TypeError as error:
            text = f"a test passes the program a {type(value).__name__}; only plain values can be sent"
            # a test computes with what it is told: no program may make it look like a bad one, which ends the run
            raise TypeError(text) if self._told else TestError(text) from error


def answer(channel: socket.socket, namespace: dict[str, Any]) -> None:
    """The program's end: do what the tests ask, until they are through."""
    sys.set_int_max_str_digits(0)  # of JSON's numbers too
    objects: list[Any] = []

    def unpack(packed: dict[str, Any]) -> Any:
        return objects[packed["object"]] if "object" in packed else from_plain(packed["value"])

    def pack(value: Any) -> dict[str, Any]:
        try:
            return {"value": to_plain(value)}
        except TypeError:
            objects.append(value)
            return {"object": len(objects) - 1}

    def serve(request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"find": name}:
                if name not in namespace:
                    raise NameError(f"name {name!r} is not defined")
                if isinstance(namespace[name], types.ModuleType):
                    return {"module": namespace[name].__name__}
                return pack(namespace[name])
            case {"get": number, "name": name}:
                return pack(getattr(objects[number], name))
            case {"set": number, "name": name, "value": value}:
                setattr(objects[number], name, unpack(value))
                return {"value": None}
            case {"next": number}:
                return pack(next(objects[number]))
            case {"truth": number}:
                return {"value": bool(objects[number])}
            case {"iterate": number}:
                return {"objects": [pack(item) for item in objects[number]]}
            case {"call": number, "args": args, "kwargs": kwargs}:
                values = [unpack(value) for value in args]
                result = pack(objects[number](*values, **{name: unpack(value) for name, value in kwargs.items()}))
                containers = (list, dict, set)
                after = {str(i): pack(value) for i, value in enumerate(values) if type(value) in containers}
                changed = {i: new["value"] for i, new in after.items() if "value" in new and new != args[int(i)]}
                return result | {"changed": changed}
        raise ValueError("no such request")

    while (request := receive(channel)) is not None:
        try:
            reply = serve(request)
        # whatever the program raises is for the tests to judge
        except BaseException as error:
            known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = {"error": known[0], "text": str(error)[:500]}
        send(channel, reply)


def _error(name: str, is_next: bool) -> type[Exception]:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError
    # raised inside a test's map() it would end the test's loop, as if all that is left had passed
    return RuntimeError if issubclass(kind, StopIteration | StopAsyncIteration) and not is_next else kind


def _refill(container: Any, value: Any) -> None:
    match container:
        case list() if isinstance(value, list):
            container[:] = value
        case dict() | set() if isinstance(value, dict | set):
            container.clear()
            container.update(value)


def judge(tests: list[str], channel: socket.socket) -> Iterator[bool]:
    """Run each test, all in one namespace, against the program; whether it passed. Raises TestError for a bad one."""
    sys.set_int_max_str_digits(0)
    caller = Caller(channel)
    namespace: dict[str, Any] = {"__name__": "tests"}
    codes = []
    names: set[str] = set()
    for number, test in enumerate(tests, start=1):
        try:
            tree = ast.parse(test)
            codes.append(compile(tree, f"<test {number}>", "exec"))
        except (SyntaxError, ValueError, RecursionError) as error:
            raise TestError(f"test {number} is no Python: {error}") from error
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    try:
        # builtins stay ours, whatever the program calls by their names
        for name in sorted(names - set(dir(builtins))):
            with contextlib.suppress(NameError):
                namespace[name] = caller.find(name)
        for code in codes:
            try:
                exec(code, namespace)
            except TestError:
                raise
            # a failed assertion, or what the program raised
            except Exception:
                yield False
            else:
                yield True
    except ProgramEndedError:
        return

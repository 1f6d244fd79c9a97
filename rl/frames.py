"""Messages on a stream socket: a 4-byte big-endian length, then JSON."""

import json
import socket
import struct
from typing import Any


class FrameError(ValueError):
    """The other side sent what is no message."""


def send(channel: socket.socket, message: Any) -> None:
    """Send one message. Raises OSError where nobody reads."""
    data = json.dumps(message).encode()
    channel.sendall(struct.pack(">I", len(data)) + data)


def receive(channel: socket.socket, *, limit_bytes: int = 2**32) -> Any:
    """The next message; None at the end of the stream. Raises FrameError for one that is too long or no JSON."""
    header = channel.recv(4, socket.MSG_WAITALL)
    if len(header) < 4:
        return None
    (length,) = struct.unpack(">I", header)
    if length > limit_bytes:
        raise FrameError(f"a message of {length} bytes exceeds {limit_bytes}")
    data = channel.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"no JSON: {error}") from error

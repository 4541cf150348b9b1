"""JSON messages over a socket, each with its length before it."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 64 << 20
_LENGTH = struct.Struct("!Q")


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a JSON object."""
    send_text(connection, json.dumps(message))


def send_text(connection: socket.socket, text: str) -> None:
    """Send a JSON object that is written already."""
    data = text.encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, most: int | None = None) -> dict[str, Any] | None:
    """Receive a JSON object.

    Args:
        connection: the socket.
        most: bytes beyond which a message of somebody not to be trusted is refused.

    Returns:
        The object, or None when the other side is gone.

    Raises:
        ValueError: the message is too long or not a JSON object.
    """
    head = _read(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if most is not None and length > most:
        raise ValueError(f"a message of {length} bytes is too long")
    data = _read(connection, length)
    if data is None:
        return None
    try:
        message = json.loads(data)
    except RecursionError as error:
        raise ValueError("a message is nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a message is not a JSON object")
    return message


def _read(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            part = connection.recv(min(count - len(data), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)

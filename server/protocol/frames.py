"""Messages as frames on the socket between the two processes: 4 bytes of length, little-endian, then msgpack.

One nameless socket pair per engine process: no file is left behind whatever happens, the death of either side ends the
other's reading at once, and nothing that one engine process said can reach its successor.
"""

import contextlib
import socket
import struct

import msgspec

from server.protocol.messages import ToEngine

BUFFER_BYTES = 4 << 20
LENGTH = struct.Struct("<I")


class End(msgspec.Struct, tag=True, frozen=True):
    """To the engine: end all sequences with "shutdown", say so, exit.

    A message and not a signal, for a signal may come to both processes from a terminal or a service manager, while the
    API process still wants live work to finish.
    """


Heard = ToEngine | End


def encode_frame(message: msgspec.Struct, *, encoder: msgspec.msgpack.Encoder) -> bytearray:
    """The bytes that carry a message."""
    data = bytearray(LENGTH.size)
    encoder.encode_into(message, data, LENGTH.size)
    LENGTH.pack_into(data, 0, len(data) - LENGTH.size)
    return data


class Frames:
    """Cuts what a stream socket delivers, in pieces of any size, back into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytearray]:
        """The frames that these bytes complete."""
        buffer = self._buffer
        buffer += data
        frames, start = [], 0
        while len(buffer) >= start + LENGTH.size:
            body = start + LENGTH.size
            stop = body + LENGTH.unpack_from(buffer, start)[0]
            if stop > len(buffer):
                break
            frames.append(buffer[body:stop])
            start = stop
        del buffer[:start]
        return frames


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets with room for some large messages; no other process inherits them by itself."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):  # the system allows less; the pipe is only slower then
                end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    return pair

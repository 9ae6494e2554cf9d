"""Frames on the socket between the API process and the engine process: 4 bytes of length, little-endian, then msgpack.

Each engine process has its own unnamed socket pair. So a crash leaves no file behind, the death of either process ends
the other's reading at once, and no message of an engine process can reach its successor.
"""

import contextlib
import socket
import struct

import msgspec

from server.protocol.messages import ToEngine

BUFFER_BYTES = 4 << 20
LENGTH = struct.Struct("<I")


class End(msgspec.Struct, tag=True, frozen=True):
    """To the engine: end all sequences with "shutdown", report their endings and exit.

    It is a message because a terminal or a service manager may send a signal to both processes, while the API process
    still waits for live work to finish.
    """


Heard = ToEngine | End


def encode_frame(message: msgspec.Struct, *, encoder: msgspec.msgpack.Encoder) -> bytearray:
    """Return the frame of a message."""
    data = bytearray(LENGTH.size)
    encoder.encode_into(message, data, LENGTH.size)
    LENGTH.pack_into(data, 0, len(data) - LENGTH.size)
    return data


class Frames:
    """Splitter of the bytes of a stream socket, in pieces of any size, into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytearray]:
        """Add bytes and return the bodies of the frames that they complete."""
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
    """Return two connected sockets with buffers for several large messages. Child processes do not inherit them."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):  # the system allows less, which only makes the pipe slower
                end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    return pair

"""Messages as frames on the socket between the two processes: 4 bytes of length, little-endian, then msgpack.

One nameless socket pair per engine process: no file is left behind whatever happens, the death of either side ends the
other's reading at once, and nothing that one engine process said can reach its successor.
"""

import contextlib
import logging
import os
import queue
import socket
import struct
import threading

import msgspec

from server.messages import FromEngine, ToEngine

BUFFER_BYTES = 4 << 20
_LENGTH = struct.Struct("<I")

log = logging.getLogger(__name__)


class End(msgspec.Struct, tag=True, frozen=True):
    """To the engine: end all sequences with "shutdown", say so, exit.

    A message and not a signal, for a signal may come to both processes from a terminal or a service manager, while the
    API process still wants live work to finish.
    """


Heard = ToEngine | End


def frame(message: msgspec.Struct, *, encoder: msgspec.msgpack.Encoder) -> bytearray:
    """The bytes that carry a message."""
    data = bytearray(_LENGTH.size)
    encoder.encode_into(message, data, _LENGTH.size)
    _LENGTH.pack_into(data, 0, len(data) - _LENGTH.size)
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
        while len(buffer) >= start + _LENGTH.size:
            body = start + _LENGTH.size
            stop = body + _LENGTH.unpack_from(buffer, start)[0]
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


class EngineEnd:
    """The engine's end. A thread of its own listens, so that neither loading nor a step that hangs is in its way.

    When the API process is gone, however it went, it ends this process at once.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self, wait_s: float) -> list[Heard]:
        """All that has come; where that is nothing, wait so long for something."""
        messages: list[Heard] = []
        if wait_s > 0:
            try:
                messages.append(self._heard.get(timeout=wait_s))
            except queue.Empty:
                return messages
        while not self._heard.empty():
            messages.append(self._heard.get_nowait())
        return messages

    def send(self, message: FromEngine) -> None:
        """Say something. Waits where the API process is behind, which always reads on."""
        try:
            self._socket.sendall(frame(message, encoder=self._encoder))
        except OSError:
            os._exit(1)

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Heard)
        try:
            with self._socket.makefile("rb", buffering=1 << 16) as stream:
                while len(length := stream.read(_LENGTH.size)) == _LENGTH.size:
                    self._heard.put(decoder.decode(stream.read(_LENGTH.unpack(length)[0])))
        except OSError:  # how the end looks where something was left unread
            pass
        except Exception:  # an engine that is deaf must not live on
            log.exception("a message cannot be read")
        os._exit(1)

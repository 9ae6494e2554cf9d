"""The engine's end of the pipe: a thread receives messages, the engine's loop takes them."""

import logging
import os
import queue
import socket
import threading

import msgspec

from server.protocol.frames import LENGTH, Heard, encode_frame
from server.protocol.messages import FromEngine

log = logging.getLogger(__name__)


class EngineEnd:
    """The engine's end of the pipe. Its own thread receives, so neither loading nor a hanging step delays it.

    If the API process is gone for any reason, it ends this process at once.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self, wait_s: float) -> list[Heard]:
        """Return all messages that have come; wait up to `wait_s` seconds for the first."""
        messages: list[Heard] = []
        if wait_s > 0:
            try:
                messages.append(self._received.get(timeout=wait_s))
            except queue.Empty:
                return messages
        while not self._received.empty():
            messages.append(self._received.get_nowait())
        return messages

    def send(self, message: FromEngine) -> None:
        """Send a message. Blocks while the pipe is full; the API process always continues to read."""
        try:
            self._socket.sendall(encode_frame(message, encoder=self._encoder))
        except OSError:
            os._exit(1)

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Heard)
        try:
            with self._socket.makefile("rb", buffering=1 << 16) as stream:
                while len(length := stream.read(LENGTH.size)) == LENGTH.size:
                    self._received.put(decoder.decode(stream.read(LENGTH.unpack(length)[0])))
        except OSError:  # the API process died with unread messages
            pass
        except Exception:  # an engine that cannot receive messages must not live on
            log.exception("a message cannot be read")
        os._exit(1)

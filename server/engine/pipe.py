"""The engine's end of the pipe: a thread hears messages, the loop takes them."""

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
            self._socket.sendall(encode_frame(message, encoder=self._encoder))
        except OSError:
            os._exit(1)

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Heard)
        try:
            with self._socket.makefile("rb", buffering=1 << 16) as stream:
                while len(length := stream.read(LENGTH.size)) == LENGTH.size:
                    self._heard.put(decoder.decode(stream.read(LENGTH.unpack(length)[0])))
        except OSError:  # how the end looks where something was left unread
            pass
        except Exception:  # an engine that is deaf must not live on
            log.exception("a message cannot be read")
        os._exit(1)

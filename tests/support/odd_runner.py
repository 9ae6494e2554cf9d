"""Fake runners that fail, hang or send much, above all when they start. Their bundle is a folder."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from server.config import EngineOptions
from server.engine.sequence import Chunk, ChunkResult
from tests.support.fake_runner import FakeRunner

SHARES_PER_TOKEN = 1_000_000


def refuse(_options: EngineOptions) -> FakeRunner:
    raise RuntimeError("no such device")


def hang(_options: EngineOptions) -> FakeRunner:
    time.sleep(3600)
    raise AssertionError


def only_once(options: EngineOptions) -> FakeRunner:
    if _count_starts(options.bundle) > 1:
        os._exit(7)
    return FakeRunner(options.num_rows)


def hang_the_second_time(options: EngineOptions) -> FakeRunner:
    if _count_starts(options.bundle) == 2:
        time.sleep(3600)
    return FakeRunner(options.num_rows)


def _count_starts(marks: Path) -> int:
    """Return the number of starts so far, with the present start."""
    (marks / str(os.getpid())).touch()
    return len(list(marks.iterdir()))


class TalkativeRunner(FakeRunner):
    """A runner that returns four megabytes for each scored token."""

    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        return [self._with_shares(result) for result in super().extend(chunks)]

    def _with_shares(self, result: ChunkResult) -> ChunkResult:
        if result.scores is None:
            return result
        shares = np.ones((len(result.scores.ranks), SHARES_PER_TOKEN), np.float32)
        return dataclasses.replace(result, scores=dataclasses.replace(result.scores, memory_shares=shares))

"""Runs a model and its rings for the engine. Only this file and drawer.py use torch in the server."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.frozen.loading import load_model
from model.frozen.served import ServedLM, score_positions
from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.drawer import Drawer, DrawsInside
from server.engine.sequence import Chunk, ChunkResult, ChunkScores, Draw, Drawn
from server.protocol.messages import EngineFacts


class ModelRunner:
    """A model and the rings of its rows. A decode step computes the rows from 0 to the highest row in use."""

    def __init__(self, model: ServedLM, options: EngineOptions) -> None:
        self.num_rows = options.num_rows
        self.model = model
        self._chunk_tokens = options.chunk_tokens
        self._batch_invariant = options.batch_invariant
        self._min_rows = model.invariant_rows if options.batch_invariant else 1
        self._reads_together = True
        self.cache = model.allocate(max(self.num_rows, self._min_rows))
        self._drawer = Drawer(model, num_rows=max(self.num_rows, self._min_rows))
        self.history = self._drawer.history

    @classmethod
    def load(cls, options: EngineOptions) -> Self:
        """Return a runner of the bundle or artefact that the options name.

        Raises:
            BundleError: the bundle or artefact is not whole, or cannot be run as asked.
            ValueError: the options ask for CUDA, and there is none.
        """
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        return cls(load_model(options.bundle, options), options)

    def reset(self, row: int) -> None:
        """Begin a new stream in a row."""
        self.cache.reset(row)
        self.history.reset(row)

    def move(self, source: int, target: int) -> None:
        """Copy the whole state of the row `source` to the row `target`."""
        self.cache.move(source, target)
        self.history.move(source, target)

    def snapshot(self, row: int) -> object:
        """Return a copy of a row's whole state."""
        return self.cache.snapshot(row), self.history.snapshot(row)

    def restore(self, row: int, snapshot: object) -> None:
        """Begin a stream in a row, from the state of a snapshot."""
        assert isinstance(snapshot, tuple)
        rings, history = snapshot
        self.cache.restore(row, rings)
        self.history.restore(row, history)

    @torch.inference_mode()
    def check(self) -> None:
        """Compute one step and drop its results. Raises an error if the device has failed."""
        logits, _ = self.model.decode(torch.zeros(1, dtype=torch.int64, device=self.model.device), self.cache)
        logits.cpu()

    @torch.inference_mode()
    def warm_up(self) -> EngineFacts:
        """Decode at every batch size, read every padded length with 1, 2 and all rows, and return facts of the engine.

        Nothing is committed, so every row stays as it was. If on a CPU a row's bits change when several rows are read
        together, and the option `batch_invariant` is on, the runner reads rows one by one from now on.
        """
        sampling = SamplingParams(temperature=1.0, seed=1)
        decoded = []
        for count in range(1, self.num_rows + 1):
            logits, _ = self._step(range(count), [1] * count)
            self._drawer.draw(logits, [Draw(sampling, 1, 1)] * count, range(count))
            decoded.append(logits[0].clone())
        lengths = sorted({_padded(size) for size in range(1, self._chunk_tokens + 1)})
        alike = [self._reads_alike(num_new) for num_new in lengths]  # a list, so that every length runs once
        read_alike = all(alike)
        self._reads_together = read_alike or not self._batch_invariant or self.model.device.type != "cpu"
        decode_alike = all(torch.equal(logits, decoded[0]) for logits in decoded)
        return self._facts(batch_invariant=(read_alike or not self._reads_together) and decode_alike)

    def _facts(self, *, batch_invariant: bool) -> EngineFacts:
        return EngineFacts(
            backend=self.model.backend,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            weights=self.model.weights,
            num_rows=self.num_rows,
            state_bytes_per_row=self.cache.bytes_per_row + self.history.bytes_per_row,
            batch_invariant=batch_invariant,
            spans=tuple(map(tuple, self.model.spans)),
            variant=getattr(self.model, "variant", None),
        )

    def _reads_alike(self, num_new: int) -> bool:
        """Return whether `num_new` tokens give the same bits alone, beside one other row and in a full batch."""
        tokens = np.arange(num_new, dtype=np.int32) % self.model.config.vocab_size
        found = []
        for count in sorted({1, min(2, self.num_rows), self.num_rows}):
            hidden, _, _ = self._stretch([Chunk(row, tokens) for row in range(count)], num_new=num_new)
            scored = score_positions(self.model, hidden[0], torch.ones_like(hidden[0, :, 0], dtype=torch.int64))
            found.append(torch.cat((hidden[0].float(), scored.logprobs[:, None]), -1))
        return all(torch.equal(figures, found[0]) for figures in found)

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """Read chunks of prompts and documents, one chunk for each row; draw and score where the chunk asks for it.

        Chunks of the same padded length are read together, unless that could change their results. The padded length
        depends on the chunk alone, and so do its results.
        """
        alike: dict[tuple[int, bool, int], list[int]] = {}
        for i, chunk in enumerate(chunks):
            key = _padded(len(chunk.tokens)), chunk.extras.memory_share, 0 if self._reads_together else i
            alike.setdefault(key, []).append(i)
        results: dict[int, ChunkResult] = {}
        commits = []
        for (num_new, *_), indices in alike.items():
            some = [chunks[i] for i in indices]
            hidden, new, shares = self._stretch(some, num_new=num_new)
            commits.append(([chunk.row for chunk in some], new, [len(chunk.tokens) for chunk in some]))
            drawn = self._draw_ends(some, hidden)
            for place, i in enumerate(indices):
                scores = self._score(some[place], hidden[place], None if shares is None else shares[place])
                results[i] = ChunkResult(drawn[place], scores)
        for rows, new, counts in commits:  # only after all chunks are computed
            self.cache.commit(rows, new, counts)
        return [results[i] for i in range(len(chunks))]

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        """Feed each row its last token, and return the next token drawn for each row, in the order of `rows`."""
        if self._drawer.inside is not None:
            return self._decode_inside(self._drawer.inside, rows, tokens, draws)
        logits, new = self._step(rows, tokens)
        num_fed = len(logits)
        if list(rows) != list(range(num_fed)):
            logits = logits[list(rows)]
        drawn = self._drawer.draw_fed(logits, draws, rows, tokens)
        num_new = np.zeros(num_fed, dtype=np.int64)
        num_new[list(rows)] = 1
        self.cache.commit(range(num_fed), new, num_new.tolist())
        return drawn

    def _decode_inside(
        self, model: DrawsInside, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]
    ) -> list[Drawn]:
        """Decode with a model that draws plain lines itself. Nothing is committed before all lines are drawn."""
        prepared = self._drawer.prepare(draws)
        fed, places = np.array(tokens, np.int64), np.array(rows, np.int64)
        is_plain = not prepared.lines
        decoded = model.decode_and_draw(fed, self.cache, rows=places, draws=prepared.plain, commit=is_plain)
        drawn = self._drawer.complete(decoded, prepared, draws, rows, tokens)
        if not is_plain:
            self.cache.commit(rows, decoded.new, [1] * len(rows))
        return drawn

    def _step(self, rows: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, V] and new keys and values of the rows from 0 to the highest; idle rows get token 0."""
        fed = np.zeros(max(max(rows) + 1, self._min_rows), dtype=np.int64)
        fed[list(rows)] = tokens
        return self.model.decode(self._to_device(fed), self.cache)

    def _stretch(self, chunks: Sequence[Chunk], *, num_new: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Return hidden states [B, T, E], new keys and values, and shares of persistent vectors if asked for."""
        rows = [chunk.row for chunk in chunks]
        tokens = np.zeros((len(chunks), num_new), dtype=np.int64)
        for line, chunk in zip(tokens, chunks, strict=True):
            line[: len(chunk.tokens)] = chunk.tokens
        if chunks[0].extras.memory_share:
            return self.model.extend_with_memory_share(self._to_device(tokens), self.cache, rows)
        return *self.model.extend(self._to_device(tokens), self.cache, rows), None

    def _draw_ends(self, chunks: Sequence[Chunk], hidden: Tensor) -> list[tuple[Drawn, ...]]:
        """Return for each chunk the tokens drawn after its last token; none if the prompt goes on."""
        for chunk in chunks:
            if chunk.penalised:  # a token that is marked twice counts as marked once
                self.history.read(chunk.row, self._to_device(chunk.tokens.astype(np.int64)))
        ends = [(i, len(chunk.tokens) - 1) for i, chunk in enumerate(chunks) for _ in chunk.draws]
        if not ends:
            return [()] * len(chunks)
        padding = [ends[0]] * (self._min_rows - len(ends))
        last = torch.stack([hidden[place] for place in ends + padding])
        logits = self.model.logits(last)[: len(ends)]
        draws = [one for chunk in chunks for one in chunk.draws]
        rows = [chunk.row for chunk in chunks for _ in chunk.draws]
        drawn = iter(self._drawer.draw(logits, draws, rows))
        return [tuple(next(drawn) for _ in chunk.draws) for chunk in chunks]

    def _score(self, chunk: Chunk, hidden: Tensor, shares: Tensor | None) -> ChunkScores | None:
        """Return the scores of a chunk's targets, from its hidden states [T, E] and shares [T, layers]."""
        if chunk.targets is None:
            return None
        count = len(chunk.targets)
        targets = self._to_device(chunk.targets.astype(np.int64))
        found = score_positions(self.model, hidden, targets, num_top=chunk.extras.num_top, entropy=chunk.extras.entropy)
        return ChunkScores(
            logprobs=found.logprobs.cpu().numpy(),
            ranks=found.ranks.cpu().numpy(),
            top_ids=_numpy(found.top_ids),
            top_logprobs=_numpy(found.top_logprobs),
            entropies=_numpy(found.entropies),
            memory_shares=None if shares is None else _numpy(shares[:count]),
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


def _padded(num_tokens: int) -> int:
    """Return the length that a chunk is padded to: one of few lengths, each of which is batch-invariant."""
    return next((size for size in (4, 8) if num_tokens <= size), -(-num_tokens // 16) * 16)


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.cpu().numpy()

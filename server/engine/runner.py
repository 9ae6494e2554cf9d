"""The only torch in the server: a model and its rings behind the protocol that the engine drives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.artefact import is_artefact, open_artefact
from model.bundle import open_bundle
from model.frozen.baked import load_baked
from model.frozen.exported import load_exported
from model.frozen.served import ServedLM, score_positions
from model.sampling.draw import Draws, draw
from model.sampling.params import SamplingParams
from model.sampling.penalties import History
from server.engine.sequence import Chunk, ChunkResult, ChunkScores, Draw, Drawn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelRunner:
    """Runs a model. Rows are lanes of one `RingCache`; decoding touches rows 0 .. the highest in use."""

    def __init__(self, model: ServedLM, *, num_rows: int, batch_invariant: bool = True) -> None:
        self.num_rows = num_rows
        self.model = model
        self._min_rows = model.invariant_rows if batch_invariant else 1
        self._batch_invariant = batch_invariant
        self._reads_together = True
        self.cache = model.allocate(max(num_rows, self._min_rows))
        self.history = History(max(num_rows, self._min_rows), model.config.vocab_size, device=model.device)
        self._prepared: tuple[list[SamplingParams], Draws] | None = None

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        num_rows: int,
        dtype: str = "float32",
        device: str = "auto",
        provider: str = "auto",
        num_threads: int | None = None,
        batch_invariant: bool = True,
    ) -> Self:
        """Load a bundle or an artefact.

        Args:
            dtype: float32 or bfloat16, of a bundle's weights and rings; an artefact has its own.
            device: auto, cpu or cuda; auto takes a GPU where there is one.
            provider: auto, cpu or cuda: the execution provider of an ONNX artefact.
            num_threads: CPU threads; None = as many as cores.
            batch_invariant: never compute fewer than the model's `invariant_rows`.

        Raises:
            BundleError: the bundle or artefact is not whole, or cannot be run as asked.
            ValueError: CUDA is asked for where there is none.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        if is_artefact(path):
            exported = load_exported(open_artefact(path), device=device, provider=provider, num_threads=num_threads)
            return cls(exported, num_rows=num_rows, batch_invariant=batch_invariant)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_baked(open_bundle(path), dtype=DTYPES[dtype], device=device)
        return cls(model, num_rows=num_rows, batch_invariant=batch_invariant)

    @property
    def backend(self) -> str:
        """What computes."""
        return self.model.backend

    @property
    def device(self) -> str:
        """Where the model runs."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """What rings are kept in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights(self) -> str:
        """How they are kept."""
        return self.model.weights

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes a live stream costs, whatever its length."""
        return self.cache.bytes_per_row + self.history.bytes_per_row

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """How far each head of each layer looks back, in tokens."""
        return tuple(map(tuple, self.model.spans))

    def reset(self, row: int) -> None:
        """Begin a fresh stream in a row."""
        self.cache.reset(row)
        self.history.reset(row)

    def move(self, source: int, target: int) -> None:
        """Copy a row's whole state over another row's."""
        self.cache.move(source, target)
        self.history.move(source, target)

    def snapshot(self, row: int) -> object:
        """A copy of a row's whole state."""
        return self.cache.snapshot(row), self.history.snapshot(row)

    def restore(self, row: int, snapshot: object) -> None:
        """Begin a stream in a row from the state that another one had."""
        assert isinstance(snapshot, tuple)
        rings, history = snapshot
        self.cache.restore(row, rings)
        self.history.restore(row, history)

    @torch.inference_mode()
    def check(self) -> None:
        """Compute one step and forget it; raises where the device does not work any more."""
        logits, _ = self.model.decode(torch.zeros(1, dtype=torch.int64, device=self.model.device), self.cache)
        logits.cpu()

    @torch.inference_mode()
    def warm_up(self, chunk_tokens: int) -> bool:
        """Decode at every batch size, and read every padded length with one row, with two and with all.

        Nothing is committed, so every row stays as it was. Where reading together is seen to change a row's bits on a
        CPU, rows are read one by one from now on, if they shall not depend on each other.

        Returns:
            whether a full batch gives row 0, bit for bit, what it gets alone.
        """
        sampling = SamplingParams(temperature=1.0, seed=1)
        decoded = []
        for count in range(1, self.num_rows + 1):
            logits, _ = self._step(range(count), [1] * count)
            self._draw(logits, Draws([sampling] * count, device=self.model.device), [Draw(sampling, 1, 1)] * count)
            decoded.append(logits[0].clone())
        lengths = sorted({_padded(size) for size in range(1, chunk_tokens + 1)})
        alike = [self._reads_alike(num_new) for num_new in lengths]  # each of them once, whatever comes out
        read_alike = all(alike)
        self._reads_together = read_alike or not self._batch_invariant or self.model.device.type != "cpu"
        return (read_alike or not self._reads_together) and all(torch.equal(logits, decoded[0]) for logits in decoded)

    def _reads_alike(self, num_new: int) -> bool:
        """Whether a stretch of so many tokens has the same bits alone, beside one other, and in a full batch."""
        tokens = np.arange(num_new, dtype=np.int32) % self.model.config.vocab_size
        found = []
        for count in sorted({1, min(2, self.num_rows), self.num_rows}):
            hidden, _, _ = self._stretch([Chunk(row, tokens) for row in range(count)], num_new=num_new)
            scored = score_positions(self.model, hidden[0], torch.ones_like(hidden[0, :, 0], dtype=torch.int64))
            found.append(torch.cat((hidden[0].float(), scored.logprobs[:, None]), -1))
        return all(torch.equal(figures, found[0]) for figures in found)

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """Read stretches of prompts and documents, one a row; draw or score where a chunk asks for it.

        Chunks that are padded to one length are read together, unless that could change their numbers. The length
        depends on the chunk alone, and so do the numbers that come out.
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
        for rows, new, counts in commits:  # not before everything has worked
            self.cache.commit(rows, new, counts)
        return [results[i] for i in range(len(chunks))]

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        """One step of the rows that generate: feed each its last token, draw the next, in the order of `rows`."""
        logits, new = self._step(rows, tokens)
        num_fed = len(logits)
        if list(rows) != list(range(num_fed)):
            logits = logits[list(rows)]
        samplings = [one.sampling for one in draws]
        if self._prepared is None or not _same(self._prepared[0], samplings):
            self._prepared = samplings, Draws(samplings, device=self.model.device)
        drawn = self._draw_fed(logits, self._prepared[1], draws, rows, tokens)
        num_new = np.zeros(num_fed, dtype=np.int64)
        num_new[list(rows)] = 1
        self.cache.commit(range(num_fed), new, num_new.tolist())
        return drawn

    def _step(self, rows: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, V] and new keys and values of rows 0 .. the highest; the idle ones are fed anything."""
        fed = np.zeros(max(max(rows) + 1, self._min_rows), dtype=np.int64)
        fed[list(rows)] = tokens
        return self.model.decode(self._to_device(fed), self.cache)

    def _stretch(self, chunks: Sequence[Chunk], *, num_new: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Hidden states [B, T, E], new keys and values, and shares of attention on persistent vectors if asked for."""
        rows = [chunk.row for chunk in chunks]
        tokens = np.zeros((len(chunks), num_new), dtype=np.int64)
        for line, chunk in zip(tokens, chunks, strict=True):
            line[: len(chunk.tokens)] = chunk.tokens
        if chunks[0].extras.memory_share:
            return self.model.extend_with_memory_share(self._to_device(tokens), self.cache, rows)
        return *self.model.extend(self._to_device(tokens), self.cache, rows), None

    def _draw_fed(
        self, logits: Tensor, prepared: Draws, draws: Sequence[Draw], rows: Sequence[int], fed: Sequence[int]
    ) -> list[Drawn]:
        """Draw in rows whose last token, just `fed`, counts for penalties; not so if drawing fails."""
        if not prepared.penalised:
            return self._draw(logits, prepared, draws)
        places, tokens = self._to_device(np.array(rows, dtype=np.int64)), self._to_device(np.array(fed, dtype=np.int64))
        self.history.feed(places, tokens)
        try:
            return self._draw(logits, prepared, draws, rows)
        except Exception:
            self.history.unfeed(places, tokens)
            raise

    def _draw(self, logits: Tensor, prepared: Draws, draws: Sequence[Draw], rows: Sequence[int] = ()) -> list[Drawn]:
        """One object for each line of the logits [B, V]; the only place where the host waits for the device."""
        batch = draw(
            logits,
            prepared,
            positions=[one.position for one in draws],
            num_generated=[one.num_generated for one in draws],
            history=self.history,
            rows=rows,
        )
        tokens, logprobs = batch.tokens.tolist(), batch.logprobs.tolist()
        if batch.top_ids is None or batch.top_logprobs is None:
            return list(map(Drawn, tokens, logprobs))
        lines = zip(batch.top_ids.tolist(), batch.top_logprobs.tolist(), draws, strict=True)
        tops = [tuple(zip(ids, values, strict=True))[: one.sampling.num_top] for ids, values, one in lines]
        return list(map(Drawn, tokens, logprobs, tops))

    def _draw_ends(self, chunks: Sequence[Chunk], hidden: Tensor) -> list[tuple[Drawn, ...]]:
        """For each chunk, what is drawn after its last token; nothing where its prompt goes on."""
        for chunk in chunks:
            if chunk.penalised:  # marking twice does no harm
                self.history.read(chunk.row, self._to_device(chunk.tokens.astype(np.int64)))
        ends = [(i, len(chunk.tokens) - 1) for i, chunk in enumerate(chunks) for _ in chunk.draws]
        if not ends:
            return [()] * len(chunks)
        padding = [ends[0]] * (self._min_rows - len(ends))
        last = torch.stack([hidden[place] for place in ends + padding])
        logits = self.model.logits(last)[: len(ends)]
        draws = [one for chunk in chunks for one in chunk.draws]
        rows = [chunk.row for chunk in chunks for _ in chunk.draws]
        prepared = Draws([one.sampling for one in draws], device=self.model.device)
        drawn = iter(self._draw(logits, prepared, draws, rows))
        return [tuple(next(drawn) for _ in chunk.draws) for chunk in chunks]

    def _score(self, chunk: Chunk, hidden: Tensor, shares: Tensor | None) -> ChunkScores | None:
        """Figures of the targets of a chunk from its hidden states [T, E] and shares [T, layers]."""
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
    """The length a chunk is computed at: few shapes to warm up, and all that batch invariance needs."""
    return next((size for size in (4, 8) if num_tokens <= size), -(-num_tokens // 16) * 16)


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.cpu().numpy()


def _same(left: Sequence[SamplingParams], right: Sequence[SamplingParams]) -> bool:
    """Whether both hold the very same objects, which is what one batch composition over many steps means."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))

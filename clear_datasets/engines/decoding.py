"""Reading and writing tokens: sequences with their keys and values, and the samples that are drawn from them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines.checkpoint import Checkpoint
from clear_datasets.engines.planning import Request

if TYPE_CHECKING:
    import torch


class State:
    """Sequences that a model has read so far: their keys and values, and which places hold padding.

    All changes go layer by layer, so that the old and the new are not held at once. After an out-of-memory error a
    state is of no use: some of its layers have read the tokens, and what a recurrent layer held is gone.
    """

    def __init__(self, checkpoint: Checkpoint, cache: Any = None, mask: torch.Tensor | None = None) -> None:
        self.checkpoint, self.cache, self.mask = checkpoint, cache, mask

    @property
    def width(self) -> int:
        """Tokens of each sequence, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def forward(self, rows: list[list[int]], keep: int = 1) -> torch.Tensor:
        """Read more tokens, padded on the left; float32 [rows, keep, vocabulary], the logits after the last ones."""
        import torch

        width = max(map(len, rows))
        device, pad = self.checkpoint.device, self.checkpoint.pad
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        before = 0 if self.mask is None else self.mask.sum(-1, keepdim=True)
        whole = mask if self.mask is None else torch.cat([self.mask, mask], dim=-1)
        out = self.checkpoint.model(
            input_ids=ids,
            attention_mask=whole,
            position_ids=(before + mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.cache, self.mask = out.past_key_values, whole
        logits: torch.Tensor = out.logits[:, -keep:].float()
        return logits

    def select(self, rows: list[int]) -> State:
        """A state of some sequences, of full attention alone; this one stays as it is."""
        if self.mask is None:
            return State(self.checkpoint)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]  # what changes one of them makes new tensors
        state = State(self.checkpoint, cache, self.mask)
        state.take(rows)
        return state

    def take(self, rows: list[int]) -> None:
        """Go on with some sequences, each as often as it is named."""
        import torch

        assert self.mask is not None
        if rows != list(range(len(self.mask))):
            index = torch.tensor(rows, dtype=torch.long, device=self.checkpoint.device)
            self.cache.reorder_cache(index)
            self.mask = self.mask[index]

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """One state of all their sequences, which gives theirs up; shorter ones are padded on the left."""
        import torch
        from torch.nn.functional import pad

        masks = [s.mask for s in states if s.mask is not None]
        gaps = [max(m.shape[1] for m in masks) - m.shape[1] for m in masks]
        cache = copy.copy(states[0].cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for i, layer in enumerate(cache.layers):
            beside = [s.cache.layers[i] for s in states]
            layer.keys = torch.cat([pad(b.keys, (0, 0, gap, 0)) for b, gap in zip(beside, gaps, strict=True)])
            layer.values = torch.cat([pad(b.values, (0, 0, gap, 0)) for b, gap in zip(beside, gaps, strict=True)])
            for b in beside:
                b.keys = b.values = None
        mask = torch.cat([pad(m, (gap, 0)) for m, gap in zip(masks, gaps, strict=True)])
        return State(states[0].checkpoint, cache, mask)


@dataclass
class Draw:
    """One sample: the random numbers that decide it, one a token, and the tokens so far."""

    request: Request
    number: int  # among the samples of its prompt
    uniform: npt.NDArray[np.float32]
    tokens: list[int] = field(default_factory=list)
    done: bool = False  # it has come to its end
    broken: bool = False  # a logit was no number


class Writing:
    """Samples that are being drawn together.

    Args:
        state: Their sequences, up to the last token but `pending`.
        draws: The samples.
        temperature: 0 takes the likeliest token each time.
        logits: What follows each sequence, where it is known.
        pending: The token of each sequence that is chosen but not read, where `logits` is None.
    """

    def __init__(
        self,
        state: State,
        draws: list[Draw],
        temperature: float,
        logits: torch.Tensor | None,
        pending: list[int] | None = None,
    ) -> None:
        self.state, self.draws, self.temperature, self.logits, self.pending = state, draws, temperature, logits, pending

    def write(self, until: int = 0) -> None:
        """Draw tokens until at most `until` samples are unfinished."""
        while len(self.draws) > until:
            if self.logits is None:
                assert self.pending is not None
                self.logits = self.state.forward([[token] for token in self.pending])[:, -1]
            self.draw()

    def draw(self) -> None:
        """Draw the next token of each sample from the logits that are there; samples that have ended leave."""
        assert self.logits is not None
        ends = self.state.checkpoint.chats.ends
        tokens, sound = (found.tolist() for found in self._pick(self.logits))
        for draw, token, whole in zip(self.draws, tokens, sound, strict=True):
            draw.broken = not whole
            if token not in ends:
                draw.tokens.append(token)
            draw.done = draw.broken or token in ends or len(draw.tokens) >= len(draw.uniform)
        going = [i for i, draw in enumerate(self.draws) if not draw.done]
        self.state.take(going)
        self.draws = [self.draws[i] for i in going]
        self.logits, self.pending = None, [tokens[i] for i in going]

    def _pick(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The token at which the cumulative distribution passes the sample's next random number; whether it is one."""
        import torch

        if not self.temperature:
            greatest, tokens = logits.max(-1)
            return tokens, greatest.isfinite()
        uniform = torch.tensor([[d.uniform[len(d.tokens)]] for d in self.draws], device=logits.device)
        cumulative = torch.softmax(logits / self.temperature, dim=-1).cumsum(-1)
        found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(-1)
        return found.clamp(max=logits.shape[-1] - 1), cumulative[:, -1].isfinite()

    @staticmethod
    def join(parts: list[Writing]) -> Writing:
        """The unfinished samples of several batches that wait for their next logits; they are drawn in this one."""
        first = parts[0]
        pending = [token for part in parts for token in part.pending or ()]
        return Writing(
            State.join([p.state for p in parts]), [d for p in parts for d in p.draws], first.temperature, None, pending
        )


def uniform(ids: list[int], sample: int, seed: int, size: int) -> npt.NDArray[np.float32]:
    """Random numbers that belong to a prompt and a sample number, whatever the batch."""
    key = hashlib.blake2b(np.asarray([seed, sample, *ids], dtype=np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).random(size, dtype=np.float32)

"""New rows of an embedding table, beside a table that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AddedRows(nn.Module):
    """An embedding table whose tokens from `first` on are rows of their own.

    table: what reads all tokens below `first`: an embedding, or another of these. words: [n, dim]
    float32 each, in the order of their tokens. zeros: what each is drawn as at strength 0.
    """

    def __init__(
        self, table: nn.Module, first: int, words: Sequence[Tensor], zeros: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.table, self.first, self.scale = table, first, 1.0
        self.words = nn.ParameterList(nn.Parameter(rows) for rows in words)
        self._zeros = list(zeros)

    def rows(self) -> Tensor:
        """Return all rows as they are drawn with: [n, dim] float32."""
        if self.scale == 1:
            return torch.cat(list(self.words))
        pairs = zip(self._zeros, self.words, strict=True)
        return torch.cat([zero + self.scale * (word - zero) for zero, word in pairs])

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of `ids` ([B, length] int64): [B, length, dim] in the table's type."""
        new = ids >= self.first
        known: Tensor = self.table(ids.masked_fill(new, 0))
        own = nn.functional.embedding((ids - self.first).clamp(min=0), self.rows())
        return torch.where(new.unsqueeze(-1), own.to(known.dtype), known)

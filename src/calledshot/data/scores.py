"""What predicted text costs, in nats, and what it is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calledshot.objective import Batch


@dataclass(frozen=True)
class Score:
    """Nats of some documents, and what they are measured against."""

    nats: float
    """Of every target: the tokens that are predicted, and the documents' ends; begin never is."""
    tokens: int
    """Targets."""
    bytes: int
    """UTF-8 bytes of the text that is predicted."""
    documents: int
    lossless: bool = True
    """Whether the tokens give the bytes back."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, since the same bytes are divided by; the end tokens' nats are in it. NaN where
        the tokenizer loses text."""
        return self.nats / math.log(2) / self.bytes if self.bytes and self.lossless else math.nan


@dataclass(frozen=True)
class Selection:
    """Documents of one source to be predicted, whole or the suffixes of their pieces, packed into rows.

    Documents are numbered from 0 to D - 1, pieces from 0 to P - 1 over all rows in order.
    """

    source: str
    pieces: np.ndarray
    """(P,) of dtype PIECE: which run of pairs of which document, in row order."""
    row_starts: np.ndarray
    """(rows + 1,) int64: the first piece of each row."""
    names: tuple[str, ...]
    """Documents' ids."""
    languages: tuple[str, ...]
    """Language of each document."""
    bytes: np.ndarray
    """(D,) int64 bytes of each document's text, as far as it is predicted."""
    ids: np.ndarray
    """(D,) int64 ids of each document, begin and end included."""
    targets: np.ndarray
    """(D,) int64 ids of each document that are predicted."""
    lossless: bool = True
    """Whether the tokenizer gives texts back as they were."""
    splits: np.ndarray | None = None
    """(P,) int64: ids of each piece that are given; None where it is the first alone."""
    lengths: np.ndarray | None = None
    """(rows,) int64, ascending: positions that each row is laid out in; None where all are the model's whole row."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Targets."""
        return int(self.targets.sum())

    def nats_by_document(self, first_row: int, batch: Batch, nats: np.ndarray) -> np.ndarray:
        """(D,) float64: the batch's nats, (B, T), summed by document. `first_row` is the selection's row that the
        batch begins with.

        Add these up over the batches and hand them to `score`.
        """
        # Rows of padding after the last one have no pieces to look up.
        rows = np.minimum(np.arange(first_row, first_row + len(batch.documents)), self.rows)
        real = batch.loss_weights > 0
        piece = (self.row_starts[rows][:, None] + batch.documents)[real]
        return np.bincount(self.pieces["document"][piece], np.asarray(nats, np.float64)[real], len(self.ids))

    def score(self, nats: np.ndarray) -> Score:
        """All documents together; `nats` (D,)."""
        return Score(float(nats.sum()), self.tokens, int(self.bytes.sum()), len(self.ids), self.lossless)

    def score_by_language(self, nats: np.ndarray) -> dict[str, Score]:
        """One score a language, most bytes first."""
        languages = np.array(self.languages)
        scores = {}
        for language in dict.fromkeys(self.languages):
            mine = languages == language
            tokens = int(self.targets[mine].sum())
            scores[language] = Score(
                float(nats[mine].sum()), tokens, int(self.bytes[mine].sum()), int(mine.sum()), self.lossless
            )
        return dict(sorted(scores.items(), key=lambda item: -item[1].bytes))

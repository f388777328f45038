"""What a loaded model and its context can do: the facts about them that decisions depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Fixed for the life of a context."""

    n_slots: int
    """Sequences that run at once. Together they hold `n_slots` times `n_ctx` positions."""
    n_ctx: int
    """Positions one slot can hold."""
    max_rows: int
    """Rows of one batch."""
    n_spare_slots: int = 0
    """Further slots, within the same positions: so that a sequence which starts need not take the place of what another
    one has left."""
    n_embed_slots: int = 1
    """Further slots, numbered from `first_embed_slot` on, that only embeddings use: they wait for no generation and
    push nothing out of the prompt cache. All of them together hold `max_rows` positions."""
    embeds_last_row: bool = False
    """The vector of a text is that of its last row: the rows before it may go in any batches. False: all rows of a text
    must be in the one batch that makes its vector."""
    has_memory: bool = True
    """False: nothing stays in the KV cache between steps, as in BERT; only embeddings are possible."""
    can_trim: bool = True
    """False: part of a sequence cannot be removed (recurrent state); a trimmed slot starts again from nothing."""
    can_shift: bool = True
    """False: positions cannot be renumbered; a full slot decodes what it keeps again."""
    can_generate: bool = True
    """False: the model has no tokens to sample, only vectors."""
    ranks: bool = False
    """Its vectors are scores of a document for a query."""
    n_vector: int = 0
    """Elements of a vector."""
    decoder_start: int | None = None
    """Not None: an encoder reads the prompt, and the text begins with this token. What all sequences together have it
    read is at most `max_rows` tokens, for it reads everything at once."""

    @property
    def first_embed_slot(self) -> int:
        return self.n_slots + self.n_spare_slots

"""Checks that the state of a scheduler does not contradict itself: what must hold between any two of its moves.

Every check raises AssertionError, with a message that names what is wrong. The rules are those of scheduler.py and
following.py. It costs time in proportion to all that the slots hold, so that it runs in tests and on request only.
"""

from __future__ import annotations

from collections import Counter

from trio_runner.core.prompt import Item, MediaRow, common_prefix, n_positions
from trio_runner.core.sequence import takes_embed_slot
from trio_runner.core.snapshot import SchedulerState, SequenceState, SlotState
from trio_runner.info import Capabilities


def check(state: SchedulerState, capabilities: Capabilities) -> None:
    """Raises AssertionError if the state contradicts itself."""
    for slot in (*state.slots, *state.embed_slots):
        _check_slot(slot, capabilities)
    _check_owners(state, capabilities)
    _check_parked(state)
    _check_reserved(state, capabilities)
    slots = {slot.id: slot for slot in (*state.slots, *state.embed_slots)}
    for uid, sequence in state.running.items():
        _require(uid == sequence.spec.uid, f"sequence {sequence.spec.uid} runs under the uid {uid}")
        _check_running(sequence, slots[sequence.slot], capabilities)
        _check_following(sequence, state, slots, capabilities)
    for uid, sequence in state.waiting.items():
        _require(uid == sequence.spec.uid, f"sequence {sequence.spec.uid} waits under the uid {uid}")
        _check_waiting(sequence, capabilities)
    both = state.running.keys() & state.waiting.keys()
    _require(not both, f"sequences {sorted(both)} run and wait")
    generating = [one for one in state.running.values() if not takes_embed_slot(one.spec, capabilities)]
    _require(bool(generating) or not state.crowded, "the KV cache is called full, but no sequence holds it")
    _require(
        0 < state.max_rows <= capabilities.max_rows,
        f"a batch may have {state.max_rows} rows, where {capabilities.max_rows} are allowed",
    )
    unknown = set(state.suspects) - state.running.keys() - state.waiting.keys()
    _require(not unknown, f"the suspects {sorted(unknown)} have ended")


def _check_slot(slot: SlotState, capabilities: Capabilities) -> None:
    name, n_held = f"slot {slot.id}", len(slot.items)
    _require(n_held <= capabilities.n_ctx, f"{name} holds {n_held} items, but only {capabilities.n_ctx} fit")
    _require(capabilities.has_memory or not n_held, f"{name} holds items, but the model has no memory")
    lag = n_held - n_positions(slot.items)
    _require(slot.position_lag == lag, f"the position lag of {name} is {slot.position_lag}, where its items make {lag}")
    _require(
        0 <= slot.n_shared_cells <= n_held, f"{name} shares {slot.n_shared_cells} cells, but holds only {n_held} items"
    )
    last = slot.items[-1] if slot.items else None
    if isinstance(last, MediaRow) and last.media.whole:
        _require(last.row == last.media.n_rows - 1, f"{name} holds part of an image that must stay whole")


def _check_owners(state: SchedulerState, capabilities: Capabilities) -> None:
    """A slot is busy if and only if exactly one running sequence holds it, and each kind of request has its slots."""
    owners = Counter(sequence.slot for sequence in state.running.values())
    for slot in (*state.slots, *state.embed_slots):
        n_owners = owners.pop(slot.id, 0)
        _require(n_owners <= 1, f"slot {slot.id} belongs to {n_owners} sequences")
        _require(not slot.busy or n_owners == 1, f"slot {slot.id} is busy, but no running sequence holds it")
        _require(slot.busy or n_owners == 0, f"slot {slot.id} is free, but a running sequence holds it")
    _require(not owners, f"running sequences hold slots {sorted(owners)}, which do not exist")
    embed_slots = {slot.id for slot in state.embed_slots}
    for uid, sequence in state.running.items():
        _require(
            (sequence.slot in embed_slots) == takes_embed_slot(sequence.spec, capabilities),
            f"sequence {uid} is in slot {sequence.slot}, which is not for its kind of request",
        )
    n_busy = sum(slot.busy for slot in state.slots)
    _require(n_busy <= capabilities.n_slots, f"{n_busy} slots are busy, but only {capabilities.n_slots} may be")


def _check_parked(state: SchedulerState) -> None:
    """A slot is parked only for a sequence that waits and had to leave it, and for each such sequence only one is."""
    parked = Counter(slot.parked_for for slot in state.slots if slot.parked_for is not None)
    for slot in (*state.slots, *state.embed_slots):
        if slot.parked_for is None:
            continue
        _require(not slot.busy, f"slot {slot.id} is busy, and parked for sequence {slot.parked_for}")
        sequence = state.waiting.get(slot.parked_for)
        _require(
            sequence is not None and sequence.preempted,
            f"slot {slot.id} is parked for sequence {slot.parked_for}, which does not wait for it",
        )
        _require(parked[slot.parked_for] == 1, f"several slots are parked for sequence {slot.parked_for}")


def _check_reserved(state: SchedulerState, capabilities: Capabilities) -> None:
    """Texts to embed and encoder tokens, each of which must go into one batch, have their rows reserved."""
    needed = {one.slot: len(one.spec.encoder_tokens) for one in state.running.values() if one.spec.encoder_tokens}
    needed |= {
        one.slot: len(one.spec.prompt) for one in state.running.values() if takes_embed_slot(one.spec, capabilities)
    }
    _require(dict(state.reserved) == needed, f"reserved rows are {dict(state.reserved)}, where {needed} are needed")
    n_reserved = sum(needed.values())
    _require(
        n_reserved <= capabilities.max_rows,
        f"{n_reserved} rows are reserved, but a batch has only {capabilities.max_rows}",
    )
    for slot in state.embed_slots:
        _require(slot.busy or not slot.items, f"slot {slot.id} is free and still holds a text that was embedded")


def _check_running(sequence: SequenceState, slot: SlotState, capabilities: Capabilities) -> None:
    name = f"sequence {sequence.spec.uid}"
    _require(bool(sequence.pending), f"{name} has nothing left to decode")
    _require(slot.cache_key == sequence.spec.cache_key, f"the rows of {name} depend on another cache key than its own")
    held = slot.items if capabilities.has_memory else ()
    _check_items(sequence, (*held, *sequence.pending), capabilities)


def _check_waiting(sequence: SequenceState, capabilities: Capabilities) -> None:
    name = f"sequence {sequence.spec.uid}"
    _require(sequence.slot < 0, f"{name} waits and has slot {sequence.slot}")
    _require(sequence.follows is None, f"{name} waits for a slot and follows sequence {sequence.follows}")
    if not sequence.preempted:
        _require(not sequence.prompt_done, f"{name} never had a slot, and its prompt is done")
        _require(sequence.n_cached == 0, f"{name} never had a slot, and found {sequence.n_cached} items in the cache")
    _check_items(sequence, sequence.pending, capabilities)


def _check_items(sequence: SequenceState, items: tuple[Item, ...], capabilities: Capabilities) -> None:
    """Rule 2, as far as it can be known without the tokens that were sampled."""
    spec, name = sequence.spec, f"sequence {sequence.spec.uid}"
    _require(
        sequence.prompt_done == (sequence.n_sampled > 0),
        f"{name} sampled {sequence.n_sampled} tokens, and its prompt is {'' if sequence.prompt_done else 'not '}done",
    )
    _require(sequence.n_cached < len(spec.prompt), f"{name} found its whole prompt in the cache, without logits")
    # One more than fit, for the token that was sampled last is not decoded yet.
    _require(len(items) <= capabilities.n_ctx + 1, f"{name} has {len(items)} items, more than fit its slot")
    n_kept = min(spec.n_keep, len(spec.prompt)) if sequence.prompt_done else len(spec.prompt)
    _require(items[:n_kept] == spec.prompt[:n_kept], f"{name} does not begin with its prompt")
    if not sequence.prompt_done:
        _require(len(items) == len(spec.prompt), f"{name} has items after its prompt, but sampled none")
    elif len(items) > len(spec.prompt) + sequence.n_sampled:
        _require(False, f"{name} has {len(items)} items, more than it was given and sampled")


def _check_following(
    sequence: SequenceState, state: SchedulerState, slots: dict[int, SlotState], capabilities: Capabilities
) -> None:
    name = f"sequence {sequence.spec.uid}"
    if sequence.follows is None:
        return
    followed = state.running.get(sequence.follows)
    if followed is None:
        raise AssertionError(f"{name} follows sequence {sequence.follows}, which does not run")
    name = f"{name}, which follows sequence {sequence.follows},"
    _require(capabilities.can_trim, f"{name} cannot copy what that one decodes")
    _require(followed.spec.cache_key == sequence.spec.cache_key, f"{name} has another cache key")
    own = (*slots[sequence.slot].items, *sequence.pending)
    other = (*slots[followed.slot].items, *followed.pending)
    n_common = common_prefix(own, other)
    _require(
        sequence.n_awaited <= n_common, f"{name} waits for {sequence.n_awaited} items, but they share only {n_common}"
    )
    _require(
        sequence.n_awaited > len(slots[sequence.slot].items), f"{name} waits for items that its own slot holds already"
    )
    seen = {sequence.spec.uid}
    link: SequenceState | None = followed
    while link is not None and link.follows is not None:
        _require(link.spec.uid not in seen, f"{name} follows itself")
        seen.add(link.spec.uid)
        link = state.running.get(link.follows)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)

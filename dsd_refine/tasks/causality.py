"""A model that predicts the next token must not see it: one that does learns to copy, and its loss
falls towards 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dsd_refine.errors import CheckpointError

Inputs = Mapping[str, torch.Tensor]

WINDOWS, LENGTH = 8, 32  # of so many tokens at most: the fewer, the more each one moves the logits that see it

# As a share of the logits' range. Rounding moves them by 1e-6 (in a mixture of experts, whose
# batches change, or where sums are taken in another order), a model of random weights that sees
# later tokens by 5e-4 and more
ROUNDING = 1e-4


def refuse_foresight(
    task: str, logits: Callable[[Inputs], torch.Tensor], windows: Sequence[Inputs], names: Sequence[str]
) -> None:
    """Change the end of a window: the logits before it must stay the same, but for rounding.

    `windows` are inputs of one row each, `names` those of token ids and their mask,
    `logits(inputs)` is 1 x tokens x vocabulary. Most windows must move for a refusal: in a mixture
    of experts rounding may turn a token's route, here or there.

    Raises:
        CheckpointError: the model sees later tokens.
    """
    cut = [{**window, **{name: window[name][:, :LENGTH] for name in names}} for window in windows[:WINDOWS]]
    pool = torch.tensor(sorted({token for window in cut for token in window[names[0]].flatten().tolist()}))
    moved = [move for window in cut if (move := _move(logits, window, names[0], pool)) is not None]
    seen = [move for move in moved if move > ROUNDING]
    if 2 * len(seen) > len(moved):
        raise CheckpointError(
            f"{task}: the model sees later tokens, so it would learn to copy its answers: another end of a text moves the "
            f"logits before that end by up to {max(seen):.1%} of their range (in {len(seen)} of {len(moved)} texts). Was it "
            "built without causality (`is_decoder: true` missing in its config.json)? One that was made to fill in hidden "
            "words is for --task masked-lm"
        )


@torch.no_grad()
def _move(logits: Callable[[Inputs], torch.Tensor], inputs: Inputs, name: str, pool: torch.Tensor) -> float | None:
    """How far logits move when the last token is another, and when all from the middle on are; None
    of a single token.
    """
    length = inputs[name].shape[1]
    if length < 2:
        return None
    before = _centred(logits, inputs)
    moves = []
    for start in {length - 1, max(1, length // 2)}:
        ids = inputs[name].clone()
        ids[:, start:] = _others(ids[:, start:], pool)
        after = _centred(logits, {**inputs, name: ids})
        moves.append(float((after - before)[:, :start].abs().max() / before.abs().max().clamp_min(1e-30)))
    return max(moves)


def _others(ids: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """For each id another one of the pool, which is sorted; where it is the only one, a neighbour."""
    if len(pool) < 2:
        return (ids - 1).abs()
    pool = pool.to(ids.device)
    return pool[(torch.searchsorted(pool, ids.contiguous()) + 1) % len(pool)]


def _centred(logits: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
    """Logits less their mean at each position: a number added to all of them changes no prediction."""
    torch.manual_seed(0)  # Reformer's hashing is drawn in evaluation mode too
    values = logits(inputs)
    return values - values.mean(-1, keepdim=True)

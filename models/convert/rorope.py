"""Partial rotation by rotation of heads: RoRoPE of TransMLA, arXiv 2502.07864.

A frequency turns its pair of channels alike in every key head, so an orthogonal mix of the heads
leaves all scores as they are. One that follows the principal components of the keys puts most of
what a frequency carries into few components; those stay rotary, shared by all heads, and the
others lose their rotation. FreqFold mixes neighbouring frequencies as if they were one.
"""

import torch
from torch import Tensor

from models.convert.forms import Attention, Decoupled, pairs, repeat_heads


def rorope(attention: Attention, rope_dim: int, freqfold: int, moment: Tensor | None) -> Decoupled:
    """Keeps rope_dim of the N D channels of all keys rotary.

    rope_dim N D is all, and exact with freqfold 1; below, it is D / collapse, collapse dividing
    freqfold: of each freqfold frequencies as many components stay as there are multiples of
    collapse among them, and turn at those, which are then the frequencies of a rope of rope_dim.
    """
    key_heads, half = attention.key.shape[0], attention.head_dim // 2
    whole = rope_dim == key_heads * attention.head_dim
    # Folds of freqfold neighbouring frequencies: [fold, N freqfold, d_model + 1] in each half.
    first, second = (_folds(x, freqfold) for x in pairs(attention.key))
    mix = components(first, second, moment)
    collapse = attention.head_dim // rope_dim
    turns = attention.frequencies.view(-1, freqfold)
    if whole:
        turns = turns.repeat(1, key_heads)
    else:
        mix, turns = mix[..., : freqfold // collapse], turns[:, ::collapse]
    kept = [mix.mT @ x for x in (first, second)]  # [fold, components, d_model + 1]
    left = torch.cat(
        [_heads(x - mix @ y, key_heads) for x, y in zip((first, second), kept, strict=True)], dim=1
    )
    query = attention.scaled_query()
    # Of the mix the rows of each query head's key head: [H, fold, freqfold, components].
    read = repeat_heads(mix.unflatten(1, (key_heads, freqfold)).movedim(1, 0), attention.group)
    query_rope = [
        torch.einsum("hgfc,hgfd->hgcd", read, x.unflatten(1, (-1, freqfold))).flatten(1, 2)
        for x in pairs(query)
    ]
    nope = 0 if whole else attention.head_dim
    return Decoupled(
        query_nope=query[:, :nope],
        query_rope=torch.cat(query_rope, dim=1),
        key_nope=left[:, :nope],
        key_rope=torch.cat([x.flatten(0, 1) for x in kept]),
        value=attention.value,
        frequencies=turns.flatten(),
        key_rank=2 * key_heads * half - rope_dim,
    )


def components(first: Tensor, second: Tensor, moment: Tensor | None) -> Tensor:
    """[fold, rows, rows], orthogonal: columns are what both halves of a fold's keys vary along,
    most first."""

    def spread(x: Tensor) -> Tensor:
        return (x if moment is None else x @ moment) @ x.mT

    return torch.linalg.eigh(spread(first) + spread(second)).eigenvectors.flip(-1)


def _folds(half: Tensor, freqfold: int) -> Tensor:
    """[N, D / 2, d_model + 1] -> [fold, N freqfold, d_model + 1]."""
    return half.unflatten(1, (-1, freqfold)).movedim(1, 0).flatten(1, 2)


def _heads(folds: Tensor, key_heads: int) -> Tensor:
    """The inverse of `_folds`."""
    return folds.unflatten(1, (key_heads, -1)).movedim(1, 0).flatten(1, 2)

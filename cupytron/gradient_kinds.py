"""Guesses the kind of mistake in a wrong gradient.

Some kinds are guesses of the right gradient, such as the given one times a number, or its transpose. A
guess is compared with slopes along several random directions. Other kinds come from a dy that is zero
except in one sequence, token or entry. It shows which tokens and entries depend on each other.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

CLOSE = 1e-4  # relative error up to which a guess is accepted
MOST_ROWS = 16  # tokens and sequences that are looked at one by one


class Kind(NamedTuple):
    """A word for a kind of mistake, and a sentence about it."""

    kind: str
    text: str


def kind_of(
    case: Any,
    tensor: str,
    gradient: Any,
    directions: Sequence[Any],
    slopes: Any,
    gives: Any,
    wants: Any,
) -> Kind:
    """The first kind that fits.

    Args:
        case: the gradient_check.Case, for more slopes.
        tensor: name of the tensor whose gradient is wrong.
        gradient: the one that backward gave.
        directions: of the slopes, which finite differences gave.
        slopes: one for each direction.
        gives: some entries of the gradient.
        wants: these entries by finite differences.
    """
    if not gradient.any():
        return Kind("nothing", "backward gives it no gradient at all")

    def fits(guess: Any) -> bool:
        found = np.array([(guess * v).sum() for v in directions])
        return bool(np.abs(found - slopes).max() <= CLOSE * np.linalg.norm(guess))

    kinds: list[Iterator[Kind]] = [_factor(case, gradient, directions, slopes, fits)]
    kinds += [_transposed(gradient, fits)]
    if tensor == "x":
        kinds += [_residual(case, gradient, fits), _tokens(case, gradient)]
        kinds += [_entries(case, gradient, gives, wants)]
    else:
        kinds += [_missing_sum(case, tensor)]
    for found in kinds:
        for kind in found:
            return kind
    return Kind(
        "other",
        "its gradient has the right shape and wrong numbers, and fits no known kind of mistake; compare "
        "the arrays that forward pushes with those that backward expects",
    )


def _factor(
    case: Any, gradient: Any, directions: Sequence[Any], slopes: Any, fits: Callable[[Any], bool]
) -> Iterator[Kind]:
    found = np.array([(gradient * v).sum() for v in directions])
    factor = float(found @ slopes) / float(slopes @ slopes or 1)  # given / right
    if abs(factor) < 1e-12 or not fits(gradient / factor):
        return
    if abs(factor + 1) < CLOSE:
        yield Kind("sign", "its gradient has the wrong sign")
    tokens, sequences = len(case.dy), case.batch.batch_size
    for count, what in (
        (tokens, "tokens"),
        (sequences, "sequences"),
        (tokens // sequences, "positions"),
    ):
        if count > 1 and abs(factor * count - 1) < CLOSE:
            yield Kind(
                "factor",
                f"its gradient is 1/{count} of what it should be: a mean over {what} in place of a sum?",
            )
    close = Fraction(factor).limit_denominator(64)
    said = str(close) if abs(close / factor - 1) < CLOSE else f"{factor:.6g}"
    yield Kind("factor", f"its gradient is {said} times what it should be")


def _transposed(gradient: Any, fits: Callable[[Any], bool]) -> Iterator[Kind]:
    if gradient.ndim == 2 and gradient.shape[0] == gradient.shape[1] and fits(gradient.T):
        yield Kind("transpose", "its gradient is transposed")


def _residual(case: Any, gradient: Any, fits: Callable[[Any], bool]) -> Iterator[Kind]:
    if case.dy.shape != gradient.shape:
        return
    if fits(gradient + case.dy):
        yield Kind("residual", "dy itself is missing in it: a residual is dropped in backward")
    if fits(gradient - case.dy):
        yield Kind("residual", "dy itself is in it once too often: forward has no such residual")


def _missing_sum(case: Any, tensor: str) -> Iterator[Kind]:
    """Of a parameter: whether only some sequences, or tokens, add to its gradient."""
    sequences, tokens = case.batch.batch_size, len(case.dy)
    if tokens != sequences * case.batch.sequence_length:
        return
    direction = case.rng.normal(size=case.tensors[tensor].shape)
    for parts, what in ((sequences, "sequence"), (tokens, "token")):
        right, silent = [], []
        for part in range(min(parts, MOST_ROWS)):
            dy = np.zeros_like(case.dy)
            chosen = slice(part * tokens // parts, (part + 1) * tokens // parts)
            dy[chosen] = case.dy[chosen]
            given = case.gradients(dy)[tensor]
            wanted = case.best_slope(tensor, direction, dy)
            close = CLOSE * max(abs(wanted), float(np.linalg.norm(given)))
            if abs((given * direction).sum() - wanted) <= close and given.any():
                right.append(part)
            elif not given.any():
                silent.append(part)
        if right and silent:
            yield Kind(
                "missing sum",
                f"{what} {right[0]} adds to its gradient, and {what} {silent[0]} does not: a sum over "
                f"{what}s is missing",
            )


def _tokens(case: Any, gradient: Any) -> Iterator[Kind]:
    """Of x: the gradients that the dy of one token gives the tokens around it."""
    tokens = len(case.dy)
    if gradient.ndim != 2 or len(gradient) != tokens or tokens == 1:
        return
    length = case.batch.sequence_length
    token = length // 2 if length > 1 else 0
    rows = [token, *sorted(set(range(tokens)) - {token}, key=lambda row: abs(row - token))]
    rows = rows[:MOST_ROWS]
    dy = np.zeros_like(case.dy)
    dy[token] = case.dy[token]
    given = case.gradients(dy)["x"]
    gives, wants = [], []
    for row in rows:
        direction = np.zeros_like(gradient)
        direction[row] = case.rng.normal(size=gradient.shape[1])
        gives.append(float((given * direction).sum()))
        wants.append(case.best_slope("x", direction, dy))
    size = CLOSE * max(map(abs, (*gives, *wants)))
    wrong = [abs(a - b) > size for a, b in zip(gives, wants, strict=True)]
    mixes, mixed = (any(abs(a) > size for a in side[1:]) for side in (gives, wants))
    if mixes and not mixed:
        yield Kind(
            "wrong axis",
            "backward mixes tokens that forward keeps apart: a sum or a mean over the wrong axis?",
        )
    if mixed and not mixes:
        yield Kind(
            "tokens apart", "backward lacks the gradient from other tokens, which forward mixes"
        )
    if any(wrong[1:]) and not wrong[0]:
        at = wrong.index(True)
        ratio = Fraction(gives[at] / wants[at]).limit_denominator(64) if wants[at] else None
        times = "" if ratio is None else f", {ratio} times what it should be for token {rows[at]}"
        yield Kind(
            "between tokens",
            f"a token's dy gives the right gradient to that token, and a wrong one to other tokens{times}",
        )


def _entries(case: Any, gradient: Any, gives: Any, wants: Any) -> Iterator[Kind]:
    """Of x: whether backward goes entry by entry, as forward does."""
    if case.dy.shape != gradient.shape:
        return
    middle = tuple(n // 2 for n in gradient.shape)
    dy = np.zeros_like(case.dy)
    dy[middle] = case.dy[middle]
    others = case.rng.normal(size=gradient.shape)
    others[middle] = 0
    given = case.gradients(dy)["x"]
    size = CLOSE * float(np.abs(wants).max())
    mixes, mixed = abs((given * others).sum()) > size, abs(case.best_slope("x", others, dy)) > size
    if mixes and not mixed:
        yield Kind(
            "wrong axis",
            "backward mixes entries that forward keeps apart: a sum or a mean over the wrong axis?",
        )
    if mixed and not mixes:
        yield Kind("features apart", "backward lacks the gradient from the token's other features")
    if mixes or mixed:
        return
    right = np.abs(gives - wants) <= size
    if (right | (np.abs(wants) <= size)).all():
        yield Kind(
            "mask",
            "it should be zero in some entries, and is right in the others: a mask (of dropout or of relu) "
            "is missing",
        )
    if (gradient == case.dy).all():
        yield Kind(
            "derivative",
            "backward hands dy on as it is: the derivative of an activation is missing",
        )
    yield Kind(
        "elementwise",
        "each entry has a wrong factor of its own: another derivative, or a wrong array in the stash?",
    )

"""Drawing a pair of groups exactly from its distribution, without looking at all pairs.

A pair's change is linear in bits = log2(k - 1), and bits falls slowly. So for each group the least
and the largest change over all its partners are kept at both ends of a range of k; in between, a
straight line bounds them. The bounds stay true when groups disappear, and take in those that
change; they are made exact again only where they are looked at.

Drawing is by rejection: a row with its bound's weight, a partner uniformly, accepted by what the
pair's own weight is of the bound's. Where the bounds are exact a row has one partner at least that
meets its bound, so that k proposals are enough on average; they are made k at a time.
"""

import numpy as np
from jaxtyping import Float, Int

from spd_analysis.clustering.config import MCMCDraw, RangeDraw
from spd_analysis.clustering.groups import Groups

SHRINK = 0.8  # the range of k over which bounds are kept
BLOCK = 32  # rows made exact together
ROUNDING = 1e-9  # of a bound, in bits per sample


class Bounds:
    """Of sign * change, sign 1 and -1, for every slot: a lower bound at both ends of the range.

    All slots of `groups` must be in use when they are made.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.least_k = max(2, int(SHRINK * groups.k))
        self.ends = np.log2([self.least_k - 1, groups.k - 1])
        self.lower = np.full((2, 2, groups.k), np.inf)  # sign, end, slot
        for start in range(0, groups.k, BLOCK):
            self.tighten(groups.alive[start : start + BLOCK])

    def at(self, bits: float) -> Float[np.ndarray, "2 k"]:
        """The bounds of sign * change for the groups that are alive."""
        low, high = self.ends
        weight = (bits - low) / (high - low) if high > low else 0.0
        lower = self.lower[:, :, self.groups.alive]
        return lower[:, 0] + weight * (lower[:, 1] - lower[:, 0])

    def tighten(self, rows: Int[np.ndarray, "rows"]) -> None:
        """Make the bounds of these slots exact."""
        self.lower[0][:, rows], self.lower[1][:, rows] = (
            each.min(axis=2) for each in self._signed(rows)
        )

    def take_in(self, row: int) -> None:
        """Regard that all pairs of a slot have changed."""
        alive = self.groups.alive
        changes = np.stack([each[:, 0] for each in self._signed(np.array([row]))])
        self.lower[:, :, alive] = np.minimum(self.lower[:, :, alive], changes)
        self.lower[:, :, row] = changes.min(axis=2)

    def extreme(self, sign: int) -> float:
        """The least (1) or largest (-1) change of all pairs: rows in the order of their bounds."""
        groups, best = self.groups, np.inf
        bounds = self.at(groups.bits)[0 if sign == 1 else 1]
        for place in np.argsort(bounds):
            if bounds[place] >= best:
                break
            row = groups.alive[place]
            others = groups.alive[groups.alive != row]
            best = min(best, (sign * groups.changes(row, others, groups.bits)).min())
            self.tighten(np.array([row]))
        return float(sign * best)

    def _signed(self, rows: Int[np.ndarray, "rows"]) -> list[Float[np.ndarray, "2 rows k"]]:
        """sign * change at both ends; infinite for a row with itself."""
        alive = self.groups.alive
        changes = self.groups.changes(rows[:, None], alive, self.ends[:, None, None])
        itself = rows[:, None] == alive
        return [np.where(itself, np.inf, sign * changes) for sign in (1, -1)]


def draw_pair(
    groups: Groups, bounds: Bounds, draw: RangeDraw | MCMCDraw, rng: np.random.Generator
) -> tuple[int, int]:
    """Two slots, drawn as the config says."""
    bits, alive, k = groups.bits, groups.alive, groups.k
    limit = np.inf
    if isinstance(draw, RangeDraw):
        least, largest = bounds.extreme(1), bounds.extreme(-1)
        # Rounding must not leave out the best, nor the worst where the threshold is 1.
        limit = max(least, (1 - draw.threshold) * least + draw.threshold * largest)
    while True:
        lower = bounds.at(bits)[0]
        match draw:
            case RangeDraw():
                weights = (lower <= limit + ROUNDING).astype(float)
            case MCMCDraw(temperature=temperature):
                weights = np.exp((lower.min() - lower) / temperature)
        rows, columns = rng.choice(k, k, p=weights / weights.sum()), rng.integers(k, size=k)
        changes = groups.changes(alive[rows], alive[columns], bits)
        changes[rows == columns] = np.inf
        match draw:
            case RangeDraw():
                accepted = changes <= limit
            case MCMCDraw(temperature=temperature):
                accepted = rng.random(k) < np.exp((lower[rows] - changes) / temperature)
        if accepted.any():
            first = accepted.argmax()
            return int(alive[rows[first]]), int(alive[columns[first]])
        # Bounds that are not met are what makes it take long.
        most = np.bincount(rows, minlength=k).argsort()[::-1][:BLOCK]
        bounds.tighten(alive[most])

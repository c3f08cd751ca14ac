"""A partition while it changes: activations and co-activations of its groups, kept up to date."""

import numpy as np
from jaxtyping import Float, Int

from spd_analysis.clustering.activations import Activations
from spd_analysis.clustering.cost import description_length, pair_change

BLOCK = 16  # rows of activations looked at together: what fits into the cache


class Groups:
    """Every group has a slot, an index into the arrays below; merging frees one.

    sums: of each group's activation over samples. co_sums: of the activation in common, of any
    two (float32 holds counts up to 2^24 exactly). label: a slot's name in the history, one of the
    subcomponents' indices. slot_of: the slot of each subcomponent.
    """

    def __init__(self, activations: Activations, alpha: float) -> None:
        n = len(activations.subcomponents)
        if activations.n_samples >= 2**24:
            raise ValueError(f"{activations.n_samples} samples are too many: at most 2^24")
        self.activations, self.alpha = activations, alpha
        self.values = activations.values.copy()
        self.sums = activations.total(self.values)
        self.n_members = np.ones(n, np.int64)
        self.label, self.slot_of = np.arange(n), np.arange(n)
        self.alive = np.arange(n)
        self.co_sums = np.zeros((n, n), np.float32)
        for slot in range(n):  # the other half is its mirror image
            self.co_sums[slot, slot:] = self._in_common(self.values[:, slot], first=slot)
            self.co_sums[slot:, slot] = self.co_sums[slot, slot:]

    @property
    def k(self) -> int:
        return len(self.alive)

    @property
    def bits(self) -> float:
        """That name one of the groups after the next merge."""
        return float(np.log2(self.k - 1))

    def cost(self) -> float:
        s = self.sums[self.alive] / self.activations.n_samples
        return description_length(s, self.n_members[self.alive], self.alpha)

    def changes(
        self,
        i: int | Int[np.ndarray, "#*pairs"],
        j: int | Int[np.ndarray, "#*pairs"],
        bits: float | Float[np.ndarray, "#*pairs"],
    ) -> Float[np.ndarray, "*pairs"]:
        """What merging slots i and j changes, less S log2((k - 1) / k), which any merge does."""
        s, n = self.sums / self.activations.n_samples, self.n_members
        both = self.co_sums[i, j].astype(np.float64) / self.activations.n_samples
        return np.asarray(pair_change((s[i], s[j]), (n[i], n[j]), both, bits, self.alpha))

    def merge(self, i: int, j: int) -> None:
        """Slot i holds both groups afterwards; j is free.

        The samples in common of m and the union are those with i, plus those with j, less those
        that all three have in common: only samples of both i and j need to be looked at.
        """
        pair = self.values[:, [i, j]]
        twice = self._in_common(self.activations.common(pair[:, :1], pair[:, 1:])[:, 0])
        self.alive = self.alive[self.alive != j]
        self.slot_of[self.slot_of == j] = i
        self.n_members[i] += self.n_members[j]
        self._set(i, self.activations.union(pair), self.co_sums[i] + self.co_sums[j] - twice)

    def pop(self, subcomponent: int, free: int) -> int | None:
        """Put a subcomponent alone into a free slot; returns that of what remains of its group.

        None where it is alone already.
        """
        rest = self.slot_of[subcomponent]
        if self.n_members[rest] == 1:
            return None
        self.alive = np.sort(np.append(self.alive, free))
        self.slot_of[subcomponent] = free
        members = np.flatnonzero(self.slot_of == rest)
        self.n_members[rest], self.n_members[free] = len(members), 1
        for slot, who in ((rest, members), (free, [subcomponent])):
            self.values[:, slot] = self.activations.union(self.activations.values[:, who])
        for slot in (rest, free):
            self._set(slot, self.values[:, slot], self._in_common(self.values[:, slot]))
        return int(rest)

    def drop_free_slots(self) -> None:
        new = np.zeros(len(self.sums), np.int64)
        new[self.alive] = np.arange(self.k)
        self.slot_of = new[self.slot_of]
        self.values = self.values.take(self.alive, axis=1)  # [:, alive] is a transposed copy: slow
        self.co_sums = self.co_sums[np.ix_(self.alive, self.alive)]
        self.sums, self.n_members = self.sums[self.alive], self.n_members[self.alive]
        self.label, self.alive = self.label[self.alive], np.arange(self.k)

    def _set(self, slot: int, values: np.ndarray, co_sums: Float[np.ndarray, "slots"]) -> None:
        self.values[:, slot] = values
        self.sums[slot] = self.activations.total(values[:, None])[0]
        self.co_sums[slot] = self.co_sums[:, slot] = co_sums
        self.co_sums[slot, slot] = self.sums[slot]

    def _in_common(self, values: np.ndarray, first: int = 0) -> Float[np.ndarray, "slots"]:
        """The sum of activation in common with each slot from `first` on."""
        rows, sums = np.flatnonzero(values), np.zeros(self.values.shape[1] - first)
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            common = self.activations.common(self.values[block, first:], values[block, None])
            sums += self.activations.total(common)
        return sums

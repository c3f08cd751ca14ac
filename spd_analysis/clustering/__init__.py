"""Subcomponents grouped into components by minimum description length.

A subcomponent is active on a sample (one position of one example) where its causal importance is
above a threshold; a group, where any of its members is. Whoever wants to describe a sample names
the active groups, log2(k) bits each, and pays alpha per member of each of them:

    cost = sum over groups g of s_g (log2(k) + alpha r_g)        bits per sample

k groups; s_g the share of samples on which g is active; r_g its rank, here its number of members.

    groups <- one for every subcomponent that is alive
    until `iters` iterations, or one group:
        change[i, j] <- cost with i and j merged - cost, for all pairs of groups
        (i, j) <- a pair drawn among the cheapest:
            range: uniform over change <= least + threshold (largest - least)
            mcmc:  with probability ~ exp(-change / temperature)
        i <- i and j together                                             (j is free now)
        with probability pop_component_prob:
            p <- a subcomponent, uniformly; unless it is alone: j <- p alone, out of its group
        note i, j, p and the cost

With c_ij the share of samples on which both are active, s_ij = s_i + s_j - c_ij that of their
union, and b = log2(k - 1),

    change[i, j] = (sum of s) (b - log2(k)) - c_ij b + alpha (s_ij r_ij - s_i r_i - s_j r_j)

which is (S - s_i - s_j) log2((k-1)/k) + s_ij log2(k-1) - (s_i + s_j) log2(k) + alpha (...) with
its terms in another order, S the sum of s. The first term is the same for all pairs, the rest is
linear in b: `draw.py` lives on that.

With raw importances (activation_threshold: null) s is a mean importance, the union of two groups
their maximum on each sample and c the mean of their minimum; all of the above holds as it stands.

Complexity, with n subcomponents alive and N samples in w words (w = N/64; w = N for raw values):
memory n^2 float32 + 2 n w words; the start O(n^2 w) for the co-activations; an iteration O(k) for
the draw and O(k w') for the co-activations of the merged group, w' <= w the words that hold a
sample on which both were active (a pop: those of what remains, and of what popped); O(k^2) once
each time that k has shrunk by a fifth.
"""

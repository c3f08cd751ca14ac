"""On which samples every subcomponent is active: what a clustering looks at."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from spd_analysis.clustering.config import ClusteringConfig
from spd_analysis.observe import observe
from spd_core.data.batches import Decomposition
from spd_core.metrics import matching

Values = Shaped[np.ndarray, "rows groups"]


@dataclass(frozen=True)
class Activations:
    """`values` has a column per subcomponent that is alive.

    binary: a row is 64 samples, as the bits of a uint64. raw: a row is one sample, in float32.
    """

    kind: Literal["binary", "raw"]
    values: Values
    n_samples: int
    subcomponents: list[str]
    n_dead: int

    def union(self, values: Values) -> Shaped[np.ndarray, "rows"]:
        """Where any of these columns is active, and how much."""
        return (np.bitwise_or if self.kind == "binary" else np.maximum).reduce(values, axis=1)

    def common(self, values: Values, column: Shaped[np.ndarray, "rows 1"]) -> Values:
        """Where both are active, and how much."""
        return (np.bitwise_and if self.kind == "binary" else np.minimum)(values, column)

    def total(self, values: Values) -> Float[np.ndarray, "groups"]:
        """The sum over samples of every column."""
        if self.kind == "binary":
            return np.bitwise_count(values).sum(0, dtype=np.int32).astype(np.float64)
        return values.sum(0, dtype=np.float64)


def collect(d: Decomposition, config: ClusteringConfig) -> Activations:
    """Causal importances on batches that (config.seed, config.data) determine, positions flattened.

    Raises:
        ValueError: no module is matched, or no subcomponent is alive.
    """
    components = d.model.components
    names = matching(list(components), config.modules)
    if not names:
        decomposed = ", ".join(components)
        raise ValueError(f"modules={config.modules} matches none of the decomposed {decomposed}")
    parts: list[np.ndarray] = []
    C = sum(components[name].C for name in names)
    largest, n_samples = np.zeros(C, np.float32), 0
    batch_size = config.data.batch_size or d.config.eval.batch_size // d.config.dp
    while n_samples < config.data.n_samples:
        seen = observe(d, config.seed, len(parts), batch_size, "clustering")
        values = np.concatenate([seen.ci[name].cpu().numpy() for name in names], axis=1)
        largest = np.maximum(largest, values.max(0))
        n_samples += len(values)
        if config.activation_threshold is not None:
            values = np.packbits(values > config.activation_threshold, axis=0)
        parts.append(values)
    alive = largest > config.filter_dead_threshold
    if not alive.any():
        raise ValueError(
            f"no subcomponent of {', '.join(names)} has a causal importance above "
            f"filter_dead_threshold={config.filter_dead_threshold} on {n_samples} samples: "
            "there is nothing to cluster"
        )
    labels = [f"{name}:{i}" for name in names for i in range(components[name].C)]
    subcomponents = [label for label, lives in zip(labels, alive, strict=True) if lives]
    values = np.concatenate([part[:, alive] for part in parts])
    n_dead = C - len(subcomponents)
    if config.activation_threshold is None:
        return Activations("raw", values, n_samples, subcomponents, n_dead)
    return Activations("binary", _as_words(values), n_samples, subcomponents, n_dead)


def _as_words(octets: Shaped[np.ndarray, "octets n"]) -> Shaped[np.ndarray, "words n"]:
    """Rows of 8 samples as rows of 64; the last is filled up with samples where none is active."""
    filled = np.pad(octets, ((0, -len(octets) % 8), (0, 0)))
    n = filled.shape[1]
    return np.ascontiguousarray(filled.reshape(-1, 8, n).transpose(0, 2, 1)).view(np.uint64)[..., 0]

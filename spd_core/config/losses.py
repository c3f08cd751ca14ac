"""The options of every loss. Trained ones add a coefficient; as a metric they add a frequency."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from spd_core.base_config import BaseConfig, Count, CustomConfig, Fraction, Positive, ScheduleConfig

When = Literal["fast", "slow"] | Count  # at every eval, at the slow ones, every so many steps


class LossConfig(BaseConfig):
    """A loss without options. In `losses` it has a coefficient, in `eval.metrics` a frequency."""

    coeff: float | ScheduleConfig | None = Field(None, description="weight in training")
    when: When | None = Field(None, description="fast, slow, or every so many steps")


class ImportanceMinimalityConfig(LossConfig):
    p: Positive
    beta: Annotated[float, Field(ge=0)] = Field(description="weight of the log2 frequency term")
    p_anneal_start_frac: Fraction
    p_anneal_end_frac: Fraction
    p_anneal_final_p: Positive

    @model_validator(mode="after")
    def _anneal_order(self) -> Self:
        start, end = self.p_anneal_start_frac, self.p_anneal_end_frac
        if end < start:
            raise ValueError(f"p_anneal_end_frac={end} lies before p_anneal_start_frac={start}")
        return self


class UniformKSubsetConfig(BaseConfig):
    kind: Literal["uniform_k_subset"]


class StaticProbabilityConfig(BaseConfig):
    kind: Literal["static_probability"]
    p: Fraction = Field(description="probability that a module runs on its components")


Subset = UniformKSubsetConfig | StaticProbabilityConfig
SubsetRouting = Annotated[Subset, Field(discriminator="kind")]
Routing = Literal["all", "layerwise"] | SubsetRouting


class SubsetReconConfig(LossConfig):
    routing: SubsetRouting


class PGDConfig(BaseConfig):
    """How the worst masks are looked for (projected gradient ascent on the sources)."""

    init: Literal["random", "ones", "zeroes"]
    step_size: Positive
    n_steps: Annotated[int, Field(ge=0)]


class PGDReconConfig(LossConfig, PGDConfig):
    scope: Literal["unique_per_datapoint", "shared_across_batch"]


class PGDSubsetReconConfig(PGDReconConfig, SubsetReconConfig):
    """With the options of both."""


class PGDMultibatchConfig(LossConfig, PGDConfig):
    """PGD over many batches at once: the sources are shared by all of them. Only measured."""

    routing: Routing
    n_batches: Count


class CustomLossConfig(LossConfig, CustomConfig):
    """A loss of the user's own."""


class LossNames(BaseConfig, extra="allow"):  # parts of the user's own have own names
    """Every loss, trained or measured; one that is absent (null) is not computed."""

    importance_minimality: ImportanceMinimalityConfig | None = None
    faithfulness: LossConfig | None = None
    unmasked_recon: LossConfig | None = None
    ci_masked_recon: LossConfig | None = None
    ci_masked_recon_subset: SubsetReconConfig | None = None
    ci_masked_recon_layerwise: LossConfig | None = None
    stochastic_recon: LossConfig | None = None
    stochastic_recon_subset: SubsetReconConfig | None = None
    stochastic_recon_layerwise: LossConfig | None = None
    pgd_recon: PGDReconConfig | None = None
    pgd_recon_subset: PGDSubsetReconConfig | None = None
    pgd_recon_layerwise: PGDReconConfig | None = None
    stochastic_hidden_acts_recon: LossConfig | None = None

    def configured(self) -> dict[str, Any]:
        """The parts that are on, also those of the user's own, by name."""
        return {name: part for name, part in self if part is not None}


class LossesConfig(LossNames):
    """The trained losses; others than the named ones need a `path`."""

    __pydantic_extra__: dict[str, CustomLossConfig | None]  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _each_has_a_coeff(self) -> Self:
        if not self.configured():
            raise ValueError(f"at least one loss is needed: {', '.join(type(self).model_fields)}")
        if "total" in self.configured():
            raise ValueError("total is the name of the weighted sum; call your loss otherwise")
        for name, loss in self.configured().items():
            if loss.coeff is None or loss.when is not None:
                raise ValueError(f"{name} needs a coeff, and no `when`: losses.{name}.coeff=1.0")
        return self

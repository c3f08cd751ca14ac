"""What is decomposed, and on which data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spd_core.base_config import BaseConfig, Count, Fraction, ScheduleConfig, Seed


class TrainedTargetConfig(BaseConfig):
    """A target that this project trains itself, with AdamW, and keeps in the target store."""

    from_run: str | None = Field(
        description="take the target of this run, a folder, run id or W&B run, and train none; "
        "fields that say how it was trained then mean nothing"
    )
    batch_size: Count
    steps: Count
    lr: ScheduleConfig
    weight_decay: Annotated[float, Field(ge=0)]
    seed: Seed = Field(description="first seed to try; a bad target is retrained with the next")
    n_seeds: Count = Field(description="how many seeds to try before giving up")


class TMSTargetConfig(TrainedTargetConfig):
    """Toy model of superposition: x_hat = ReLU(W2 [H] W1 x + b), W2 = W1^T, H = identity."""

    kind: Literal["tms"]
    n_features: Count
    n_hidden: Count
    n_hidden_layers: Annotated[int, Field(ge=0)] = Field(description="fixed identity matrices H")
    init_bias_to_zero: bool


class ResidMLPTargetConfig(TrainedTargetConfig):
    """MLPs on a residual stream of embedded features, trained to output ReLU(x) + x."""

    kind: Literal["resid_mlp"]
    n_features: Count
    d_embed: Count
    d_mlp: Count = Field(description="neurons of each layer")
    n_layers: Count


class InductionTargetConfig(TrainedTargetConfig):
    """Attention-only transformer that predicts the memorised token after its second cue."""

    kind: Literal["induction"]
    d_model: Count
    n_heads: Count
    n_layers: Count
    accuracy: Fraction = Field(description="training stops here; below it the target is bad")


class TransformerTargetConfig(TrainedTargetConfig):
    """Small language model, pretrained on the text of `data`.

    llama_simple: RMSNorm, RoPE, SwiGLU; llama_simple_mlp: the same with a GELU MLP;
    gpt2_simple: LayerNorm, learned positions, GELU MLP; gpt2_simple_noln: without LayerNorm.
    """

    kind: Literal["llama_simple", "llama_simple_mlp", "gpt2_simple", "gpt2_simple_noln"]
    d_model: Count
    d_mlp: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count = Field(description="n_heads for every kind but the llamas")
    grad_clip: Annotated[float, Field(gt=0)]
    autocast: Literal["off", "bf16"]

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model={self.d_model} must divide by n_heads={self.n_heads}, "
                f"and n_heads by n_kv_heads={self.n_kv_heads}"
            )
        if self.kind.startswith("gpt2") and self.n_kv_heads != self.n_heads:
            raise ValueError(f"{self.kind} has n_kv_heads = n_heads; set n_kv_heads={self.n_heads}")
        if self.kind.startswith("llama") and self.d_model // self.n_heads % 2:
            raise ValueError(
                f"RoPE turns pairs of features: d_model / n_heads = {self.d_model // self.n_heads} "
                "must be even"
            )
        return self


class CustomTargetConfig(BaseConfig):
    """Any importable nn.Module, for example a class of transformers."""

    kind: Literal["custom"]
    class_path: str = Field(
        pattern=r"^\w+(\.\w+)+$",
        description="import path of the class, transformers.GPT2LMHeadModel",
    )
    pretrained: str | None = Field(
        description="argument of its from_pretrained: a Hugging Face name or a folder; null = "
        "call the class without arguments"
    )
    n_features: Count | None = Field(description="size of its input, for data.kind=sparse_features")
    output: str | int | None = Field(
        description="attribute or index of what it returns that is reconstructed; null = the tensor"
    )


TargetConfig = Annotated[
    TMSTargetConfig
    | ResidMLPTargetConfig
    | InductionTargetConfig
    | TransformerTargetConfig
    | CustomTargetConfig,
    Field(discriminator="kind"),
]


def data_kind_of(target: TargetConfig) -> str | None:
    """The kind of data that a target takes; None where it may be any."""
    match target.kind:
        case "tms" | "resid_mlp":
            return "sparse_features"
        case "induction":
            return "induction"
        case "llama_simple" | "llama_simple_mlp" | "gpt2_simple" | "gpt2_simple_noln":
            return "text"
        case "custom":
            return None


class SparseFeatureDataConfig(BaseConfig):
    """Each feature is uniform over the range with the given probability, else 0."""

    kind: Literal["sparse_features"]
    feature_probability: Annotated[float, Field(gt=0, le=1)]
    generation: Literal["at_least_zero_active", "exactly_one_active"]
    value_range: Literal["zero_to_one", "minus_one_to_one"]
    synced: list[list[Annotated[int, Field(ge=0)]]] = Field(
        description="groups of features that are on together"
    )


class InductionDataConfig(BaseConfig):
    """Sequences T...T S M T...T S, M next: base tokens T, the cue S, and the memorised token M."""

    kind: Literal["induction"]
    vocab_size: Count = Field(description="base tokens; the cue is one more")
    seq_len: Count


class TextDataConfig(BaseConfig):
    """Sequences of tokens from a corpus, packed, addressed by (seed, step, place in the batch)."""

    kind: Literal["text"]
    source: Literal["stories", "files", "hub"] = Field(
        description="generated here, local text/JSONL/parquet, or a Hugging Face dataset"
    )
    path: str | None = Field(
        description="glob of .txt, .jsonl and .parquet files, or a Hugging Face name or folder"
    )
    split: str | None = Field(description="of the Hugging Face dataset, train for example")
    column: str | None = Field(description="field that holds the text; null for plain text")
    n_documents: Count | None = Field(
        description="how many stories, or the first of the files or the dataset, which is then "
        "streamed and not downloaded whole; null = all"
    )
    tokenizer: str | None = Field(
        description="Hugging Face name or folder; null = trained on the corpus"
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        description="of a tokenizer that is trained here: 256 bytes, end of text, and merges"
    )
    seq_len: Count
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="share of the documents kept for evaluation"
    )
    seed: Seed = Field(description="of the stories and of the choice of evaluation documents")

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        needed = {"stories": ["n_documents"], "files": ["path"], "hub": ["path", "split", "column"]}
        missing = [f"data.{n}" for n in needed[self.source] if getattr(self, n) is None]
        if missing:
            raise ValueError(f"data.source={self.source} needs {' and '.join(missing)}")
        return self


DataConfig = Annotated[
    SparseFeatureDataConfig | InductionDataConfig | TextDataConfig, Field(discriminator="kind")
]

"""A small model of tokens for harvests: untrained, with a prediction at every position."""

from functools import cache
from pathlib import Path

import torch
from torch import nn

from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.data.batches import Decomposition
from spd_core.distributed import Dist
from spd_launch.compose import compose
from spd_launch.config import run_config
from spd_launch.validate import validate

N_TOKENS, SEQ = 11, 9


@cache
def token_config() -> RunConfig:
    arguments = [
        "+experiment=ih", "cluster=local", f"data.vocab_size={N_TOKENS - 1}",
        f"data.seq_len={SEQ}", "decompose.ci_fn.hidden=[3]", "eval.batch_size=6",
    ]  # fmt: skip
    values = compose(arguments, multirun=False)[0].values
    return run_config(validate(values))


class EachToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(N_TOKENS, 6)
        self.head = nn.Linear(6, N_TOKENS)

    def forward(self, tokens):
        return self.head(self.wte(tokens).cumsum(1))


def token_decomposition() -> Decomposition:
    torch.manual_seed(0)
    decompose = token_config().decompose.model_copy(
        update={"modules": {"wte": 4, "head": 5},
                "ci_fn": token_config().decompose.ci_fn.model_copy(update={"kind": "mlp"})}
    )  # fmt: skip
    config = token_config().model_copy(update={"decompose": decompose})
    model = ComponentModel(EachToken(), decompose, seed=0)
    model.ci_fns["head"].weights[-1].data *= 20  # many importances are exactly 1
    model.ci_fns["wte"].biases[-1].data[0] = -9  # and one subcomponent is dead
    return Decomposition(config, model, Dist(0, 1, torch.device("cpu")), Path("nowhere"))

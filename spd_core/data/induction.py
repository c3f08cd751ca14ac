"""Induction sequences: a token M follows the cue S once; after the second cue, M is next."""

import torch
from jaxtyping import Int
from torch import Tensor

from spd_core.randomness import BatchStream
from spd_core.targets.config import InductionDataConfig


def induction_sequences(
    config: InductionDataConfig, stream: BatchStream
) -> Int[Tensor, "batch seq_plus_1"]:
    """T...T S M T...T S M: base tokens 0..vocab_size-1, the cue S = vocab_size; M is the label.

    The first cue stands anywhere that leaves room for M before the second.
    """
    tokens = stream.integers(0, config.vocab_size, config.seq_len + 1)
    first_cue = stream.integers(0, config.seq_len - 2)
    rows = torch.arange(len(tokens), device=tokens.device)
    memorised = tokens[rows, first_cue + 1]
    tokens[rows, first_cue] = config.vocab_size
    tokens[:, -2] = config.vocab_size
    tokens[:, -1] = memorised
    return tokens

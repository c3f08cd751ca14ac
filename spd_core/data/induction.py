"""Induction sequences: a token M follows the cue S once; after the second cue, M is next."""

from jaxtyping import Int
from torch import Tensor

from spd_core.randomness import Stream
from spd_core.targets.config import InductionDataConfig


def induction_sequences(
    config: InductionDataConfig, stream: Stream
) -> Int[Tensor, "batch seq_plus_1"]:
    """T...T S M T...T S M: base tokens 0..vocab_size-1, the cue S = vocab_size; M is the label.

    The first cue stands anywhere that leaves room for M before the second.
    """
    tokens = stream.integers(0, config.vocab_size, config.seq_len + 1)
    first_cue = stream.integers(0, config.seq_len - 2)
    memorised = tokens.gather(1, first_cue[:, None] + 1)
    tokens.scatter_(1, first_cue[:, None], config.vocab_size)
    tokens[:, -2] = config.vocab_size
    tokens[:, -1:] = memorised
    return tokens

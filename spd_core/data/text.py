"""Text: from documents to packed sequences of tokens, tokenised once and kept in a store.

`store/DIGEST/` holds `tokenizer.json`, `train.bin` and `eval.bin` (token ids, an end-of-text token
after every document) and `meta.json`. Which sequences a step sees depends on (seed, step, place in
the global batch) alone: an epoch is a permutation of all sequences.
"""

import fcntl
import functools
import itertools
import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from spd_core.config import config_digest
from spd_core.data.documents import (
    END_OF_TEXT,
    WITHOUT_HUB,
    check_size,
    documents,
    file_sizes,
    is_eval_document,
)
from spd_core.randomness import StepRandomness, stream
from spd_core.run_dir import written_whole
from spd_core.targets.config import TextDataConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODED_TOGETHER = 1000  # documents
Split = Literal["train", "eval"]


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus; the arrays stay on disk until they are read."""

    folder: Path
    train: Int[np.ndarray, "sequences seq"]
    eval: Int[np.ndarray, "sequences seq"]
    vocab_size: int
    end_of_text: int


def load_or_tokenise(config: TextDataConfig, store: Path, console: Console) -> TokenData:
    """The corpus of this config, from the store where it is.

    Raises:
        ValueError: the corpus cannot be read, is too small, or changed after it was tokenised.
    """
    folder = store / config_digest(config)
    store.mkdir(parents=True, exist_ok=True)
    # Several tasks may ask for the same corpus at once: one tokenises it, the others wait here.
    with open(store / f"{folder.name}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _tokenise_into(config, folder, console)
    meta = json.loads((folder / "meta.json").read_text())
    if file_sizes(config) not in ({}, meta["files"]):  # {}: they may be gone, on another machine
        raise ValueError(
            f"the files of data.path={config.path} changed since they were tokenised into "
            f"{folder}, which runs and targets may depend on: give the new corpus another path"
        )
    train, eval_ = (
        np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r")[: n * config.seq_len].reshape(
            n, config.seq_len
        )
        for split in ("train", "eval")
        for n in [meta[split]["tokens"] // config.seq_len]
    )
    return TokenData(folder, train, eval_, meta["vocab_size"], meta["end_of_text"])


def load_tokenizer(data: TokenData) -> "Tokenizer":
    from tokenizers import Tokenizer  # not needed to train

    return Tokenizer.from_file(str(data.folder / "tokenizer.json"))


def token_batch(
    data: TokenData, split: Split, randomness: StepRandomness
) -> Int[Tensor, "batch seq"]:
    """This part of a step's batch; every sequence comes once before any comes again."""
    sequences: Int[np.ndarray, "sequences seq"] = getattr(data, split)
    n, first = len(sequences), randomness.step * randomness.batch_size
    places = [divmod(first + place, n) for place in randomness.examples]
    rows = [_epoch_order(randomness.seed, split, epoch, n)[place] for epoch, place in places]
    tokens = torch.from_numpy(sequences[rows].astype(np.int64))
    # A copy of memory that may be swapped out would wait for the device.
    tokens = tokens.pin_memory() if randomness.device.type == "cuda" else tokens
    return tokens.to(randomness.device, non_blocking=True)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, split: Split, epoch: int, n: int) -> Int[np.ndarray, "n"]:
    generator = stream(seed, f"{split}:epoch", epoch, device=torch.device("cpu"))
    return torch.randperm(n, generator=generator).numpy()


# ---------------------------------------------------------------- tokens


def _tokenise_into(config: TextDataConfig, folder: Path, console: Console) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with written_whole(folder) as new:
        new.mkdir()
        with console.status("tokenising the corpus (once; it is kept in the store)"):
            meta = _write_tokens(config, new)
        (new / "meta.json").write_text(json.dumps(meta, indent=2))
    console.print(f"corpus of {meta['train']['tokens']} tokens, {meta['eval']['tokens']} for eval")


def _write_tokens(config: TextDataConfig, folder: Path) -> dict[str, Any]:
    files = file_sizes(config)
    tokenizer, end_of_text = _given_tokenizer(config) or _train_tokenizer(config)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    counts = {split: {"documents": 0, "tokens": 0} for split in ("train", "eval")}
    places, texts = itertools.count(), documents(config)
    with open(folder / "train.bin", "wb") as train, open(folder / "eval.bin", "wb") as eval_:
        while chunk := list(islice(texts, ENCODED_TOGETHER)):
            for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
                split = "eval" if is_eval_document(config, next(places)) else "train"
                tokens = np.array([*encoding.ids, end_of_text], dtype)
                (eval_ if split == "eval" else train).write(tokens.tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(tokens)
    for split, count in counts.items():
        check_size(config, split, count["documents"], count["tokens"])
    made = {"config": config.model_dump(mode="json"), "files": files, "dtype": dtype.name}
    return made | {"vocab_size": vocab_size, "end_of_text": end_of_text} | counts


def _given_tokenizer(config: TextDataConfig) -> "tuple[Tokenizer, int] | None":
    if config.tokenizer is None:
        return None
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        given = AutoTokenizer.from_pretrained(config.tokenizer)
    except OSError as error:
        raise ValueError(
            f"data.tokenizer={config.tokenizer} cannot be loaded: {' '.join(str(error).split())}; "
            f"{WITHOUT_HUB['data.tokenizer']}"
        ) from None
    tokenizer = getattr(given, "backend_tokenizer", None)
    if tokenizer is None or given.eos_token_id is None:
        lack = "end-of-text token (eos_token)" if tokenizer is not None else "tokenizer.json"
        raise ValueError(f"data.tokenizer={config.tokenizer} has no {lack}, which is needed here")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, given.eos_token_id


def _train_tokenizer(config: TextDataConfig) -> "tuple[Tokenizer, int]":
    """Byte-level BPE of the training documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # only once

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (t for i, t in enumerate(documents(config)) if not is_eval_document(config, i))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, tokenizer.get_vocab()[END_OF_TEXT]

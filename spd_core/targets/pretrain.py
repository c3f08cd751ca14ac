"""Pretraining of the small language models: next-token prediction, on one process or several.

    python -m spd_core.targets.pretrain RUN_FOLDER/config.yaml

puts the run's target into the target store, where the run then finds it (`launch.goal=target` does
so as a job). Several processes are started with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT in their environment. What was killed continues when it is started again.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress, TextColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core import distributed
from spd_core.config import config_digest, load_config
from spd_core.data.text import Split, TokenData, load_tokenizer, token_batch
from spd_core.distributed import Dist
from spd_core.fast.overlap import summed_gradients
from spd_core.randomness import StepRandomness, stream
from spd_core.run_dir import RunDir, written_whole
from spd_core.schedule import schedule_value
from spd_core.targets.config import TransformerTargetConfig
from spd_core.targets.transformer import Transformer, build, sample

CHECKPOINT = "pretrain.safetensors"
N_EVAL_BATCHES = 8
TRIGRAM_TOKENS = 5_000_000  # counted for the comparison: more take gigabytes
PROMPT_TOKENS, SAMPLE_TOKENS, TEMPERATURE = 4, 40, 0.8
PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

Tokens = Int[Tensor, "batch seq"]


class Stopped(Exception):
    """Training was asked to stop, and did; what was done is saved."""


def pretrain(
    config: TransformerTargetConfig,
    batches: Callable[[int], Tokens],
    eval_batches: Sequence[Tokens],
    vocab_size: int,
    seq_len: int,
    dist: Dist,
    folder: Path | None,
    console: Console,
    after_step: Callable[[int], bool],
    decode: Callable[[list[int]], str] = str,
    report_every: int = 200,
) -> tuple[Transformer, float]:
    """A trained model and its validation loss in nats per token; every rank calls this.

    `batches(step)` and `eval_batches` are this rank's parts. With a folder, training continues
    from the checkpoint there, and leaves one at every report. `after_step` is asked with the steps
    done; where one rank answers True, all save and stop.

    Raises:
        Stopped: `after_step` said so.
        FloatingPointError: the loss is not finite at a report.
        ValueError: the folder has the checkpoint of another config.
    """
    init = stream(config.seed, "target_init", device=torch.device("cpu"))
    model = build(config, vocab_size, seq_len, init).to(dist.device)
    optimizer = make_optimizer(config, model)
    first = 0 if folder is None else load_checkpoint(folder, config, model, optimizer)
    distributed.barrier(dist)  # every rank has read it before rank 0 writes the next
    if first:
        console.print(f"continuing the target from step {first}")
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[losses]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pretrain", total=config.steps, completed=first, losses="")
        before, started = first, time.perf_counter()
        for step in range(first, config.steps):
            loss_sum = training_step(config, model, optimizer, batches(step), step, dist)
            done = step + 1
            progress.update(task, completed=done)
            if distributed.any_rank(after_step(done), dist) and done < config.steps:
                if dist.is_main and folder is not None:
                    save_checkpoint(folder, done, config, model, optimizer)
                distributed.barrier(dist)
                console.print(f"the target stops at step {done}")
                raise Stopped
            if done % report_every and done != config.steps:
                continue
            n_tokens = n_predictions(config, seq_len)
            train_loss = distributed.all_reduce("sum", loss_sum, dist).item() / n_tokens
            rate = n_tokens * (done - before) / (time.perf_counter() - started)
            valid_loss = validation_loss(model, eval_batches, dist)
            if not np.isfinite([train_loss, valid_loss]).all():
                raise FloatingPointError(
                    f"the target is not finite at step {done}: loss {train_loss}, validation loss "
                    f"{valid_loss}; lower target.lr.start or target.grad_clip"
                )
            losses = f"loss {train_loss:.3f}  validation {valid_loss:.3f}"
            progress.update(task, losses=losses)
            if dist.is_main:
                if folder is not None:
                    save_checkpoint(folder, done, config, model, optimizer)
                generator = stream(config.seed, "target_sample", done, device=dist.device)
                prompt = eval_batches[0][0, :PROMPT_TOKENS]
                text = decode(sample(model, prompt, SAMPLE_TOKENS, TEMPERATURE, generator).tolist())
                line = f"step {done}/{config.steps}  {losses}  {rate:,.0f} tokens/s\n  {text}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            before, started = done, time.perf_counter()
    return model, validation_loss(model, eval_batches, dist)


def pretrain_on_text(
    config: TransformerTargetConfig,
    data: TokenData,
    dist: Dist,
    folder: Path | None,
    console: Console,
    after_step: Callable[[int], bool],
) -> tuple[Transformer, float]:
    """`pretrain` on a tokenised corpus; says how a trigram model of the same corpus compares."""
    n, seq_len = config.batch_size, data.train.shape[1]

    def batch(split: Split, step: int) -> Tokens:
        place = (config.seed, step, dist.rank, dist.world_size, n, dist.device)
        return token_batch(data, split, StepRandomness(*place))

    n_eval = min(N_EVAL_BATCHES, -(-len(data.eval) // n))
    evals = [batch("eval", i) for i in range(n_eval)]
    decode = partial(load_tokenizer(data).decode, skip_special_tokens=False)
    given = (config, partial(batch, "train"), evals, data.vocab_size, seq_len, dist, folder)
    model, loss = pretrain(*given, console, after_step, decode)
    if dist.is_main:
        n_rows = TRIGRAM_TOKENS // seq_len
        trigram = trigram_loss(data.train[:n_rows], data.eval[:n_rows], data.vocab_size)
        console.print(f"validation loss {loss:.3f} nats, of a trigram model {trigram:.3f}")
    return model, loss


def training_step(
    config: TransformerTargetConfig,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokens: Tokens,
    step: int,
    dist: Dist,
) -> Float[Tensor, ""]:
    """One update; returns the summed loss of this rank's tokens."""
    use_bf16 = config.autocast == "bf16"
    with torch.autocast(dist.device.type, dtype=torch.bfloat16, enabled=use_bf16):
        logits = model(tokens)
    loss_sum = next_token_loss(logits, tokens)
    optimizer.zero_grad(set_to_none=True)
    with summed_gradients(list(model.parameters()), dist):
        (loss_sum / n_predictions(config, tokens.shape[1])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = schedule_value(config.lr, step, config.steps)
    optimizer.step()
    return loss_sum.detach()


def n_predictions(config: TransformerTargetConfig, seq_len: int) -> int:
    """Tokens that all ranks together predict in one step: all but the first of each sequence."""
    return config.batch_size * (seq_len - 1)


def next_token_loss(logits: Float[Tensor, "batch seq vocab"], tokens: Tokens) -> Float[Tensor, ""]:
    """Cross entropy in nats, summed over all predicted tokens."""
    predictions, following = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    return F.cross_entropy(predictions, following, reduction="sum")


def make_optimizer(config: TransformerTargetConfig, model: Transformer) -> torch.optim.AdamW:
    """Matrices decay; norms and biases do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, config.lr.start, (0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )


@torch.no_grad()
def validation_loss(model: Transformer, eval_batches: Sequence[Tokens], dist: Dist) -> float:
    """Nats per predicted token of all ranks, in full precision."""
    loss_sum = torch.stack([next_token_loss(model(t), t).double() for t in eval_batches]).sum()
    count = loss_sum.new_tensor(sum(t[:, 1:].numel() for t in eval_batches))
    loss_sum, count = distributed.all_reduce("sum", torch.stack([loss_sum, count]), dist)
    return (loss_sum / count).item()


def save_checkpoint(
    folder: Path,
    step: int,
    config: TransformerTargetConfig,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replace the checkpoint of the folder by the state after `step` steps, whole or not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model:{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer:{name}:{key}"] = value
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / CHECKPOINT) as new:
        save_file(tensors, new, {"step": str(step), "config": config_digest(config)})


@torch.no_grad()
def load_checkpoint(
    folder: Path,
    config: TransformerTargetConfig,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Copy the folder's checkpoint into model and optimiser; returns its step, 0 without one."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        record = file.metadata()
    if record["config"] != config_digest(config):
        raise ValueError(f"{path} was written with another target config; remove it to start anew")
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model:{name}"])
        prefix = f"optimizer:{name}:"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): tensor.to(parameter.device)
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    return int(record["step"])


def trigram_loss(
    train_tokens: Int[np.ndarray, "n_train train_seq"],
    eval_tokens: Int[np.ndarray, "n_eval eval_seq"],
    vocab_size: int,
) -> float:
    """Nats per token of an interpolated trigram model, on all but the first token of each row.

    With c occurrences of a history, followed by T distinct tokens, the estimate of each order is
    mixed with that of the next lower one (Witten and Bell's smoothing), from 1 / vocab_size up:
    p(w | h) = (c(h w) + T(h) p(w | shorter h)) / (c(h) + T(h)).
    """
    p = np.full(eval_tokens.shape, 1 / vocab_size)
    for order in (1, 2, 3):
        known, wanted = (_grams(t, order, vocab_size) for t in (train_tokens, eval_tokens))
        both = np.concatenate([known.ravel(), wanted.ravel()])
        grams, place = np.unique(both, return_inverse=True)
        c_hw = np.bincount(place[: known.size], minlength=len(grams))
        _, history = np.unique(grams // vocab_size, return_inverse=True)
        c_h, t_h = np.bincount(history, c_hw), np.bincount(history, c_hw > 0)
        gram = place[known.size :].reshape(wanted.shape)
        # An unknown history counts as T = 1, which leaves the lower order as it is.
        c_h, t_h = c_h[history[gram]], np.maximum(t_h, 1)[history[gram]]
        p[:, order - 1 :] = (c_hw[gram] + t_h * p[:, order - 1 :]) / (c_h + t_h)
    return float(-np.log(p[:, 1:]).mean())


def _grams(
    tokens: Int[np.ndarray, "n seq"], order: int, vocab_size: int
) -> Int[np.ndarray, "n seq_grams"]:
    """Every run of `order` tokens of a row as one number, the last token its lowest digit."""
    n = tokens.shape[1] - order + 1
    digits = (tokens[:, i : i + n].astype(np.int64) for i in range(order))
    return reduce(lambda number, digit: number * vocab_size + digit, digits)


def main(config_file: Path) -> None:
    from spd_core.targets.train_target import target_folder, train_target  # it imports this file

    config, env = load_config(config_file), os.environ
    if not isinstance(config.target, TransformerTargetConfig):
        kind = config.target.kind
        sys.exit(f"target.kind={kind} is no language model that this project pretrains")
    store = RunDir(config_file.absolute().parent).targets
    rank, world, local = (int(env.get(n, d)) for n, d in PLACE.items())
    meeting = f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '0')}"
    dist = distributed.init(rank, world, local, meeting, config.train.device)
    console = Console(quiet=not dist.is_main)
    train_target(config, store, dist, console, lambda _: False)
    console.print(f"the target is in {target_folder(config, store)}", soft_wrap=True)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

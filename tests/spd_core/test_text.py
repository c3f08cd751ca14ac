import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from spd_core.data.documents import END_OF_TEXT, documents, is_eval_document
from spd_core.data.stories import stories
from spd_core.data.text import load_or_tokenise, load_tokenizer, token_batch
from spd_core.randomness import StepRandomness
from spd_core.targets.config import TextDataConfig

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
STORIES = list(stories(60, seed=3))


def make(**changes) -> TextDataConfig:
    values = {
        "kind": "text",
        "source": "stories",
        "path": None,
        "split": None,
        "column": None,
        "n_documents": 60,
        "tokenizer": None,
        "vocab_size": 400,
        "seq_len": 16,
        "eval_fraction": 0.2,
        "seed": 3,
    }
    return TextDataConfig.model_validate(values | changes)


def files(path, **changes) -> TextDataConfig:
    return make(source="files", path=str(path), n_documents=None, **changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def data(store):
    return load_or_tokenise(make(), store, QUIET)


def batch(data, step, size, part=0, n_parts=1, seed=0, split="train"):
    return token_batch(data, split, StepRandomness(seed, step, part, n_parts, size, CPU))


# ---------------------------------------------------------------- packing and splits


def test_sequences_are_the_documents_joined_by_end_of_text(data):
    tokenizer = load_tokenizer(data)
    parts = {False: data.train, True: data.eval}
    for is_eval, sequences in parts.items():
        wanted = [t for i, t in enumerate(STORIES) if is_eval_document(make(), i) == is_eval]
        joined = "".join(text + END_OF_TEXT for text in wanted)
        tokens = sequences.reshape(-1).tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        assert joined.startswith(text)
        assert len(tokenizer.encode(joined[len(text) :]).ids) < 16
        assert tokens.count(data.end_of_text) == text.count(END_OF_TEXT) >= len(wanted) - 1


def test_the_record_counts_documents_and_tokens(data):
    meta = json.loads((data.folder / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["eval"]["documents"] == 60
    for split, sequences in (("train", data.train), ("eval", data.eval)):
        assert sequences.shape == (meta[split]["tokens"] // 16, 16)
        width = np.dtype(meta["dtype"]).itemsize
        assert (data.folder / f"{split}.bin").stat().st_size == meta[split]["tokens"] * width
    assert data.vocab_size == meta["vocab_size"] == 400
    assert sequences.dtype == np.uint16


def test_the_tokenizer_never_sees_eval_documents(tmp_path):
    texts = [f"plain words number {i}" for i in range(40)]
    config = files(tmp_path / "a.jsonl", column="text", vocab_size=1000, seq_len=4)
    texts = [t + " zyzzyva" * 9 if is_eval_document(config, i) else t for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = load_tokenizer(load_or_tokenise(config, tmp_path / "store", QUIET))
    vocabulary = tokenizer.get_vocab()
    assert any("number" in token for token in vocabulary)
    assert not any("zy" in token for token in vocabulary)


def test_any_text_comes_back_from_a_tokenizer_trained_on_stories(data):
    text = "Zürich 東京 \t🙂\n\n~"
    tokenizer = load_tokenizer(data)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("size, world", [(7, 1), (7, 3), (8, 8), (64, 5), (1000, 3)])
def test_every_sequence_comes_once_per_epoch(data, size, world):
    n = len(data.train)
    n_steps = -(-2 * n // size)
    rows = torch.cat(
        [batch(data, step, size, rank, world) for step in range(n_steps) for rank in range(world)]
    )
    wanted = sorted(map(tuple, data.train.tolist()))
    first, second = (list(map(tuple, rows[i * n : (i + 1) * n].tolist())) for i in (0, 1))
    assert sorted(first) == sorted(second) == wanted
    assert first != second and first != list(map(tuple, data.train.tolist()))


@pytest.mark.parametrize("size, world", [(10, 3), (6, 6), (5, 2)])
def test_ranks_together_see_what_one_process_sees(data, size, world):
    for step in (0, 3, len(data.train) // size):  # the last goes on into the second epoch
        whole = batch(data, step, size)
        assert torch.equal(
            torch.cat([batch(data, step, size, r, world) for r in range(world)]), whole
        )
        assert whole.shape == (size, 16) and whole.dtype == torch.int64


def test_any_step_can_be_drawn_first(data):
    code = (
        "import sys, torch; from pathlib import Path; from rich.console import Console\n"
        "from spd_core.data.text import load_or_tokenise, token_batch\n"
        "from spd_core.randomness import StepRandomness\n"
        "from spd_core.targets.config import TextDataConfig\n"
        "config = TextDataConfig.model_validate_json(sys.argv[1])\n"
        "data = load_or_tokenise(config, Path(sys.argv[2]), Console(quiet=True))\n"
        "step = StepRandomness(0, 77, 0, 1, 9, torch.device('cpu'))\n"
        "print(token_batch(data, 'train', step).tolist())\n"
        "print({'transformers', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    )
    for step in range(77):
        batch(data, step, 9)
    arguments = [make().model_dump_json(), str(data.folder.parent)]
    out = run(code, arguments).splitlines()
    assert json.loads(out[0]) == batch(data, 77, 9).tolist()
    assert out[1] == "set()"


def test_another_seed_or_split_is_another_order(data):
    assert not torch.equal(batch(data, 0, 50), batch(data, 0, 50, seed=1))
    eval_rows = set(map(tuple, batch(data, 0, len(data.eval), split="eval").tolist()))
    assert eval_rows == set(map(tuple, data.eval.tolist()))


# ---------------------------------------------------------------- the store


def run(code, arguments, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TOKENISE = """
import sys
from pathlib import Path
from rich.console import Console
from spd_core.data.text import load_or_tokenise
from spd_core.targets.config import TextDataConfig
config = TextDataConfig.model_validate_json(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
load_or_tokenise(config, Path(sys.argv[2]), Console())
"""


@pytest.mark.parametrize("moment", [".*", ".*/tokenizer.json", ".*/meta.json"])
def test_a_kill_while_a_corpus_is_tokenised_leaves_nothing_half(moment, data, tmp_path):
    command = [sys.executable, "-c", TOKENISE, make().model_dump_json(), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        while process.poll() is None and not any(tmp_path.glob(moment)):
            time.sleep(0.0005)
        process.kill()
    again = load_or_tokenise(make(), tmp_path, QUIET)
    for file in data.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        again.folder.name, f"{again.folder.name}.lock"
    }  # fmt: skip


def test_processes_that_ask_at_once_get_the_same_corpus(data, tmp_path):
    leftover = tmp_path / f".{data.folder.name}.partial"
    leftover.mkdir()
    (leftover / "train.bin").write_text("of a process that was killed")
    command = [sys.executable, "-c", TOKENISE, make().model_dump_json(), str(tmp_path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    out = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("tokens" in text for text in out) == 1  # only one of them made it
    assert not leftover.exists()
    for file in data.folder.iterdir():
        assert (tmp_path / data.folder.name / file.name).read_bytes() == file.read_bytes()


def test_the_second_call_reads_what_the_first_wrote(data, store):
    before = {f: f.stat().st_mtime_ns for f in data.folder.iterdir()}
    again = load_or_tokenise(make(), store, QUIET)
    assert {f: f.stat().st_mtime_ns for f in again.folder.iterdir()} == before
    assert np.array_equal(again.train, data.train)


# ---------------------------------------------------------------- files, hub, tokenizers


def write_corpus(folder):
    """The same documents in every format."""
    from pyarrow import parquet, table

    folder.mkdir()
    (folder / "a.txt").write_text(f"\n{END_OF_TEXT}\n".join(STORIES))
    rows = [json.dumps({"id": i, "story": text}) for i, text in enumerate(STORIES)]
    (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(rows))
    columns = {"id": list(range(len(STORIES))), "story": STORIES}
    parquet.write_table(table(columns), folder / "a.parquet", row_group_size=7)
    return folder


@pytest.mark.parametrize(
    "suffix, column", [("txt", None), ("jsonl", "story"), ("parquet", "story")]
)
def test_every_format_gives_the_same_tokens(data, suffix, column, tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    config = files(folder / f"*.{suffix}", column=column)
    assert list(documents(config)) == STORIES
    read = load_or_tokenise(config, tmp_path / "store", QUIET)
    assert np.array_equal(read.train, data.train) and np.array_equal(read.eval, data.eval)
    (folder / f"b.{suffix}").write_text("One more.")
    with pytest.raises(ValueError, match="changed since they were tokenised"):
        load_or_tokenise(config, tmp_path / "store", QUIET)


HUB = """
import sys
from pathlib import Path
from rich.console import Console
from spd_core.data.documents import documents
from spd_core.data.text import load_or_tokenise, load_tokenizer
from spd_core.targets.config import TextDataConfig

config = TextDataConfig.model_validate_json(sys.argv[1])
for n in (None, 5):
    print(hash(tuple(documents(config.model_copy(update={"n_documents": n})))))
bad = [{"path": "no/such"}, {"path": "no/such", "n_documents": 3}, {"column": "text"}]
for changes in [*bad, {"tokenizer": "no/such"}]:
    try:
        load_or_tokenise(config.model_copy(update=changes), Path(sys.argv[2]), Console(quiet=True))
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
given = config.model_copy(update={"tokenizer": sys.argv[3]})
data = load_or_tokenise(given, Path(sys.argv[2]), Console(quiet=True))
print(data.train.shape, data.vocab_size, data.end_of_text, (data.train == data.end_of_text).sum())
"""


def test_datasets_and_given_tokenizers(data, tmp_path):
    """In a process of its own, with the hub switched off; a folder stands for a dataset."""
    from pyarrow import parquet, table

    (tmp_path / "dataset").mkdir()
    parquet.write_table(table({"story": STORIES}), tmp_path / "dataset" / "train.parquet")
    # A given tokenizer: that of the stories, under another name for its end of text, cut at 10.
    tokenizer = json.loads((data.folder / "tokenizer.json").read_text().replace(END_OF_TEXT, "[E]"))
    tokenizer["truncation"] = {
        "max_length": 10,
        "strategy": "LongestFirst",
        "direction": "Right",
        "stride": 0,
    }
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[E]"}
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps(about))
    config = make(source="hub", path=str(tmp_path / "dataset"), split="train", column="story")
    out = run(
        HUB,
        [config.model_dump_json(), str(tmp_path / "store"), str(tmp_path / "given")],
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "home"),
        PYTHONHASHSEED="0",
    ).splitlines()
    hashes = run(
        "import sys, json; texts = json.load(sys.stdin) if 0 else json.loads(sys.argv[1])\n"
        "print(hash(tuple(texts)), hash(tuple(texts[:5])))",
        [json.dumps(STORIES)],
        PYTHONHASHSEED="0",
    ).split()
    assert out[:2] == hashes
    for message in out[2:4]:
        assert "data.path=no/such" in message and "source=stories or files runs offline" in message
        assert "HF_HUB_OFFLINE" in message and "HF_HOME" in message
    assert "no column text" in out[4] and "it has story" in out[4]
    assert "data.tokenizer=no/such" in out[5] and "data.tokenizer=null" in out[5]
    ends = int((data.train == data.end_of_text).sum())
    assert out[6] == f"{data.train.shape} {data.vocab_size} {data.end_of_text} {ends}"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "source, missing",
    [("stories", "data.n_documents"), ("files", "data.path"), ("hub", "data.path and data.split")],
)
def test_a_source_needs_its_fields(source, missing):
    with pytest.raises(ValueError, match=f"data.source={source} needs {missing}"):
        make(source=source, n_documents=None)

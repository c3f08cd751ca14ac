"""The documents of a corpus: made up here, read from files, or from the hub. Loads no torch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from spd_core.data.stories import stories
from spd_core.targets.config import TextDataConfig

END_OF_TEXT = "<|endoftext|>"
READ_BEFORE = 20_000_000  # bytes of files that are read whole to look for mistakes
OLD = "what was downloaded before is found with HF_HUB_OFFLINE=1 and the HF_HOME of that time"
WITHOUT_HUB = {
    "data.path": f"data.source=stories or files runs offline; {OLD} and data.n_documents=null",
    "data.tokenizer": f"data.tokenizer=null trains one on the corpus, or give a folder; {OLD}",
    "target.pretrained": f"give a folder, which needs no network; {OLD}",
}
"""Field -> what to do where the hub cannot be reached."""


def documents(config: TextDataConfig) -> Iterator[str]:
    """The corpus, always in the same order, without blank documents."""
    match config.source:
        case "stories":
            texts = stories(config.n_documents or 0, config.seed)
        case "files":
            texts = _file_documents(config)
        case "hub":
            texts = _hub_documents(config)
    return islice((text for text in texts if text.strip()), config.n_documents)


def is_eval_document(config: TextDataConfig, index: int) -> bool:
    digest = hashlib.sha256(f"{config.seed}:eval:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.eval_fraction * 2**64


def check_size(
    config: TextDataConfig, split: str, n_documents: int, n_tokens: int, about: str = ""
) -> None:
    """Refuse a part of the corpus that is smaller than one sequence."""
    if n_tokens < config.seq_len:
        raise ValueError(
            f"the {split} part of the corpus has {about}{n_tokens} tokens in {n_documents} "
            f"documents, less than one sequence of data.seq_len={config.seq_len}: give it more "
            f"documents (a .txt file is one, or several with {END_OF_TEXT} between them), change "
            f"data.eval_fraction={config.eval_fraction}, or lower data.seq_len"
        )


def check_files(config: TextDataConfig) -> None:
    """Look for mistakes before anything runs; files too large to read have their names checked.

    Raises:
        ValueError: no file, one of another format, one that cannot be read, or too little text.
    """
    _file_readers(config)
    if sum(file_sizes(config).values()) > READ_BEFORE:
        return
    counts = {"train": [0, 0], "eval": [0, 0]}
    for i, text in enumerate(documents(config)):
        count = counts["eval" if is_eval_document(config, i) else "train"]
        count[0] += 1
        # A token is at least a byte; one more ends the text, and some tokenizers begin it.
        count[1] += len(text.encode(errors="replace")) + 2
    for split, (n_documents, n_tokens) in counts.items():
        check_size(config, split, n_documents, n_tokens, "at most ")


def file_sizes(config: TextDataConfig) -> dict[str, int]:
    pattern = os.path.expanduser(config.path or "") if config.source == "files" else ""
    files = (path for path in sorted(glob(pattern, recursive=True)) if os.path.isfile(path))
    return {path: os.path.getsize(path) for path in files}


def _file_readers(config: TextDataConfig) -> dict[Path, Callable[..., Iterator[str]]]:
    """How each file of the corpus is read, in their order."""
    files = [Path(name) for name in file_sizes(config)]
    if not files:
        raise ValueError(f"data.path={config.path} matches no file, seen from {Path.cwd()}")
    readers = {".txt": _plain, ".jsonl": _jsonl, ".parquet": _parquet}
    for path in files:
        if path.suffix not in readers:
            raise ValueError(f"data.path={config.path}: {path} is no .txt, .jsonl or .parquet file")
    return {path: readers[path.suffix] for path in files}


def _file_documents(config: TextDataConfig) -> Iterator[str]:
    for path, reader in _file_readers(config).items():
        empty = True
        for text in reader(path, config.column):
            empty = empty and not text.strip()
            yield text
        if empty:
            raise ValueError(f"data.path={config.path}: {path} is empty, take it out")


def _lines(path: Path) -> Iterator[str]:
    position = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                place = f"byte {line[error.start]:#04x} at offset {position + error.start}"
                raise ValueError(f"{path} is not UTF-8: {place}; convert it with iconv") from None
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(line)


def _plain(path: Path, _: str | None) -> Iterator[str]:
    """A file is one document, or several with the end-of-text mark between them."""
    document: list[str] = []
    for line in _lines(path):
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            yield "".join([*document, end]).strip()
            document = []
        document.append(rest)
    yield "".join(document).strip()


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if row is not None:
            yield _field(row, column, f"{path}:{number}")


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    from pyarrow import ArrowInvalid, parquet  # takes half a second to import

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    _field(dict.fromkeys(file.schema_arrow.names, ""), column, str(path))
    for batch in file.iter_batches(columns=[column]):
        yield from (_field(row, column, str(path)) for row in batch.to_pylist())


def _hub_documents(config: TextDataConfig) -> Iterator[str]:
    import datasets  # takes seconds to import

    options: dict[str, Any] = {"split": config.split, "streaming": config.n_documents is not None}
    try:
        rows = datasets.load_dataset(str(config.path), **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"data.path={config.path} cannot be loaded: {' '.join(str(error).split())}; "
            f"{WITHOUT_HUB['data.path']}"
        ) from None
    yield from (_field(row, config.column, str(config.path)) for row in rows)


def _field(row: Any, column: str | None, where: str) -> str:
    names = list(row) if isinstance(row, dict) else []
    if column not in names:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ValueError(f"{where} has no column {column} (data.column): {has}")
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: {column} holds {type(row[column]).__name__}, not text")
    return row[column]

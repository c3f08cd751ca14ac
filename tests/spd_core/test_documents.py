import subprocess
import sys

import pytest
from test_text import QUIET, STORIES, files, make, write_corpus

from spd_core.data.documents import READ_BEFORE, check_files, documents, is_eval_document
from spd_core.data.text import load_or_tokenise


def test_the_share_of_eval_documents_is_about_right_and_depends_on_the_seed():
    chosen = [{i for i in range(5000) if is_eval_document(make(seed=s), i)} for s in (0, 1)]
    assert all(800 < len(c) < 1200 for c in chosen)
    assert len(chosen[0] & chosen[1]) < 300


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(f"I am {name}.\n")
    texts = list(documents(files(tmp_path / "**" / "*.txt")))
    assert texts == ["I am a.txt.", "I am b.txt.", "I am deep/c.txt."]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.jsonl", b"\n", "a.jsonl is empty"),
        ("a.txt", b"fine\n\xff\xfe", r"a.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.jsonl", b'{"b": "x", "c": 1}\n', r"a.jsonl:1 has no column text .*: it has b, c"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', r"a.jsonl:2: text holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1 has no column text .*: it has none"),
        ("a.parquet", b"nonsense", r"a.parquet is no Parquet file"),
        ("a.csv", b"text\n1\n", r"a.csv is no .txt, .jsonl or .parquet file"),
        ("a.txt", b"too short", r"has (at most )?\d+ tokens in \d documents.* data.seq_len=16"),
    ],
)
def test_a_corpus_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    config = files(tmp_path / "a.*", column="text")
    with pytest.raises(ValueError, match=message):
        check_files(config)
    with pytest.raises(ValueError, match=message):
        load_or_tokenise(config, tmp_path / "store", QUIET)
    assert [f.suffix for f in (tmp_path / "store").iterdir()] == [".lock"]


def test_a_missing_parquet_column_lists_those_there_are(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"a.parquet has no column text .*: it has id, story"):
        list(documents(files(folder / "*.parquet", column="text")))


def test_a_glob_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"data.path=.*nothing.* matches no file"):
        load_or_tokenise(files(tmp_path / "nothing*"), tmp_path / "store", QUIET)
    with pytest.raises(ValueError, match=r"data.path=.*nothing.* matches no file"):
        check_files(files(tmp_path / "nothing*"))


def test_a_corpus_that_can_be_used_passes_the_check(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    for suffix, column in (("txt", None), ("jsonl", "story"), ("parquet", "story")):
        check_files(files(folder / f"*.{suffix}", column=column))
    # One document is in one part, and leaves the other empty.
    (tmp_path / "one.txt").write_text(" ".join(STORIES))
    with pytest.raises(ValueError, match="part of the corpus has at most 0 tokens in 0 documents"):
        check_files(files(tmp_path / "one.txt"))


def test_large_files_are_left_to_the_job(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.write(b"\xff")
        file.truncate(READ_BEFORE + 1)
    check_files(files(tmp_path / "large.txt"))
    (tmp_path / "large.csv").write_text("")
    with pytest.raises(ValueError, match=r"large\.csv is no \.txt"):
        check_files(files(tmp_path / "large.*"))


def test_documents_are_read_without_torch():
    code = "import sys, spd_core.data.documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Documents, windows and tokenizers; the journals of runs; and what is said of files that cannot be read."""
import gzip
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import BOS, VOCAB, complaint, prose, read_lines
from tokenizers import Tokenizer

import eval_passkey
import eval_ppl
import finetune
import search
from longrope import (Journal, UserError, data_hash, load_tokenizer, read_documents, reading, windows)


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_directory_gives_its_text_and_json_lines_compressed_or_not_in_the_order_of_the_names(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {"d/a.txt": b"\xef\xbb\xbfone\r\nline\rmore", "c.jsonl.gz": gzip.compress(lines("two", "three")),
                       "b.jsonl": b"\xef\xbb\xbf" + lines("four"), "e.csv": b"not data", "f.txt": b"caf\xe9",
                       "g.jsonl": b'{"text": "five", "title": "A book"}\n\n{"text": "\\ud83d\\ude00 \\ud800"}',
                       "._x.txt": b"no", ".git/y.txt": b"no", "d/z.parquet": b"no"}.items():
        (tmp_path / name).write_bytes(data)  # two begin with a byte-order mark
    assert list(read_documents([tmp_path])) == [*read_documents([tmp_path])] == [  # finetune.py reads them twice
        ("b.jsonl:1", "four"), ("c.jsonl.gz:1", "two"), ("c.jsonl.gz:2", "three"), ("a.txt", "one\nline\nmore"),
        ("f.txt", "caf\ufffd"), ("A book", "five"), ("g.jsonl:3", "\U0001f600 \ufffd")]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"data {tmp_path}: 2 files of other kinds are not read: z.parquet, e.csv" and len(said) == 3
    assert said[1].startswith("f.txt: has bytes that are not UTF-8") and said[2].startswith("g.jsonl:3: has")
    (tmp_path / "d" / "B.TXT").write_text("six")
    assert [text for _, text in read_documents([tmp_path / "f.txt", tmp_path / "d"])][1:] == ["six", "one\nline\nmore"]
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "d")  # into itself
    (tmp_path / "d" / "other").symlink_to(tmp_path)
    assert [text for _, text in read_documents([tmp_path / "d"])].count("six") == 1
    with pytest.raises(UserError, match=r"z.parquet: no \.txt or \.jsonl"):
        list(read_documents([tmp_path / "d/z.parquet"]))


def test_ten_books_are_bundled_and_joined_where_it_takes_several():
    books = list(read_documents([], books=slice(None)))
    assert len(books) == len({name for name, _ in books}) == 10 and {len(text) for _, text in books} == {660_000}
    assert books[0][0] == "Don Quixote" and list(read_documents([])) == books[:5]
    assert list(read_documents([], 660_000, slice(5, None))) == books[5:]
    joined = list(read_documents([], 660_001, slice(None)))
    assert joined == [(f"{a} + {b}", x + y) for (a, x), (b, y) in zip(books[::2], books[1::2])]
    assert [len(text) for _, text in read_documents([], 1_000_000)] == [1_320_000, 1_320_000, 660_000]  # all of it


def test_what_cannot_be_used_is_the_users_mistake_in_one_line(tmp_path, capsys, tiny):
    def said(name, data=None):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        return complaint(eval_ppl.main, capsys, "--model", tiny, "--len", 64, "--data", tmp_path / name)
    packed = gzip.compress(lines(*(prose(i, 50) for i in range(50))))
    for broken in (packed[:len(packed) // 2], b"plain", packed[:20] + b"\xff" * 20 + packed[40:]):
        assert str(tmp_path / "a.jsonl.gz") in said("a.jsonl.gz", broken)
    for line in (b'{"txt": 1}', b"{", b"3", b'{"text": 1}', b'["text"]', b"[" * 100_000):
        assert f"{tmp_path / 'b.jsonl'}, line 2: " in said("b.jsonl", lines("one") + line + b"\n")
    (tmp_path / "empty").mkdir()
    assert "no .txt or .jsonl(.gz) file" in said("empty")
    assert "no document of 64 tokens: the longest of 1 has" in said("c.txt", b"few")
    assert "nowhere" in said("nowhere")
    assert "d.txt: has NUL characters" in said("d.txt", prose(0, 100).encode("utf-16-be"))
    assert "no such" in complaint(eval_ppl.main, capsys, "--model", tiny, "--len", 64, "--data", "")  # not the cwd's


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def test_windows_are_the_first_tokens_of_each_document_that_is_long_enough(tiny, books, capsys):
    tokenizer, documents = load_tokenizer(tiny), dict(read_documents([books]))
    assert list(documents) == [f"book{i}.txt" for i in range(6)] + ["note.txt"]
    for length in (2, 64, 999):
        found = windows(documents.items(), tokenizer, length, 4)
        assert [name for name, _ in found] == ["book0.txt", "book1.txt", "book2.txt", "book3.txt"]
        for name, tokens in found:
            assert tokens.shape == (length,) and tokens.dtype == torch.int64
            assert tokens.tolist() == tokenizer.encode(documents[name]).ids[:length] and tokens[0] == BOS
    assert capsys.readouterr().err == ""
    assert len(windows(documents.items(), tokenizer, 64, 100)) == 6
    assert "left out 1 documents shorter than 64 tokens: note.txt" in capsys.readouterr().err
    windows([*documents.items(), *((f"short{i}", "few") for i in range(200))], tokenizer, 64, 300)
    assert len(capsys.readouterr().err) < 300  # not all names are said
    with pytest.raises(UserError, match=f"the longest of 2 has {len(tokenizer.encode('of one title').ids)};"):
        windows([("title", "of one title"), ("title", "few")], tokenizer, 64, 1)


def test_the_same_text_twice_is_one_document_and_it_is_said(tiny, books, tmp_path, capsys):
    tokenizer, twice = load_tokenizer(tiny), [books / "book1.txt", books]
    found = windows(read_documents(twice), tokenizer, 64, 4)
    assert [name for name, _ in found] == ["book1.txt", "book0.txt", "book2.txt", "book3.txt"]
    assert capsys.readouterr().err == "book1.txt: the same 64 tokens as book1.txt, counts once\n"
    assert len(windows(read_documents(twice[:1] * 2), tokenizer, 64, 4)) == 1  # whose names are one object
    command = ["--model", tiny, "--rope", "none", "--len", "64", "--windows", "2", "--device", "cpu"]
    for data in (twice, [books]):
        eval_ppl.main([*map(str, command), "--out", str(tmp_path / str(len(data))), "--data", *map(str, data)])
    a, b = (read_lines(tmp_path / name / "ppl.jsonl")[-1] for name in "12")
    assert a["documents"] == b["documents"] == 6 and a["nll"] == pytest.approx(b["nll"])


def test_a_tokenizer_of_another_model_is_one_line(tiny, books, tmp_path, capsys):
    path = shutil.copytree(tiny, tmp_path / "model")
    tokens = json.loads((path / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["\u0120the"] += 600
    (path / "tokenizer.json").write_text(json.dumps(tokens))
    data = ["--data", books / "book0.txt"]
    for script, more in (eval_ppl, data), (eval_passkey, []), (search, data), (finetune, [*data, "--rope", "none"]):
        line = complaint(script.main, capsys, "--model", path, "--len", 256, "--out", tmp_path / script.__name__, *more)
        assert f"the model has {VOCAB}; is tokenizer.json another model's?" in line


@pytest.mark.parametrize("text", [prose(3, 200), "remembered" * 2000])  # the second has 10 characters a token
def test_a_document_of_exactly_the_length_is_taken_and_one_token_less_is_refused(tiny, text):
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode(text).ids
    assert [t.tolist() for _, t in windows([("a", text)], tokenizer, len(ids), 1)] == [ids]
    with pytest.raises(UserError, match=f"no document of {len(ids) + 1} tokens.* {len(ids)}"):
        windows([("a", text)], tokenizer, len(ids) + 1, 1)


def test_the_hash_of_the_data_is_of_the_tokens_in_their_order(tiny, books):
    a, b = (tokens for _, tokens in windows(read_documents([books]), load_tokenizer(tiny), 64, 2))
    changed = b.clone()
    changed[63] += 1
    assert data_hash([a, b]) == data_hash(t.clone() for t in (a, b)) and len(data_hash([a, b])) == 64
    assert len({data_hash(tokens) for tokens in ([a, b], [b, a], [a, changed], [a])}) == 4


def test_truncation_and_padding_of_a_tokenizer_are_not_applied(tiny, tmp_path):
    tokenizer, text = Tokenizer.from_file(str(tiny / "tokenizer.json")), prose(3, 200)
    expected = tokenizer.encode(text).ids
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=5000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids) != len(expected)
    assert load_tokenizer(tmp_path).encode(text).ids == expected
    for broken in (b"{", b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"tokenizer\.json: "):
            load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Journals and other files

SETUP, RUN = {"seed": 1, "lengths": (64, 128)}, {"machine": "this"}


def journal(path, keep=None, setup=SETUP):
    """What one run does: read what is there, cut it, write a row."""
    opened = Journal(path, setup, RUN)
    rows = list(opened.rows)
    opened.cut(len(rows) if keep is None else keep)
    opened.write({"row": len(opened.rows)})
    opened.file.close()
    return [row.get("row", row) for row in rows], [row.get("row", row) for row in opened.rows]


def test_a_journal_goes_on_where_it_stopped_and_can_be_cut(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    for found, kept in (([], [0]), ([0], [0, 1]), ([0, 1], [0, 1, 2])):
        assert journal(path) == (found, kept)
    assert journal(path, keep=1) == ([0, 1, 2], [0, 1]) and journal(path, keep=9) == ([0, 1], [0, 1, 2])
    run, written = {"run": RUN}, read_lines(path)  # each run is recorded with its first row
    assert written == [{"setup": {"seed": 1, "lengths": [64, 128]}}, run, {"row": 0}, run, run, {"row": 1}, run,
                       {"row": 2}]
    with pytest.raises(UserError, match=r"log\.jsonl is of a run with another seed, more; give another --out"):
        journal(path, setup={"seed": 2, "lengths": [64, 128], "more": 3})
    assert read_lines(path) == written
    opened = Journal(path, SETUP, RUN)
    opened.write({"row": 3})
    opened.write({"row": 4})
    assert read_lines(path)[-3:] == [run, {"row": 3}, {"row": 4}]


@pytest.mark.parametrize("damage, left", [
    (lambda lines: lines[:-1] + [lines[-1][:5]], [0, 1]),  # torn: what a crash leaves
    (lambda lines: lines[:-1] + [lines[-1][:-1]], [0, 1, 2]),  # whole but for its end
    *[(lambda lines, garbled=garbled: [*lines[:4], garbled + b"\n", *lines[5:]], [0, 2])
      for garbled in (b'{"row": 1', b"\0" * 9, b"\xff\xfe", b"3", b"[" * 100_000, b"")],
    (lambda lines: [lines[0][:7]], []), (lambda lines: [], [])])
def test_a_torn_or_garbled_line_is_dropped_alone(tmp_path, damage, left):
    path = tmp_path / "log.jsonl"
    for _ in range(3):
        journal(path)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    assert journal(path) == (left, [*left, len(left)])
    assert journal(path)[0] == [*left, len(left)]  # and what was written behind it is whole


def test_a_journal_is_one_runs_at_a_time_and_no_other_programs(tmp_path):
    path = tmp_path / "log.jsonl"
    journal(path)
    other = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'ab'); "
                              "fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()", path],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match=r"log\.jsonl: another run is writing there; give another --out$"):
        journal(path)
    other.communicate(b"\n")
    assert journal(path) == ([0], [0, 1])
    for foreign in (b'{"step": 1}\n{"step": 2}\n', b"notes of mine\nand more\n", b'{"setup": {"se\n{"row": 0}\n'):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match=r"log\.jsonl: not a journal of this program; give another --out"):
            journal(path)
        assert path.read_bytes() == foreign
    with pytest.raises(UserError, match=str(tmp_path)):
        journal(tmp_path)


@pytest.mark.parametrize("error, said", [
    (FileNotFoundError(2, "No such file", "a/b.json"), "No such file"), (PermissionError(13, "Not yours"), "Not yours"),
    (KeyError("theta"), "'theta' is missing"), (ValueError("two\n  lines"), "two lines"), (TypeError(), "TypeError"),
    (RecursionError("too deep"), "too deep"), (EOFError("short"), "short"), (AttributeError("x" * 999), "x" * 300)])
def test_whatever_is_wrong_with_a_file_is_one_line_that_names_it(error, said):
    with pytest.raises(UserError) as e, reading("a/b.json"):
        raise error
    assert str(e.value) == f"a/b.json: {said}"

"""What --data takes: files in text, lines of JSON, compressed or not, data sets; and what it makes of damaged ones."""
import gzip
import json
import sys
from types import ModuleType

import pytest
from conftest import complaint, prose

import eval_ppl
from longrope import UserError, load_tokenizer, read_documents, windows


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for Hugging Face's package: two splits of one data set; what it was asked for is in `asked`."""
    module, rows = ModuleType("datasets"), {"train": [{"text": "a"}, {"text": "b"}], "test": [{"body": "c"}]}
    module.asked = []

    def load_dataset(name, split, **options):
        module.asked.append((name, options))
        if name != "some/books":
            raise FileNotFoundError(f"no data set\n{name}")
        return iter(rows[split])
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_directory_gives_its_text_and_json_lines_compressed_or_not_in_the_order_of_the_names(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(b"one\r\nline\rmore")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines("two", "three")))
    (tmp_path / "b.jsonl").write_bytes(lines("four"))
    (tmp_path / "e.csv").write_text("not data")
    assert list(read_documents([tmp_path])) == [
        ("b.jsonl:1", "four"), ("c.jsonl.gz:1", "two"), ("c.jsonl.gz:2", "three"), ("a.txt", "one\nline\nmore")]
    assert [text for _, text in read_documents([tmp_path / "e.csv"])] == ["not data"]  # a file named is a text
    assert capsys.readouterr().err == ""


def test_documents_without_text_or_with_bytes_that_are_not_utf8_are_counted_and_named(tmp_path, capsys):
    for name, data in {"a.txt": b"", "b.txt": b" \n", "c.txt": b"caf\xe9 au lait", "d.jsonl": lines("x", "", "\u00e9"),
                       "e.txt": "caf\u00e9".encode()}.items():
        (tmp_path / name).write_bytes(data)
    assert dict(read_documents([tmp_path])) == {
        "c.txt": "caf\ufffd au lait", "d.jsonl:1": "x", "d.jsonl:3": "\u00e9", "e.txt": "caf\u00e9"}
    empty, damaged = capsys.readouterr().err.splitlines()
    assert empty.startswith("3 documents have no text: a.txt, b.txt, d.jsonl:2")
    assert damaged.startswith("1 documents have bytes that are not UTF-8") and damaged.endswith(": c.txt")


def test_what_was_left_out_is_named_also_when_the_reader_stops_early(tmp_path, capsys, tiny):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "c.txt").write_text(prose(1, 100))
    (tmp_path / "d.txt").write_bytes(b"")
    assert [w.document for w in windows(read_documents([tmp_path]), load_tokenizer(tiny), 32, 1)] == ["c.txt"]
    said = capsys.readouterr().err
    assert "left out 1 documents shorter than 32 tokens: b.txt" in said and "1 documents have no text: a.txt\n" in said


def test_many_names_are_not_all_said(tmp_path, capsys):
    for i in range(200):
        (tmp_path / f"empty{i:03}.txt").write_bytes(b"")
    (tmp_path / "full.txt").write_text("text")
    assert len(list(read_documents([tmp_path]))) == 1
    said = capsys.readouterr().err
    assert said.startswith("200 documents have no text: empty000.txt, empty001.txt") and len(said) < 300


def test_nothing_left_is_the_users_mistake_in_one_line(tmp_path, capsys, tiny):
    def said(*data):
        return complaint(eval_ppl.main, capsys, "--model", tiny, "--len", 64, "--data", *data)
    (tmp_path / "a.txt").write_bytes(b"")
    assert "no text in any of 1 documents: a.txt" in said(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"few \xff")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="no document of 64 tokens: the longest of 1 has"):
        windows(read_documents([tmp_path]), load_tokenizer(tiny), 64, 1)
    packed = gzip.compress(lines(*(prose(i, 50) for i in range(50))))
    for broken in (packed[:len(packed) // 2], b"plain", packed[:20] + b"\xff" * 20 + packed[40:]):
        (tmp_path / "c.jsonl.gz").write_bytes(broken)
        assert "c.jsonl.gz" in said(tmp_path / "c.jsonl.gz")
    (tmp_path / "d.jsonl").write_bytes(lines("one") + b'{"txt": 1}\n')
    assert "d.jsonl, line 2" in said(tmp_path / "d.jsonl")


def test_a_data_set_has_a_split_and_a_field(datasets):
    assert list(read_documents(["hf:some/books"])) == [("some/books:train:1", "a"), ("some/books:train:2", "b")]
    assert list(read_documents(["hf:some/books:test:body"])) == [("some/books:test:1", "c")]
    assert [text for _, text in read_documents(["hf:some/books:train:text", "hf:some/books"])] == [*"abab"]
    assert all(options == {"streaming": True, "trust_remote_code": False} for _, options in datasets.asked)


def test_a_data_set_that_cannot_be_read_is_the_users_mistake(datasets, tiny, capsys, monkeypatch):
    def said(data):
        return complaint(eval_ppl.main, capsys, "--model", tiny, "--len", 64, "--data", data)
    assert "no data set some/thing" in said("hf:some/thing")
    assert "KeyError: 'dev'" in said("hf:some/books:dev")
    assert "KeyError: 'text'" in said("hf:some/books:test")
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    assert "hf:some/books: needs the package datasets: pip install datasets" in said("hf:some/books")

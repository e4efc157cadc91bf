"""assets/make_model.py at toy size: what goes into the bundled model, and that the steps fit together."""
import importlib.util
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from eval_passkey import FILLER, NEEDLE, QUESTION, TASK
from finetune import segments
from longrope import load_model, load_tokenizer


@pytest.fixture(scope="module")
def make_model():
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "assets" / "make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Two packages, one of its own code, one that vendors a file of the standard library."""
    folder = tmp_path_factory.mktemp("packages")
    library = Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py"
    own = "\n".join(f"def convolve_{i}(signal, kernel_{i}):\n    return fold(signal, kernel_{i}, mode={i})"
                    for i in range(900))
    for name, text in (("own", own), ("vendor", library.read_text() * 5)):
        (folder / name).mkdir()
        (folder / name / "code.py").write_text(text)
    return folder


def test_files_that_share_lines_with_the_standard_library_are_left_out(make_model, packages):
    found = dict(make_model.python_source([packages], budget=10**9))
    assert list(found) == ["own"] and "convolve_899" in found["own"]


def test_passkey_documents_fill_a_segment_each_and_a_share_of_the_keys_stands_at_an_end(make_model):
    tokenizer, shares = load_tokenizer(), []
    for ends in (0.0, 0.5):
        texts, at_an_end = [*make_model.passkey_documents(tokenizer, ["a long book " * 5000], 60, ends)], 0
        found = np.concatenate([*segments(((text, text) for text in texts), tokenizer, make_model.WINDOW + 1, 0, 1)])
        assert [tokenizer.decode(row) for row in found[:, 1:-1].tolist()] == texts and len(texts) == 60
        for text in texts:
            before, _, after = text.partition(QUESTION)[0].partition("The pass key is ")
            at_an_end += before.endswith("there.\n\n") or after.endswith("is the pass key.\n\n")
            assert after[:5].isdigit() and f"{QUESTION} {after[:5]}" in text
        shares.append(at_an_end / 60)
    assert shares[0] < 0.1 and 0.3 < shares[1] < 0.7


def test_the_whole_of_it_at_toy_size_ends_in_a_directory_that_loads(make_model, packages, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    book = " ".join(f"In the year {i} the ship left harbour {i * i} with {i % 13} men." for i in range(4000))
    book += (TASK + FILLER + NEEDLE + QUESTION) * 50  # so that the tokenizer has words for a prompt
    (tmp_path / "books" / "book.txt").write_text(book)
    monkeypatch.setattr("sys.argv", ["make_model.py", "--books", str(tmp_path / "books"), "--python", str(packages),
                                     "--passkeys", "3", "--steps", "1", "--batch-size", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(make_model, "ANNEAL", 1)
    monkeypatch.setattr(make_model, "CONFIG", make_model.CONFIG | {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    make_model.main()
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["books"] == 1 and made["passkey_documents"] == 3 + 8 and list(made["packages"]) == ["own"]
    assert 5 < made["final_loss"] < 10  # one step from random weights: about ln of the vocabulary
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    assert model.window == make_model.WINDOW and tokenizer.encode("12").ids[0] == 0
    assert len(tokenizer.encode("12", add_special_tokens=False).ids) == 2
    assert torch.isfinite(model(torch.tensor([tokenizer.encode(book[:200]).ids]))).all()

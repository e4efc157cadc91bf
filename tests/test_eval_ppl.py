"""Perplexity against an independent computation with transformers; rows that are kept, continued, the same anywhere."""
import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import ROOT, WINDOW, complaint
from tokenizers import Tokenizer
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_ppl
import longrope
from longrope import BUNDLED_MODEL, load_model, load_tokenizer, read_documents, save_model, window_nll, windows

TIMES = ("seconds", "tokens_per_s", "peak_gib", "out")


def without_times(value):
    """The same without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def ppl(out, *arguments):
    eval_ppl.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "ppl.json").read_text())


def with_transformers(path, texts, length, tokens, stride):
    """Perplexity by transformers alone: a plain loop over windows, float32, exp of the mean over all scored tokens."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    nll, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :tokens]
        scored_to, end = 1, length  # the tokens before `scored_to` are done; the first has nothing before it
        while scored_to < len(ids):
            window = ids[end - length:end]
            with torch.no_grad():
                logp = model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
            for i in range(scored_to, end):
                nll -= logp[i - (end - length) - 1, ids[i]].item()
                count += 1
            scored_to, end = end, min(end + (stride or length), len(ids))
    return np.exp(nll / count), count


@pytest.mark.parametrize("stride", [0, 256])
def test_perplexity_of_the_bundled_model_is_that_of_transformers(tmp_path, stride):
    tokens = 1024 if stride else 512
    found = ppl(tmp_path, "--rope", "none", "--len", 512, "--stride", stride, "--samples", 2,
                *(["--doc-tokens", tokens] if stride else []))["rows"][0]
    texts = [text for (_, text), _ in zip(read_documents([], 5 * tokens), range(2))]
    expected, count = with_transformers(BUNDLED_MODEL, texts, 512, tokens, stride)
    assert found["tokens"] == count == 2 * (tokens - 1)
    assert found["ppl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stride", [0, 48])
def test_perplexity_beyond_the_window_is_that_of_transformers_with_the_same_factors(tmp_path, tiny_model, tiny_rope,
                                                                                    books, stride):
    tiny_rope.save(tmp_path / "rope.json")
    tiny_model.rope = tiny_rope
    save_model(tiny_model, tmp_path / "exported", dtype=torch.float32)
    tokens = 200 if stride else 128  # 200 = 128 + 48 + 24: the last window moves by less
    command = ["--model", tiny_model.path, "--rope", tmp_path / "rope.json", "none", "--len", 128, "--stride", stride,
               "--samples", 3, "--data", books, *(["--doc-tokens", tokens] if stride else [])]
    found = ppl(tmp_path, *command)["rows"]
    texts = [(books / f"book{i}.txt").read_text() for i in range(3)]
    expected, count = with_transformers(tmp_path / "exported", texts, 128, tokens, stride)
    assert found[0]["tokens"] == count == 3 * (tokens - 1)
    assert found[0]["ppl"] == pytest.approx(expected, rel=1e-3)
    assert abs(found[1]["ppl"] / expected - 1) > 0.01  # another rope would have shown


def test_windows_one_after_another_are_cut_from_the_same_tokens_at_every_length(tmp_path, tiny_model, books):
    found = ppl(tmp_path, "--model", tiny_model.path, "--rope", "none", "--len", 64, 128, "--doc-tokens", 256,
                "--samples", 2, "--data", books)["rows"]
    documents = windows(read_documents([books]), load_tokenizer(tiny_model.path), 256, 2)
    for row, length in zip(found, (64, 128)):
        nll = sum(window_nll(tiny_model, part).sum().item() for d in documents for part in d.tokens.split(length))
        assert row["stride"] == length and row["tokens"] == 2 * 256 // length * (length - 1)
        assert row["nll"] == pytest.approx(nll)
    again = ppl(tmp_path, "--model", tiny_model.path, "--rope", "none", "--len", 256, "--samples", 2, "--data", books)
    alone = ppl(tmp_path, "--model", tiny_model.path, "--rope", "none", "--len", 64, 256, "--samples", 2,
                "--data", books)
    assert [r["tokens"] for r in again["rows"] if r["length"] == 256] == [2 * 255]
    assert [r["tokens"] for r in alone["rows"] if r["length"] == 64] == [2 * 63]  # not the row of four windows


@pytest.mark.parametrize("tokens, length, stride", [(100, 100, 10), (200, 100, 10), (205, 100, 10), (101, 100, 99),
                                                    (512, 64, 1)])
def test_a_sliding_window_scores_every_token_once_always_in_full_windows(tokens, length, stride):
    scored = []
    for start, first in eval_ppl.spans(tokens, length, stride):
        assert start >= 0 and start + length <= tokens
        assert first == 1 or length - first <= stride
        scored += range(start + first, start + length)
    assert scored == list(range(1, tokens))


def test_positions_add_up_to_the_row_and_are_positions_in_the_window(tmp_path, tiny_model, books):
    command = ["--model", tiny_model.path, "--rope", "none", "--len", 100, "--samples", 2, "--data", books]
    row = ppl(tmp_path, *command)["rows"][0]
    found = windows(read_documents([books]), load_tokenizer(tiny_model.path), 100, 2)
    nll = sum(window_nll(tiny_model, w.tokens) for w in found) / 2  # (99,), of the tokens 1 .. 99
    # 100 tokens in 16 bins: the first holds 0 .. 6, of which 0 is not scored, the last 94 .. 99
    assert row["ppl_by_position"][0] == pytest.approx(nll[:6].mean().exp().item())
    assert row["ppl_by_position"][-1] == pytest.approx(nll[-6:].mean().exp().item())
    assert len(row["ppl_by_position"]) == 16 and sum(row["tokens_by_position"]) == row["tokens"] == 2 * 99
    by_position = zip(row["tokens_by_position"], row["ppl_by_position"])
    assert sum(n * np.log(p) for n, p in by_position) == pytest.approx(row["nll"])
    assert row["ppl"] == pytest.approx(np.exp(row["nll"] / row["tokens"]))


def test_every_rope_and_length_reads_the_same_documents_and_s_follows_the_length(tmp_path, tiny, books, capsys):
    found = ppl(tmp_path, "--model", tiny, "--rope", "pi", "yarn:16", "--len", 256, 128, "--samples", 2,
                "--data", books)
    assert [(r["length"], r["rope"], r["scale"]) for r in found["rows"]] == [
        (128, "pi", 2.0), (128, "yarn:16", 16.0), (256, "pi", 4.0), (256, "yarn:16", 16.0)]
    assert [r["tokens"] for r in found["rows"]] == 2 * [2 * 127] + 2 * [2 * 255]
    alone = windows(read_documents([books]), load_tokenizer(tiny), 256, 2)
    model = load_model(tiny, "pi", 128, "cpu")  # the first 128 of the tokens that the row of 256 reads
    expected = sum(window_nll(model, w.tokens[:128]).sum().item() for w in alone)
    assert found["rows"][0]["nll"] == pytest.approx(expected)
    assert found["setup"]["data"] == ["book0.txt", "book1.txt"]
    assert found["setup"]["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert f"s of pi, ntk and yarn is length / {WINDOW}" in said and "0.1 ln s + 1 for yarn" in said
    for picture in ("ppl.png", "ppl_position.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_model_with_a_rope_of_its_own_is_measured_with_it_by_default(tmp_path, tiny_model, tiny_rope, books):
    tiny_model.rope = tiny_rope
    save_model(tiny_model, tmp_path / "own", dtype=torch.float32)
    tiny_rope.save(tmp_path / "rope.json")
    rows = ppl(tmp_path, "--model", tmp_path / "own", "--len", 128, "--samples", 1, "--data", books)["rows"]
    assert [r["rope"] for r in rows] == ["none", "pi", "ntk", "yarn", "model"]
    given = ppl(tmp_path, "--model", tmp_path / "own", "--len", 128, "--samples", 1, "--data", books,
                "--rope", tmp_path / "rope.json")["rows"][-1]
    assert given["nll"] == rows[-1]["nll"] != rows[0]["nll"]


def test_a_run_stopped_half_way_keeps_its_rows_and_the_same_command_goes_on(tmp_path, tiny, books, monkeypatch):
    command = ["--model", tiny, "--rope", "none", "pi", "yarn", "--len", 128, "--samples", 2, "--data", books]
    whole = ppl(tmp_path / "whole", *command)
    measure, measured = eval_ppl.measure, []

    def stops_at_the_second(*args):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(args[0].rope)
        return measure(*args)
    monkeypatch.setattr(eval_ppl, "measure", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ppl(tmp_path / "half", *command)
    first = json.loads((tmp_path / "half" / "ppl.json").read_text())["rows"]
    assert without_times(first) == without_times(whole["rows"][:1])
    monkeypatch.setattr(eval_ppl, "measure", lambda *args: measured.append(args[0].rope) or measure(*args))
    rest = ppl(tmp_path / "half", *command)
    assert rest["rows"][0] == first[0] and len(measured) == 3  # each rope once
    assert without_times(rest) == without_times(whole)


def test_rows_measured_otherwise_are_not_taken_over(tmp_path, tiny, tiny_rope, books, capsys):
    rope = tmp_path / "rope.json"
    tiny_rope.save(rope)
    command = ["--model", tiny, "--rope", rope, "--len", 128, "--data", books, "--samples"]
    first = ppl(tmp_path, *command, 1)
    type(tiny_rope).longrope(tiny_rope.rescale_factors[::-1], 10000.0, WINDOW, 4.0).save(rope)  # a search that went on
    second = ppl(tmp_path, *command, 1)
    assert len(second["rows"]) == 1 and second["rows"][0]["nll"] != first["rows"][0]["nll"]
    assert "afresh" not in capsys.readouterr().out
    third = ppl(tmp_path, *command, 2)
    assert [r["documents"] for r in third["rows"]] == [2]
    said = f"starting afresh, with another data, data_sha256: {tmp_path / 'ppl.json'} is now ppl.old1.json"
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "ppl.old1.json").read_text()) == second
    assert without_times(ppl(tmp_path, *command, 1)) == without_times(second)
    assert json.loads((tmp_path / "ppl.old1.json").read_text()) == second  # none that was set aside is lost
    assert json.loads((tmp_path / "ppl.old2.json").read_text()) == third


def test_rows_of_a_rope_json_that_has_changed_go_at_every_length(tmp_path, tiny, tiny_rope, books):
    common = ["--model", tiny, "--rope", "pi", tmp_path / "rope.json", "--samples", 1, "--data", books, "--len", 256]
    tiny_rope.save(tmp_path / "rope.json")
    assert len(ppl(tmp_path / "out", *common, 128)["rows"]) == 4
    assert len(ppl(tmp_path / "out", *common)["rows"]) == 4  # rows that stand, though they are not asked for
    replace(tiny_rope, n_hat=7).save(tmp_path / "rope.json")
    rows = ppl(tmp_path / "out", *common)["rows"]
    assert sorted((r["length"], r["rope"]) for r in rows) == sorted(
        [(128, "pi"), (256, "pi"), (256, str(tmp_path / "rope.json"))])


def test_a_bos_comes_first_if_the_tokenizer_adds_one_or_it_is_asked_for_never_twice(tmp_path, tiny, books):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    description = json.loads((tiny / "tokenizer.json").read_text()) | {"post_processor": None}
    Tokenizer.from_str(json.dumps(description)).save(str(bare / "tokenizer.json"))

    def data(name, path, *more):
        return ppl(tmp_path / name, "--model", path, "--rope", "none", "--len", 64, "--samples", 1, "--data", books,
                   *more)["setup"]["data_sha256"]
    assert data("a", bare, "--bos") == data("b", tiny) == data("c", tiny, "--bos") != data("d", bare)


def torchrun(script, *arguments):
    """The script in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / script), *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("script", ["search", "finetune", "eval_ppl", "eval_passkey"])
def test_torchrun_leaves_our_options_to_us(script):
    """It takes an option for one of its own, abbreviated, if that begins with it: --start for --start-method."""
    for action in import_module(script).parser()._actions:
        for option in action.option_strings:
            given = ["--nproc-per-node", "2", f"{script}.py", option]
            assert get_args_parser().parse_args(given).training_script_args == [option]


def test_shared_out_work_comes_back_whole_and_in_order(monkeypatch):
    """The second of three processes, the others played: sums over documents must not depend on who did what."""
    items = list(range(8))
    shares = [[10 * x for x in items[r::3]] for r in range(3)]

    def all_gather_object(parts, mine):
        assert mine == shares[1]
        parts[:] = shares
    monkeypatch.setattr(longrope, "rank", lambda: 1)
    monkeypatch.setattr(longrope, "world_size", lambda: 3)
    monkeypatch.setattr(longrope.dist, "all_gather_object", all_gather_object)
    assert longrope.spread(lambda x: 10 * x, items) == [10 * x for x in items]


def test_two_processes_write_what_one_writes(tmp_path, tiny, books):
    command = ["--model", tiny, "--rope", "none", "yarn", "--len", 96, "--samples", 3, "--stride", 40, "--data", books]
    two = torchrun("eval_ppl.py", *command, "--out", tmp_path / "two")
    one = ppl(tmp_path / "one", *command)
    assert without_times(json.loads((tmp_path / "two" / "ppl.json").read_text())) == without_times(one)
    assert two.stdout.count("wrote") == two.stdout.count("loading and reading took") == 1


@pytest.mark.parametrize("arguments, says", [
    (["--rope", "yran"], "yran"),
    (["--rope", "none", "gone/rope.json"], "gone/rope.json"),
    (["--len", "100000"], "no document of 100000 tokens"),
    (["--stride", "128"], "--stride 0 or more and below"),
    (["--stride", "16", "--doc-tokens", "100"], "--doc-tokens"),
    (["--doc-tokens", "0"], "--doc-tokens must be at least"),
    (["--samples", "0"], "--samples must be at least 1"),
    (["--data", "gone.txt"], "gone.txt"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_is_one_line_before_anything_is_measured(tmp_path, tiny, books, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(eval_ppl, "window_nll", None)  # measuring would be an error
    common = ["--model", tiny, "--data", books, "--len", 128, "--out", tmp_path]
    line = complaint(eval_ppl.main, capsys, *common, *arguments)
    assert says in line and not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line_that_says_how_much_and_what_to_lower(tmp_path, tiny, books, capsys, monkeypatch):
    monkeypatch.setattr(longrope, "window_nll", lambda *_: torch.empty(10**15))
    line = complaint(eval_ppl.main, capsys, "--model", tiny, "--data", books / "book0.txt", "--len", 128,
                     "--out", tmp_path)
    assert "out of memory, tried to allocate 4000000000000000 bytes: lower --len" in line

"""Perplexity against an independent computation with transformers; rows that are kept, continued, the same anywhere."""
import gc
import json
import shutil
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, WINDOW, complaint, edit_config, hf_logits, read_lines, save_tiny
from matplotlib.figure import Figure
from test_finetune_distributed import spawn
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_ppl
import longrope
from longrope import (BUNDLED_MODEL, Journal, load_model, load_tokenizer, read_documents, rope_to_dict, run, save_model,
                      window_nll, windows, write_json)


def results(path):
    """The rows of a journal without what differs from run to run."""
    rows = [row for row in read_lines(path) if not {"setup", "run"} & row.keys()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "peak_gib")} for row in rows]


def ppl(out, *arguments):
    gc.collect()  # an earlier run's journal, and with it its lock
    eval_ppl.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    return results(out / "ppl.jsonl")


def run_script(script, *arguments):
    run(lambda: import_module(script).main([*map(str, arguments), "--device", "cpu"]))


def with_transformers(path, texts, length, tokens, stride):
    """(perplexity, scored tokens) by transformers alone: a plain loop over windows, in float32."""
    tokenizer, nll = AutoTokenizer.from_pretrained(path), torch.empty(0, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :tokens]
        scored_to, end = 1, length  # the tokens before `scored_to` are done; the first has nothing before it
        while scored_to < len(ids):
            window = ids[end - length:end]
            found = F.cross_entropy(hf_logits(model, window[None])[0, :-1].double(), window[1:], reduction="none")
            nll = torch.cat((nll, found[scored_to - end:]))
            scored_to, end = end, min(end + (stride or length), len(ids))
    return nll.mean().exp().item(), len(nll)


def test_perplexity_of_the_bundled_model_is_that_of_transformers(tmp_path):
    row, = ppl(tmp_path, "--rope", "none", "--len", 512, "--stride", 256, "--samples", 2, "--doc-tokens", 1024)
    texts = [text for (_, text), _ in zip(read_documents([], 5 * 1024), range(2))]
    expected, scored = with_transformers(BUNDLED_MODEL, texts, 512, 1024, 256)
    assert row["tokens"] == scored == 2 * 1023 and row["ppl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stride", [0, 48])
def test_perplexity_beyond_the_window_is_that_of_transformers_with_the_same_factors(tmp_path, tiny_model, tiny_rope,
                                                                                    books, stride):
    write_json(tmp_path / "rope.json", rope_to_dict(tiny_rope))
    tiny_model.rope = tiny_rope
    save_model(tiny_model, tmp_path / "exported", dtype=torch.float32)
    tokens = 200 if stride else 128  # 200 = 128 + 48 + 24: the last window moves by less
    common = ["--len", 128, "--stride", stride, "--samples", 3, "--data", books, *["--doc-tokens", tokens][:2 * stride]]
    given, = ppl(tmp_path / "given", "--model", tiny_model.path, "--rope", tmp_path / "rope.json", *common)
    texts = [(books / f"book{i}.txt").read_text() for i in range(3)]
    expected, scored = with_transformers(tmp_path / "exported", texts, 128, tokens, stride)
    assert given["tokens"] == scored == 3 * (tokens - 1) and given["ppl"] == pytest.approx(expected, rel=1e-4)
    own = ppl(tmp_path / "own", "--model", tmp_path / "exported", *common)  # a model's own rope is there by default
    assert [r["rope"] for r in own] == ["none", "pi", "ntk", "yarn", "yarn-su", "model"]
    assert own[-1]["nll"] == given["nll"] and abs(own[0]["ppl"] / expected - 1) > 0.01


@pytest.mark.parametrize("tokens, length, stride", [(100, 100, 10), (205, 100, 10), (101, 100, 99), (512, 64, 1)])
def test_a_sliding_window_scores_every_token_once_always_in_full_windows(tokens, length, stride):
    scored = []
    for start, first in eval_ppl.spans(tokens, length, stride):
        assert start >= 0 and start + length <= tokens and (first == 1 or length - first <= stride)
        scored += range(start + first, start + length)
    assert scored == list(range(1, tokens))


def test_windows_in_a_row_are_of_the_same_tokens_and_positions_those_in_the_window(tmp_path, tiny_model, books):
    rows = ppl(tmp_path, "--model", tiny_model.path, "--rope", "none", "--len", 64, 100, "--doc-tokens", 256,
               "--samples", 2, "--data", books)
    documents = [tokens for _, tokens in windows(read_documents([books]), load_tokenizer(tiny_model.path), 256, 2)]
    for row, cuts in zip(rows, ([(0, 1), (64, 1), (128, 1), (192, 1)], [(0, 1), (100, 1), (156, 44)])):
        n, (nll, tokens) = row["length"], np.zeros((2, row["length"]))
        for start, first in cuts:  # the last of 100 scores what is new
            nll[first:] += sum(window_nll(tiny_model, d[start:start + n], first).numpy() for d in documents)
            tokens[first:] += len(documents)
        nll, tokens = (np.bincount(np.arange(n) * 16 // n, x) for x in (nll, tokens))
        assert row["tokens_by_position"] == tokens.tolist() and row["tokens"] == tokens.sum()
        assert row["ppl_by_position"] == pytest.approx(np.exp(nll / tokens))
        assert row["nll"] == pytest.approx(nll.sum()) and row["ppl"] == pytest.approx(np.exp(nll.sum() / tokens.sum()))


def test_every_rope_and_length_reads_the_same_documents_and_s_follows_the_length(tmp_path, tiny, books, capsys):
    rows = ppl(tmp_path, "--model", tiny, "--rope", "pi", "yarn:16", "--len", 256, 128, "--samples", 2, "--data", books)
    assert [(r["length"], r["rope"], r["scale"], r["tokens"]) for r in rows] == [
        (128, "pi", 2.0, 254), (128, "yarn:16", 16.0, 254), (256, "pi", 4.0, 510), (256, "yarn:16", 16.0, 510)]
    model = load_model(tiny, "pi", 128, "cpu")  # the first 128 of the tokens that the row of 256 reads
    found = windows(read_documents([books]), load_tokenizer(tiny), 256, 2)
    assert rows[0]["nll"] == pytest.approx(sum(window_nll(model, tokens[:128]).sum().item() for _, tokens in found))
    assert f"length / {WINDOW}" in capsys.readouterr().out
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ppl.png", "ppl_position.png"))


def test_windows_from_anywhere_are_of_the_seed_with_bos_first_and_inside_the_document(tmp_path, tiny, books):
    document = torch.arange(10, 1010)
    first, again, other = ([w.tolist() for w in eval_ppl.anywhere(document, 64, 5, seed, BOS)] for seed in (0, 0, 1))
    assert first == again and not {w[1] for w in first} & {w[1] for w in other}
    for i, window in enumerate(first):  # one that begins in each fifth, as the text has it
        assert (window[1] - 10) * 5 // (1000 - 63 + 1) == i and window[-1] < 1010
        assert window == [BOS, *range(window[1], window[1] + 63)]
    assert all(w.tolist() == document.tolist() for w in eval_ppl.anywhere(document, 1000, 2, 0))  # without a BOS
    shutil.copytree(tiny, tmp_path / "bare")
    edit_config(tmp_path / "bare", bos_token_id=None)
    command = ["--rope", "none", "--len", "80", "128", "--samples", "2", "--windows", "3", "--data", str(books)]
    text = load_tokenizer(tiny).encode((books / "book0.txt").read_text(), add_special_tokens=False).ids
    for path, bos in ((tiny, [BOS]), (tmp_path / "bare", [])):  # the tokenizer's own BOS is not added as well
        args = eval_ppl.parser().parse_args([*command, "--model", str(path)])
        about, scored = eval_ppl.read_windows(args, args.len, load_model(path, device="cpu"), load_tokenizer(path))[80]
        found = scored[1][0].tolist()
        assert [(len(w), first) for w, first in scored] == 6 * [(80, 1)] and found[:len(bos)] == bos
        assert about["documents"] == 2
        assert any(text[i:i + 80 - len(bos)] == found[len(bos):] for i in range(len(text)))
    row = ppl(tmp_path / "out", *command, "--model", tiny)[0]
    assert (row["documents"], row["windows"], row["tokens"]) == (2, 6, 6 * 79)
    (tmp_path / "text.txt").write_text(text := (books / "book0.txt").read_text()[:400])
    tokens = len(load_tokenizer(tiny).encode(text).ids)  # with BOS: a window of so many is the whole text
    command = ["--model", tiny, "--rope", "none", "--len", tokens, "--data", tmp_path / "text.txt"]
    assert ppl(tmp_path / "all", *command)[0]["ppl"] == ppl(tmp_path / "any", *command, "--windows", 1)[0]["ppl"]


def test_a_run_that_is_stopped_has_its_rows_on_disk_and_the_same_command_goes_on(tmp_path, tiny, books, monkeypatch):
    command = ["--model", tiny, "--rope", "none", "pi", "yarn", "--len", 128, "--samples", 2, "--data", books]
    whole, measure, left = ppl(tmp_path / "whole", *command), eval_ppl.measure, []

    def stops(*args):
        left.append((tmp_path / "half" / "ppl.jsonl").read_text())  # what a kill would leave
        return None if len(left) == 2 else measure(*args)  # which breaks the row
    monkeypatch.setattr(eval_ppl, "measure", stops)
    with pytest.raises(TypeError):
        ppl(tmp_path / "half", *command)
    assert json.loads(left[1].splitlines()[-1])["nll"] == whole[0]["nll"]
    assert ppl(tmp_path / "half", *command) == whole and len(left) == 4  # the first is measured once
    assert (tmp_path / "half" / "ppl.jsonl").read_text().startswith(left[1])


def test_rows_are_of_a_ropes_content_and_ropes_lengths_and_data_may_be_added(tmp_path, tiny, tiny_rope, books, capsys):
    rope, renamed, d = tmp_path / "rope.json", tmp_path / "renamed.json", rope_to_dict(tiny_rope)
    write_json(rope, d)
    command = ["--model", tiny, "--samples", 1, "--data", books, "--len", 128, "--rope"]
    first, = ppl(tmp_path, *command, rope)
    rope.rename(renamed)
    assert ppl(tmp_path, *command, renamed) == [first] and f"\n{renamed} " in capsys.readouterr().out
    write_json(rope, d | {"long_n_hat": 7})  # a search that went on
    two = ppl(tmp_path, *command, rope, renamed)
    assert two[0] == first and len(two) == 2 and two[1]["nll"] != first["nll"]
    more = ppl(tmp_path, *command, renamed, "pi", "--len", 128, 256)
    assert more[:2] == two and [(r["rope"], r["length"]) for r in more[2:]] == [
        ("pi", 128), (str(renamed), 256), ("pi", 256)]
    other = ppl(tmp_path, *command, renamed, "--samples", 2, "--seed", 1)  # the seed is of no matter here
    assert other[:5] == more and [r["documents"] for r in other[5:]] == [2]


def test_equal_ropes_are_measured_once_and_written_under_each_name(tmp_path, tiny, books, monkeypatch):
    measure, measured = eval_ppl.measure, []
    monkeypatch.setattr(eval_ppl, "measure", lambda *given: measured.append(given) or measure(*given))
    command = ["--model", tiny, "--data", books, "--rope", "none", "yarn", "--len", WINDOW, 2 * WINDOW]
    rows = ppl(tmp_path, *command)
    assert len(measured) == 3  # within the window YaRN is plain RoPE
    assert [(row["length"], row["rope"]) for row in rows] == [
        (n, rope) for n in (WINDOW, 2 * WINDOW) for rope in ("none", "yarn")]
    assert rows[0]["nll"] == rows[1]["nll"] and rows[2]["nll"] != rows[3]["nll"]
    assert ppl(tmp_path, *command) == rows and len(measured) == 3
    assert len(ppl(tmp_path / "later", *[x for x in command if x != "yarn"])) == 2
    assert {(row["length"], row["rope"]) for row in ppl(tmp_path / "later", *command)} == {
        (row["length"], row["rope"]) for row in rows}


def test_more_ropes_than_colours_look_different(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    eval_ppl.plot([{"rope": f"yarn:{s}", "length": 64, "ppl": s, "ppl_by_position": [s] * eval_ppl.BINS}
                   for s in range(2, 14)], tmp_path)
    assert len({(line.get_color(), line.get_marker()) for line in saved[0].axes[0].lines}) == 12
    assert saved[0].axes[0].get_xticklabels()[0].get_rotation() == 45  # else those of 2048k overlap


@pytest.mark.parametrize("script", ["eval_ppl", "eval_passkey"])
def test_another_model_or_tokenizer_or_a_second_run_at_once_is_refused_in_a_line(tmp_path, tiny, books, capsys, script):
    main, journal = import_module(script).main, tmp_path / "out" / f"{script.removeprefix('eval_')}.jsonl"
    command = ["--rope", "none", "--len", 400, "--out", tmp_path / "out",
               *["--data", books / "book0.txt"][:2 * ("ppl" in script)]]
    main([*map(str, command), "--model", str(tiny), "--device", "cpu"])
    before = journal.read_text()
    for other in ("weights", "tokenizer"):
        shutil.copytree(tiny, tmp_path / other)
    save_tiny(tmp_path / "weights", initializer_range=0.11)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tiny / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (shutil.copytree(tiny, tmp_path / "epsilon") / "config.json").write_text(json.dumps(config))
    for path, dtype, said in (("weights", "float32", "weights_sha256"), ("tokenizer", "float32", "tokenizer_sha256"),
                              ("epsilon", "float32", "weights_sha256"), (tiny, "bfloat16", "weights_sha256, dtype")):
        gc.collect()
        line = complaint(main, capsys, *command, "--model", tmp_path / path, "--dtype", dtype)
        assert f"{journal} is of a run with another {said}; give another --out" in line
    gc.collect()
    held = Journal(journal, json.loads(before.splitlines()[0])["setup"], None)
    assert held.rows and "another run" in complaint(main, capsys, *command, "--model", tiny)
    assert journal.read_text() == before


@pytest.mark.parametrize("together", [1, 2], ids=["two windows at a time", "one window over both"])
def test_two_processes_write_what_one_writes(tmp_path, tiny, books, together):
    command = ["--model", tiny, "--rope", "none", "yarn", "--len", 96, 128, "--samples", 3, "--stride", 40,
               "--data", books]
    spawn(2, run_script, "eval_ppl", *command, "--context-parallel", together, "--out", tmp_path / "two")
    for a, b in zip(results(tmp_path / "two" / "ppl.jsonl"), ppl(tmp_path / "one", *command), strict=True):
        for key in ("nll", "ppl", "ppl_by_position") if together == 2 else ():
            assert a.pop(key) == pytest.approx(b.pop(key), rel=1e-5)
        assert a == b


@pytest.mark.parametrize("script", ["search", "finetune", "eval_ppl", "eval_passkey"])
def test_torchrun_leaves_our_options_to_us(script):
    """It takes an option for one of its own, abbreviated, if that begins with it: --start for --start-method."""
    for option in (o for action in import_module(script).parser()._actions for o in action.option_strings):
        given = ["--nproc-per-node", "2", f"{script}.py", option]
        assert get_args_parser().parse_args(given).training_script_args == [option]


@pytest.mark.parametrize("together", [1, 2])
def test_shared_out_work_comes_back_whole_and_in_order(monkeypatch, together):
    """The fourth of six processes, the others played: sums over documents must not depend on who did what."""
    shares, gave = [[10 * x for x in range(8)][r // together::6 // together] for r in range(6)], []
    monkeypatch.setattr(longrope, "rank", lambda: 3)
    monkeypatch.setattr(longrope, "world_size", lambda: 6)
    monkeypatch.setattr(longrope.dist, "all_gather_object", lambda parts, mine: parts.__setitem__(
        slice(None), shares) or gave.append(mine))
    assert longrope.spread(lambda x: 10 * x, range(8), together) == list(range(0, 80, 10)) and gave == [shares[3]]


@pytest.mark.parametrize("arguments, says", [
    ("--rope yran", "yran"), ("--rope none gone/rope.json", "gone/rope.json"), ("--data gone.txt", "gone.txt"),
    ("--len 100000", "no document of 100000 tokens"), ("--len 1", "--len must be"), ("--stride 128", "--stride below"),
    ("--stride 16 --doc-tokens 100", "--doc-tokens at least"), ("--windows 2 --stride 16", "--windows"),
    ("--windows 2 --doc-tokens 200", "--windows"), ("--windows 2 --len 100000", "no document of 99999 tokens"),
    ("--context-parallel 2 --len 126", "126 tokens"), ("--context-parallel 3", "2 processes")])
def test_a_mistake_is_one_line_before_anything_is_measured(tmp_path, tiny, books, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(longrope, "over_window", None)  # measuring would be an error
    monkeypatch.setattr(longrope, "world_size", lambda: 2 if "parallel" in arguments else 1)
    common = ["--model", tiny, "--data", books, "--len", 128, "--out", tmp_path]
    assert says in complaint(eval_ppl.main, capsys, *common, *arguments.split()) and not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line_that_says_how_much_and_what_to_lower(tmp_path, tiny, books, capsys, monkeypatch):
    monkeypatch.setattr(longrope, "over_window", lambda *_: torch.empty(10**15))
    line = complaint(eval_ppl.main, capsys, "--model", tiny, "--data", books / "book0.txt", "--len", 128,
                     "--out", tmp_path)
    assert "out of memory, tried to allocate 4000000000000000 bytes: lower --len" in line

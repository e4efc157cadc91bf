"""A search that is stopped and goes on, one on two processes, a second stage, short-window recovery, needle fitness."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BOS, HEAD_DIM, ROOT, WINDOW, complaint, random_factors, read_lines, save_tiny
from test_eval_ppl import torchrun
from test_search import history_of, on_grid, whole, without_seconds

import search
from eval_passkey import QUESTION
from longrope import Rope, UserError, load_model, load_tokenizer, read_documents, su_factor, window_nll, windows
from search import N_HAT, is_monotone, needle_windows

PAIRS, LENGTH = 32, 4 * WINDOW
SLOW = Rope.none(HEAD_DIM, 10000.0, WINDOW).turns(WINDOW) < 1  # (PAIRS,)


def command(tiny, books, out, *changes):
    return [str(x) for x in (
        "--model", tiny, "--data", books, "--len", LENGTH, "--samples", 2, "--population-size", 5, "--num-mutations", 3,
        "--num-crossovers", 2, "--num-parents", 3, "--iterations", 2, "--seed", 0, "--out", out, "--device", "cpu",
        *changes)]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Half of a toy search's time; test_search.py looks at it."""
    monkeypatch.setattr(search, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def undisturbed(tiny, books, tmp_path_factory):
    """The directory of a search that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    search.main(command(tiny, books, out))
    history = history_of(out)
    assert len(history) == 15 and {line["ppl"] is None for line in history} == {True, False}  # racing drops some
    assert whole(history).index(min(whole(history), key=lambda line: line["ppl"])) > 5  # nor is it over at the start
    return out


def same(out, other):
    return ((out / "rope.json").read_bytes() == (other / "rope.json").read_bytes()
            and without_seconds(history_of(out)) == without_seconds(history_of(other))
            and read_lines(out / "history.jsonl")[0] == read_lines(other / "history.jsonl")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Stop and go on


def test_from_a_history_cut_anywhere_the_search_goes_on_to_the_same_rope_json(
        undisturbed, tiny, books, tmp_path, monkeypatch, capsys):
    lines, measured, plain = (undisturbed / "history.jsonl").read_text().splitlines(True), [], search.Evaluator.measure
    monkeypatch.setattr(search.Evaluator, "measure", lambda self, task: [measured.append(task), plain(self, task)][1])
    for kept in range(1, len(lines) + 1):  # the first line says what was searched
        following = lines[kept] if kept < len(lines) else ""
        for part in sorted({0, 1, len(following) // 2, len(following) - 1} if kept % 5 == 1 and following else
                           {0, len(following) // 2}):
            out = tmp_path / f"{kept} {part}"
            out.mkdir()
            (out / "history.jsonl").write_text("".join(lines[:kept]) + following[:part])
            measured.clear()
            search.main(command(tiny, books, out, "--resume"))
            assert same(out, undisturbed), (kept, part)
            assert len(measured) == sum(len(json.loads(line)["nll"]) for line in lines[kept:])  # and no more
            kept_lines = (out / "history.jsonl").read_text().splitlines(True)[:kept]
            assert kept_lines == lines[:kept]  # their seconds too
    capsys.readouterr()


def test_a_history_without_its_first_line_is_refused(undisturbed, tiny, books, tmp_path, capsys):
    lines = (undisturbed / "history.jsonl").read_text().splitlines(True)
    for text in ("", lines[0][:50], "".join(lines[1:]), "no history\n" + lines[1]):
        (tmp_path / "history.jsonl").write_text(text)
        said = complaint(search.main, capsys, *command(tiny, books, tmp_path, "--resume"))
        assert "not a history that can be resumed" in said
        assert (tmp_path / "history.jsonl").read_text() == text


def test_resume_without_a_history_and_a_fresh_start_over_an_old_one(undisturbed, tiny, books, tmp_path, capsys):
    search.main(command(tiny, books, tmp_path, "--seed", 5, "--resume"))
    assert not same(tmp_path, undisturbed)
    former = {name: (tmp_path / name).read_bytes() for name in ("rope.json", "history.jsonl")}
    search.main(command(tiny, books, tmp_path))
    assert former == {"rope.json": (tmp_path / "rope.old1.json").read_bytes(),
                      "history.jsonl": (tmp_path / "history.old1.jsonl").read_bytes()}
    said = f"{tmp_path / 'history.jsonl'} is now history.old1.jsonl, {tmp_path / 'rope.json'} is now rope.old1.json"
    assert f"starting afresh (--resume goes on with a history.jsonl): {said}" in capsys.readouterr().out
    assert same(tmp_path, undisturbed)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_rope_json_without_its_history_is_set_aside_too(undisturbed, tiny, books, tmp_path, capsys, resume):
    (tmp_path / "rope.json").write_text("of another search")
    (tmp_path / "history.old1.jsonl").write_text("of a third")
    search.main(command(tiny, books, tmp_path, *resume))
    assert same(tmp_path, undisturbed)
    capsys.readouterr()
    search.main(command(tiny, books, tmp_path))
    left = {path.name: path.read_text() for path in tmp_path.glob("*.old*")}
    assert left.pop("rope.old1.json") == "of another search" and left.pop("history.old1.jsonl") == "of a third"
    assert sorted(left) == ["history.old2.jsonl", "rope.old2.json"]
    assert "is now history.old2.jsonl" in capsys.readouterr().out


def test_a_finished_search_goes_on_with_more_iterations(undisturbed, tiny, books, tmp_path, monkeypatch, capsys):
    fresh, longer = tmp_path / "fresh", tmp_path / "longer"
    search.main(command(tiny, books, fresh, "--iterations", 4))
    shutil.copytree(undisturbed, longer)
    search.main(command(tiny, books, longer, "--iterations", 4, "--resume"))
    capsys.readouterr()
    assert same(longer, fresh) and len(history_of(fresh)) == 25


def test_max_evals_counts_what_was_evaluated_before_too(undisturbed, tiny, books, tmp_path, capsys):
    search.main(command(tiny, books, tmp_path, "--max-evals", 7))
    assert without_seconds(history_of(tmp_path)) == without_seconds(history_of(undisturbed)[:7])
    record = json.loads((tmp_path / "rope.json").read_text())["search"]
    assert record["evaluations"] == 7
    search.main(command(tiny, books, tmp_path, "--max-evals", 9, "--resume"))
    assert len(history_of(tmp_path)) == 9
    search.main(command(tiny, books, tmp_path, "--resume"))
    capsys.readouterr()
    assert same(tmp_path, undisturbed)


def test_three_kills_at_different_moments_and_resume(tiny, books, tmp_path, capsys):
    """Many documents a candidate, so that the killed processes are in the middle of something."""
    changes, outs = ("--len", 512, "--samples", 3, "--population-size", 12, "--iterations", 6), {}
    search.main(command(tiny, books, tmp_path / "undisturbed", *changes))
    total = len(history_of(tmp_path / "undisturbed"))
    for lines in (2, total // 3, 2 * total // 3):
        outs[tmp_path / f"killed at {lines}"] = lines
    running = {out: subprocess.Popen([sys.executable, str(ROOT / "search.py"), *command(tiny, books, out, *changes)],
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for out in outs}
    until = time.monotonic() + 100
    while any(process.poll() is None for process in running.values()) and time.monotonic() < until:
        for out, process in running.items():
            if (out / "history.jsonl").exists() and (out / "history.jsonl").read_bytes().count(b"\n") >= outs[out]:
                process.kill()
        time.sleep(0.002)
    for out, process in running.items():
        assert process.wait(10) == -signal.SIGKILL
        assert outs[out] <= (out / "history.jsonl").read_bytes().count(b"\n") < total
        search.main(command(tiny, books, out, *changes, "--resume"))
        assert same(out, tmp_path / "undisturbed")
    capsys.readouterr()


@pytest.mark.parametrize("changes, differs", [
    (["--len", 3 * WINDOW], "len"),
    (["--seed", 2], "seed"),
    (["--dtype", "bfloat16"], "dtype"),
    (["kernel"], "attention"),
    (["--samples", 1], "data_sha256"),
    (["--data", "other.txt"], "data_sha256"),
    (["--model", "moved"], "model"),
    (["--model", "trained"], "weights_sha256"),
    (["--no-racing"], "racing"),
    (["--num-parents", 4], "num_parents"),
    (["--mutation-prob", 0.2], "mutation_prob"),
    (["--n-hat", 0], "n_hat"),
    (["--attention-factor", "yarn"], "attention_factor"),
    (["--slow-least", 1.1], "slow_least"),
    (["--init", "rope.json"], "init"),
    (["--fitness", "needle"], "fitness"),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_the_history_of_another_search_is_refused_and_stays_as_it_was(
        undisturbed, tiny, books, tmp_path, monkeypatch, capsys, changes, differs):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed, "out")
    shutil.copytree(tiny, "moved")
    shutil.copytree(tiny, "trained")
    save_tiny("trained", initializer_range=0.11)
    (tmp_path / "other.txt").write_text((books / "book4.txt").read_text())
    Rope.longrope(random_factors(0, 2), 10000.0, WINDOW, 2.0).save("rope.json")
    if "--fitness" in changes:  # a pass-key prompt takes more than LENGTH tokens of so small a vocabulary
        changes = [*changes, "--len", 512]
    if changes == ["kernel"]:
        changes = ["--attention", "math"]
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    said = complaint(search.main, capsys, *command(tiny, books, "out", *changes, "--resume"))
    named = said.partition("of a search with another ")[2].partition(";")[0].split(", ")
    assert said.count("out/history.jsonl is of a search with another") == 1 and differs in named
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_two_processes_find_what_one_finds(undisturbed, tiny, books, tmp_path):
    two = torchrun("search.py", *command(tiny, books, tmp_path)[:-2])  # which adds --device cpu itself
    assert (tmp_path / "rope.json").read_bytes() == (undisturbed / "rope.json").read_bytes()
    order = [sorted(without_seconds(history_of(out)), key=json.dumps) for out in (tmp_path, undisturbed)]
    assert order[0] == order[1]  # a line may come before that of one begun with it
    assert two.stdout.count("wrote") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The second stage, and the short set

SHORT = Rope(random_factors(3, 2), 10000.0, WINDOW, 1.0, 2, 1.07)
FINETUNED = Rope(random_factors(2, 4), 10000.0, WINDOW, 4.0, 8, 1.23, SHORT, 100)


@pytest.fixture
def init(tmp_path):
    FINETUNED.save(tmp_path / "init.json", search={"perplexity": 5.0})
    return tmp_path / "init.json"


def searched_on(init, tiny, books, *changes):
    """(rope.json, history) of a search on top of it."""
    out = init.parent / "out"
    search.main(command(tiny, books, out, "--init", init, *changes))
    return json.loads((out / "rope.json").read_text()), history_of(out)


def best_genes(history):
    return min(whole(history), key=lambda line: line["ppl"])["genes"]


def test_second_stage_factors_multiply_exactly_and_the_short_set_stays(init, tiny, books, capsys):
    written, history = searched_on(init, tiny, books, "--len", 512)  # from 256 tokens, s = 2
    best = best_genes(history)
    assert written["long_factor"] == [a * b for a, b in zip(FINETUNED.rescale_factors, best["factors"])]
    assert set(best["factors"]) != {1.0}
    assert written["long_n_hat"] == best["n_hat"] and written["factor"] == 8.0
    assert written["original_max_position_embeddings"] == WINDOW
    assert written["attention_factor"] == su_factor(8.0, WINDOW)  # of both stages
    before = json.loads(init.read_text())
    for key in ("short_factor", "short_n_hat", "short_attention_factor", "short_max_length", "rope_theta"):
        assert written[key] == before[key]
    for line in history:
        assert is_monotone(line["genes"]["factors"]) and on_grid(line["genes"]["factors"], 2.5)
    assert history[0]["genes"]["factors"] == [2.0] * PAIRS
    capsys.readouterr()


def test_what_a_second_stage_measures_is_the_product(init, tiny, books, capsys):
    written, history = searched_on(init, tiny, books, "--len", 512, "--iterations", 0)
    found = windows(read_documents([books]), load_tokenizer(tiny), 512, 2)
    model = load_model(tiny, init.parent / "out" / "rope.json", device="cpu")

    def ppl(rope):
        model.rope = rope
        return math.exp(torch.stack([window_nll(model, w.tokens) for w in found]).mean())

    assert ppl(model.rope) == pytest.approx(best_ppl := written["search"]["perplexity"], rel=1e-9)
    assert best_ppl == min(line["ppl"] for line in whole(history))
    rows = {row["rope"]: row for row in written["search"]["comparison"]["rows"]}
    assert rows["none"]["search"] == pytest.approx(ppl(FINETUNED), rel=1e-9)  # as it was fine-tuned
    assert rows["searched"]["search"] == pytest.approx(best_ppl, rel=1e-9)
    capsys.readouterr()


def test_a_short_set_is_for_less_than_the_long_one(init, tiny, books, tmp_path, capsys):
    for length, said in ((4 * WINDOW, "the long set would never be used"), (1, "nothing to predict")):
        assert said in complaint(search.main, capsys, *command(
            tiny, books, tmp_path / "out", "--init", init, "--short", "--len", length))


def test_a_second_stage_has_to_go_beyond_the_first(init, tiny, books, tmp_path, capsys):
    said = complaint(search.main, capsys, *command(tiny, books, tmp_path / "out", "--init", init))
    assert "nothing to extend, the window is 256 already" in said and not (tmp_path / "out").exists()


def test_in_a_second_stage_slow_are_pairs_that_make_no_full_turn_within_the_first_stages_window(
        init, tiny, books, capsys):
    Rope.longrope([1.0] * PAIRS, 10000.0, WINDOW, 4.0).save(init)  # pairs that turn within 4 windows, not within one
    _, history = searched_on(init, tiny, books, "--len", 512, "--iterations", 0, "--slow-least", 1.25)
    turns = 4 * WINDOW / (2 * math.pi * 10000.0 ** (np.arange(PAIRS) / PAIRS))
    factors = np.array([line["genes"]["factors"] for line in history])
    assert (factors[:, turns < 1] == 2.5).all()  # 1.25 s is the highest there is
    assert (factors[:, turns >= 1].min(axis=0) < 2.5).all()
    capsys.readouterr()


@pytest.mark.parametrize("length", [None, 128], ids=["the window", "128 tokens"])
def test_short_writes_the_short_set_and_leaves_the_long_one(init, tiny, books, length, capsys):
    before = json.loads(init.read_text())
    written, history = searched_on(init, tiny, books, "--short", "--len", length or WINDOW)
    best = best_genes(history)
    short = {"short_factor": best["factors"], "short_n_hat": best["n_hat"],
             "short_attention_factor": best["attention_factor"], "short_max_length": length or WINDOW}
    assert {k: v for k, v in written.items() if k != "search"} == {k: v for k, v in before.items() if k != "search"
                                                                  } | short
    assert list(written)[:-1] == list(before)[:-1]
    first = {line["origin"]: line["genes"]["attention_factor"] for line in history[:5]}  # a gene, on the grid
    su = round(su_factor(2.0 if length else 4.0, WINDOW), 2)
    assert (first["none"], first["long"], first["pi"]) == (1.0, 1.23, su)
    for line in history:
        assert 1 <= line["genes"]["attention_factor"] <= 1.25 * su_factor(4.0, WINDOW) + 0.01
        assert is_monotone(line["genes"]["factors"]) and on_grid(line["genes"]["factors"], 5.0)
        assert line["genes"]["n_hat"] in {*N_HAT}
    found = windows(read_documents([books]), load_tokenizer(tiny), length or WINDOW, 2)
    model = load_model(tiny, init.parent / "out" / "rope.json", device="cpu")
    nll = torch.stack([window_nll(model, w.tokens) for w in found])  # chosen by the length alone
    assert math.exp(nll.mean()) == pytest.approx(written["search"]["perplexity"], rel=1e-9)
    rows = {row["rope"]: row["search"] for row in written["search"]["comparison"]["rows"]}
    assert rows["searched"] == pytest.approx(written["search"]["perplexity"], rel=1e-9)
    assert rows["none"] != rows["long"] != rows["searched"]
    capsys.readouterr()


def measured_best(monkeypatch, name):
    """The comparison says perplexity 1 of this rope."""
    compare = search.compare
    monkeypatch.setattr(search, "compare", lambda *given: [
        row | {"search": 1.0} if row["rope"] == name else row for row in compare(*given)])


@pytest.mark.parametrize("better, factors", [("none", (1.0,) * PAIRS), ("long", FINETUNED.rescale_factors)])
def test_a_short_set_no_better_than_plain_rope_or_the_long_set_is_not_kept(init, tiny, books, capsys, monkeypatch,
                                                                          better, factors):
    measured_best(monkeypatch, better)
    written, _ = searched_on(init, tiny, books, "--short", "--len", WINDOW)
    assert tuple(written["short_factor"]) == factors and written["search"]["kept"] == better
    rows = {row["rope"]: row["search"] for row in written["search"]["comparison"]["rows"]}
    assert written["search"]["perplexity"] == rows[better]
    assert written["long_factor"] == list(FINETUNED.rescale_factors)
    assert "so rope.json has " + {"none": "plain RoPE", "long": "the long set"}[better] in capsys.readouterr().out


@pytest.mark.parametrize("better, length, least, allowed", [
    ("none", 2 * WINDOW, 1.19, False), ("long", 2 * WINDOW, 1.19, False), ("long", WINDOW + 8, 1, True)])
def test_no_set_below_the_bound_is_kept_as_the_short_one(init, tiny, books, monkeypatch, capsys, better, length, least,
                                                         allowed):
    measured_best(monkeypatch, better)
    written, _ = searched_on(init, tiny, books, "--short", "--len", length, "--slow-least", least)
    assert np.array(written["short_factor"])[SLOW].min() >= round(least * length / WINDOW, 2)
    assert (written["search"]["kept"] == better) is allowed
    said = f"{better} has less perplexity, but slow pairs below --slow-least: it is not kept"
    assert (said in capsys.readouterr().out) is not allowed


def test_plain_rope_is_compared_as_an_exported_directory_has_it(tiny_model):
    """transformers gives the long set's attention factor to the short one, too."""
    for export, attention_factor in (([], 1.0), (["--export", "out"], FINETUNED.attention_factor)):
        args = search.parser().parse_args(["--len", "64", "--short", "--attention-factor", "su", *export])
        plain = search.start_of(args, tiny_model, FINETUNED)[3]["none"].at(64)
        assert set(plain.rescale_factors) == {1.0} and plain.attention_factor == attention_factor


def test_no_short_individual_touches_the_long_set(tiny_model):
    args = search.parser().parse_args(["--short", "--len", "64", "--attention-factor", "su"])
    make_rope = search.start_of(args, tiny_model, FINETUNED)[2]
    rope = make_rope(search.Individual(random_factors(9, 4), 64, 1.5, "test"))
    assert rope.short == Rope(random_factors(9, 4), 10000.0, WINDOW, 1.0, 64, 1.5) and rope.short_max_length == 64
    assert replace(rope, short=SHORT, short_max_length=100) == FINETUNED


def start_of(model, length, scale, *changes):
    args = search.parser().parse_args(["--len", str(length), "--attention-factor", "su", *changes])
    init = Rope.longrope(random_factors(2, scale), 10000.0, WINDOW, scale) if scale > 1 else None
    return search.start_of(args, model, init)[:2]


def test_the_bounds_of_lambda(tiny_model):
    """1 to 1.25 s; of the short set 1 to 1.25 times the lesser of s and 5, or as far as it goes beyond the window."""
    for changes, length, scale, largest in (((), 512, 1, 10.0), ((), 160, 1, 3.125), ((), 512, 4, 2.5),
                                            (["--short"], 64, 4, 5.0), (["--short"], 64, 8, 6.25),
                                            (["--short"], 64, 5, 6.25), (["--short"], 100, 2, 2.5),
                                            (["--short"], 448, 8, 8.75)):
        starts, space = start_of(tiny_model, length, float(scale), *changes)
        assert abs(space.largest - largest) <= 0.0051 and space.n_hats == N_HAT
        for start in starts:
            assert is_monotone(start.factors) and on_grid(start.factors, space.largest)


def test_slow_least_bounds_the_short_set_by_how_far_it_goes_beyond_the_window(tiny_model):
    short = "--short", "--slow-least", "1.19"
    starts, space = start_of(tiny_model, 2 * WINDOW, 4.0, *short)
    assert 0 < SLOW.sum() < PAIRS and space.smallest == tuple(np.where(SLOW, 2.38, 1.0))  # 1.19 * 2, whatever init's s
    assert {s.origin for s in starts} == {"none", "long", "pi", "ntk", "yarn"}
    for start in starts:
        assert np.array(start.factors)[SLOW].min() >= 2.38 and is_monotone(start.factors)
    _, space = start_of(tiny_model, 7 * WINDOW, 16.0, *short)
    assert space.smallest[-1] == 8.33 and space.largest == 8.75  # 1.25 s of 7 windows, where 6.25 would be below
    for length in (WINDOW, WINDOW // 2):
        with pytest.raises(UserError, match=f"bounds nothing: {length} tokens are within the window of {WINDOW}"):
            start_of(tiny_model, length, 4.0, *short)


def test_slow_least_of_a_short_set_is_on_top_of_the_factors_the_model_was_trained_with(tiny_model, monkeypatch):
    trained = Rope.longrope([1.0] * 16 + [8.0] * 16, 10000.0, WINDOW, 8.0)
    monkeypatch.setattr(Rope, "trained", property(lambda self: trained))
    starts, space = start_of(tiny_model, 2 * WINDOW, 16.0, "--short", "--slow-least", "1.19")
    assert (trained.turns(WINDOW) < 1)[16:].all() and space.smallest[16:] == (19.04,) * 16 and space.largest == 20.0
    assert {s.origin: s for s in starts}["pi"].factors[-1] == 19.04  # 16, put above the bound
    starts, space = start_of(tiny_model, 2 * WINDOW, 16.0, "--short")
    assert {s.origin: s for s in starts}["pi"].factors == (2.0,) * 16 + (16.0,) * 16 and set(space.smallest) == {1.0}
    trained = replace(trained, rescale_factors=(*trained.rescale_factors[:20], 7.0, *trained.rescale_factors[21:]))
    starts, space = start_of(tiny_model, 2 * WINDOW, 16.0, "--short", "--slow-least", "1.19")
    assert space.smallest[16:] == (19.04,) * 16  # not 16.66 after 19.04: the order holds of the bound, too


def test_slow_least_says_where_no_pair_is_slow():
    args = search.parser().parse_args(["--slow-least", "1.19"])
    with pytest.raises(UserError, match=f"bounds nothing: every pair makes a full turn within the window of {WINDOW}"):
        search.least_factors(args, Rope.none(HEAD_DIM, 10.0, WINDOW), WINDOW, 4.0)


def test_the_starts_of_a_search_differ(tiny_model):
    """PI, NTK and YaRN, and for the short set plain RoPE and the long set, equal to PI or not."""
    assert [s.origin for s in start_of(tiny_model, 512, 1)[0]] == ["pi", "ntk", "yarn"]
    assert {s.origin for s in start_of(tiny_model, 64, 4.0, "--short")[0]} == {"none", "long", "pi", "ntk", "yarn"}
    args = search.parser().parse_args(["--len", "64", "--short", "--attention-factor", "su"])
    pi = Rope.longrope([4.0] * PAIRS, 10000.0, WINDOW, 4.0)
    starts = search.start_of(args, tiny_model, pi)[0]
    assert len(set(starts)) == len(starts)


def test_a_short_set_for_more_than_the_window_starts_as_for_so_much(tiny_model):
    short = "--short", "--attention-factor", "search"
    starts = {s.origin: s for s in start_of(tiny_model, 2 * WINDOW, 4.0, *short)[0]}
    assert set(starts["pi"].factors) == {2.0} and max(starts["yarn"].factors) == 2.0
    assert starts["yarn"].attention_factor == round(su_factor(2, WINDOW), 2) < round(su_factor(4, WINDOW), 2)
    assert starts["none"].attention_factor == 1.0
    at_most = {s.origin: s for s in start_of(tiny_model, WINDOW, 4.0, *short)[0]}
    assert set(at_most["pi"].factors) == {4.0} and at_most["yarn"].attention_factor == round(su_factor(4, WINDOW), 2)


def test_a_search_can_start_from_factors_found_before(tiny_model, tmp_path):
    """They become an individual, put into the space; its mutants are in the first population."""
    rope = Rope.longrope(random_factors(3, 4), 10000.0, WINDOW, 4.0, n_hat=28)
    rope.save(tmp_path / "rope.json")
    starts, _ = start_of(tiny_model, 256, 1, "--start-from", str(tmp_path / "rope.json"))
    assert [s.origin for s in starts] == ["start", "pi", "ntk", "yarn"]
    assert starts[0].factors == tuple(np.round(rope.rescale_factors, 2)) and starts[0].n_hat == 28
    assert {s.n_hat for s in starts[1:]} == {0}
    starts, _ = start_of(tiny_model, 256, 1, "--start-from", str(tmp_path / "rope.json"), "--n-hat", "4")
    assert {s.n_hat for s in starts} == {4}
    replace(rope, n_hat=100, attention_factor=1.05).save(tmp_path / "rope.json")
    starts, space = start_of(tiny_model, 128, 1, "--start-from", str(tmp_path / "rope.json"), "--attention-factor",
                             "search")
    assert starts[0].n_hat == 128 and starts[0].attention_factor == 1.05 and max(starts[0].factors) == space.largest


def test_in_a_second_stage_the_factors_to_start_from_are_relative_to_those_of_init(tiny_model, tmp_path):
    rope = Rope.longrope(np.array(random_factors(2, 4.0)) * 2, 10000.0, WINDOW, 8.0)
    rope.save(tmp_path / "rope.json")
    starts, _ = start_of(tiny_model, 512, 4.0, "--start-from", str(tmp_path / "rope.json"))
    assert starts[0].origin == "start" and set(starts[0].factors) == {2.0}


def test_a_short_search_starts_from_the_short_set(tiny_model, tmp_path):
    replace(FINETUNED, short_max_length=WINDOW).save(tmp_path / "rope.json")
    starts, _ = start_of(tiny_model, WINDOW, 4.0, "--short", "--start-from", str(tmp_path / "rope.json"))
    assert starts[0].origin == "start" and starts[0].factors == tuple(np.round(SHORT.rescale_factors, 2))


def test_a_search_from_good_factors_ends_no_worse_and_says_so(undisturbed, tiny, books, tmp_path, capsys):
    found = json.loads((undisturbed / "rope.json").read_text())
    search.main(command(tiny, books, tmp_path, "--start-from", undisturbed / "rope.json", "--iterations", 0))
    rows = json.loads((tmp_path / "rope.json").read_text())["search"]["comparison"]["rows"]
    assert [row["rope"] for row in rows] == ["none", "pi", "ntk", "yarn", "start", "searched"]
    assert rows[-1]["search"] <= rows[-2]["search"] == pytest.approx(found["search"]["perplexity"])
    assert "start" in capsys.readouterr().out
    written, again = (tmp_path / "rope.json").read_bytes(), ["--start-from", undisturbed / "rope.json", "--resume"]
    search.main(command(tiny, books, tmp_path, "--iterations", 0, *again))
    capsys.readouterr()
    assert (tmp_path / "rope.json").read_bytes() == written
    said = complaint(search.main, capsys, *command(tiny, books, tmp_path, "--iterations", 0, "--resume"))
    assert "another start" in said


def test_factors_to_start_from_are_put_into_the_space_and_the_user_told(tiny_model, tmp_path, capsys):
    """What is compared, and may be kept as a short set, is what was evaluated."""
    far = Rope.longrope(np.linspace(1, 16, PAIRS), 10000.0, WINDOW, 16.0, n_hat=8, attention_factor=1.5)
    far.save(tmp_path / "rope.json")
    args = search.parser().parse_args(["--len", "128", "--attention-factor", "none", "--n-hat", "0", "--start-from",
                                       str(tmp_path / "rope.json")])
    compared = search.start_of(args, tiny_model, None)[3]
    assert max(compared["start"].rescale_factors) == 2.5 and compared["start"].n_hat == 0
    assert compared["start"].attention_factor == 1.0
    assert "this search, factors rising from 1 to 2.5, n_hat 0\n" in capsys.readouterr().out
    args.short, args.len = True, WINDOW
    compared = search.start_of(args, tiny_model, FINETUNED)[3]
    assert compared["start"].at(WINDOW) == Rope.none(HEAD_DIM, 10000.0, WINDOW)  # the short set of that file
    assert compared["start"].rescale_factors == FINETUNED.rescale_factors


def test_the_short_set_of_factors_that_are_not_in_order_can_be_searched(tiny_model):
    """Other tools' long sets need not keep the paper's constraint."""
    args = search.parser().parse_args(["--len", "64", "--short", "--attention-factor", "su"])
    falling = Rope.longrope(np.linspace(4, 1, PAIRS), 10000.0, WINDOW, 4.0)
    starts, space = search.start_of(args, tiny_model, falling)[:2]
    assert all(is_monotone(start.factors) for start in starts)
    for start in starts:
        search.mutate(np.random.default_rng(0), start, 1.0, space)


@pytest.mark.parametrize("n_hat", [0, 16])
@pytest.mark.parametrize("second_stage", [False, True], ids=["first stage", "second stage"])
def test_n_hat_is_fixed_by_the_command_line(init, tiny, books, tmp_path, capsys, n_hat, second_stage):
    changes = ["--len", 512, "--init", init] if second_stage else []
    search.main(command(tiny, books, tmp_path / "out", *changes, "--n-hat", n_hat))
    capsys.readouterr()
    assert {line["genes"]["n_hat"] for line in history_of(tmp_path / "out")} == {n_hat}
    assert Rope.load(tmp_path / "out" / "rope.json").n_hat == n_hat


# ---------------------------------------------------------------------------------------------------------------------
# Needle fitness

NEEDLE_LENGTH = 512


def fillers(found):
    return [(w.document, w.tokens.tolist()[1:]) for w in found]


@pytest.fixture(scope="module")
def documents(tiny, books):
    """(windows of text, what becomes of them, the tokenizer)."""
    tokenizer = load_tokenizer(tiny)
    found = windows(read_documents([books]), tokenizer, NEEDLE_LENGTH, 4)
    return found, needle_windows(fillers(found), tokenizer, NEEDLE_LENGTH, seed=0), tokenizer


def test_a_needle_window_has_its_key_near_the_start_and_its_question_at_the_end_and_scores_the_answer(documents):
    found, made, tokenizer = documents
    question, keys = tokenizer.encode(QUESTION, add_special_tokens=False).ids, set()
    assert [w.document for w in made] == [w.document for w in found]
    for w in made:
        tokens = w.tokens.tolist()
        assert len(tokens) == NEEDLE_LENGTH and w.tokens.dtype == torch.int64
        key = tokenizer.decode(tokens[w.first:]).strip()  # the scored tokens are the answer, all of it, nothing else
        assert key.isdigit() and len(key) == 5 and key not in keys
        assert tokens[w.first - len(question):w.first] == question
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        text = tokenizer.decode(tokens)
        before, found_needle, after = text.partition(needle)
        assert found_needle and text.endswith(f"\n{QUESTION} {key}")
        task, filler = before.partition(" there.\n")[::2]
        assert len(filler) <= 0.1 * (len(filler) + len(after)) + 12 and after.count(QUESTION) == 1  # 12: a token cut
        keys.add(key)


def test_the_filler_of_a_needle_window_is_its_document(documents):
    found, made, tokenizer = documents
    for source, w in zip(found, made):
        words = tokenizer.decode(w.tokens.tolist()).split("is the pass key.\n")[1].split("\nWhat is")[0][5:-5]
        assert words and words in tokenizer.decode(source.tokens.tolist())


def test_without_data_the_filler_is_that_of_the_pass_key_protocol(documents):
    found, made, tokenizer = documents
    for w, other in zip(needle_windows([("none", None)] * len(found), tokenizer, NEEDLE_LENGTH, 0), made):
        text = tokenizer.decode(w.tokens.tolist())
        assert len(w.tokens) == NEEDLE_LENGTH and text.count(" The sky is blue. The sun is yellow. Here we go.") > 3
        assert w.tokens[w.first:].tolist() == other.tokens[other.first:].tolist() and w.document != other.document


def test_a_needle_window_has_one_beginning_of_text(documents):
    for w in documents[1]:
        assert w.tokens[0] == BOS and (w.tokens == BOS).sum() == 1


def test_needle_windows_come_from_the_seed(documents):
    found, made, tokenizer = documents
    again, other = (needle_windows(fillers(found), tokenizer, NEEDLE_LENGTH, seed) for seed in (0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made, again))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(made, other))


def test_a_needle_window_is_never_cut_off(documents):
    """At the least length that it fits there is still all of it; below that it is said."""
    found, _, tokenizer = documents
    least = None
    for length in range(100, 320):
        try:
            (w,) = needle_windows(fillers(found)[:1], tokenizer, length, 0)
        except UserError as e:
            assert least is None and "raise --len" in str(e)
            continue
        least = least or length
        text = tokenizer.decode(w.tokens.tolist())
        assert len(w.tokens) == length and "\n" + QUESTION + tokenizer.decode(w.tokens[w.first:].tolist()) in text
    assert least and least > 100


def test_needle_fitness_is_the_perplexity_of_the_answers_alone(tiny, books, tmp_path, documents, capsys):
    changes = ("--fitness", "needle", "--len", NEEDLE_LENGTH, "--iterations", 0, "--seed", 0)
    search.main(command(tiny, books, tmp_path, *changes))
    made = documents[1][:2]
    scored = sum(len(w.tokens) - w.first for w in made)
    assert 2 * 2 <= scored <= 2 * 6  # five digits or fewer tokens, perhaps a space
    for line in history_of(tmp_path):
        assert line["ppl"] == pytest.approx(math.exp(sum(line["nll"]) / scored), rel=1e-12)
    record = json.loads((tmp_path / "rope.json").read_text())["search"]
    assert record["fitness"] == "needle" and len(record["comparison"]["unseen"]) == 2
    model = load_model(tiny, tmp_path / "rope.json", device="cpu")
    nll = torch.cat([window_nll(model, w.tokens, w.first) for w in made])
    assert len(nll) == scored and math.exp(nll.mean()) == pytest.approx(record["perplexity"], rel=1e-9)
    assert "perplexity of the answer at 512 tokens" in capsys.readouterr().out


def test_without_data_a_needle_search_needs_no_documents(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "read_documents", None)
    monkeypatch.chdir(tmp_path)
    search.main(["--model", str(tiny), "--fitness", "needle", "--len", str(NEEDLE_LENGTH), "--population-size", "3",
                 "--iterations", "0", "--device", "cpu"])
    record = json.loads((tmp_path / f"out/search-{NEEDLE_LENGTH}-needle/rope.json").read_text())["search"]
    assert record["data"] == ["pass key 0", "pass key 1"] and len(record["comparison"]["unseen"]) == 2
    capsys.readouterr()

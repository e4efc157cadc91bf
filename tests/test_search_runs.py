"""Whole searches: what they leave, stopped and going on, over several processes, a second stage, a short set."""
import gc
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import (WINDOW, complaint, hf_logits, make_rope, processes, random_factors, random_tokens, read_lines,
                      save_tiny)
from experiments import second_stage
from test_search import PAIRS, SLOW, good
from tqdm import tqdm

import longrope
import search
from eval_passkey import ask_in_pieces, make_prompt, make_trials, prompt_in_pieces
from longrope import (FORMULAS, Factors, data_hash, load_model, load_rope, load_tokenizer, plain, read_documents,
                      rope_to_dict, sha256_of, su_factor, window_nll, windows, write_json)
from search import KEY_WEIGHT, N_HAT

LENGTH, SU = 4 * WINDOW, su_factor(4.0, WINDOW)
EVALUATIONS, SAMPLES = 5 + 2 * (3 + 2), 3  # candidates, and the documents of six that each is measured on
COMPARED = 7 * (6 + 1) - 2 * SAMPLES  # ropes times items, but documents of the first and the best


def command(tiny, books, out, *changes):
    return [str(x) for x in (
        "--model", tiny, "--data", *sorted(books.glob("book*")), "--len", LENGTH, "--samples", SAMPLES, "--fitness",
        "ppl", "--population-size", 5, "--num-mutations", 3, "--num-crossovers", 2, "--num-parents", 3, "--iterations",
        2, "--screening", 8, "--attention-factor", "su", "--out", out, "--device", "cpu", *changes)]


def default_fitness(command):
    at = command.index("--fitness")
    return command[:at] + command[at + 2:]


def rows_of(out, kind="genes"):
    """The candidates in a history, or kind="rope" all that was measured, without the time it took."""
    rows = []
    for line in (out / "history.jsonl").read_text().splitlines():
        with suppress(ValueError):  # a torn line stays
            rows.append({k: v for k, v in json.loads(line).items() if k != "seconds"})
    return [row for row in rows if kind in row]


def best_of(out):
    genes = min(rows_of(out), key=lambda row: row["fitness"])["genes"]
    return Factors(tuple(genes.pop("rescale_factors")), **genes)


def written(out):
    """rope.json, and what it records of the search without how that was run."""
    rope = json.loads((out / "rope.json").read_text())
    record = rope.pop("search")
    return rope, {k: v for k, v in record.items() if k not in ("arguments", "device", "processes")}


def result(out):
    found = sorted(rows_of(out, "rope"), key=lambda row: (row["rope"], str(row["item"])))  # several have another order
    return written(out), rows_of(out), found, rows_of(out, "setup")


def ppl_of(tiny, books, rope, length, documents=slice(SAMPLES)):
    found = windows(read_documents([books]), load_tokenizer(tiny), length, 6)[documents]
    model = load_model(tiny, rope, device="cpu")
    return pytest.approx(math.exp(torch.stack([window_nll(model, t) for _, t in found]).mean()), rel=1e-9)


class NoBar(tqdm):
    def __init__(self, *given, **more):
        super().__init__(*given, **more | {"disable": True})


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No plot, half of a toy search's time, and no bar; those of `undisturbed` are real."""
    monkeypatch.setattr(search, "plot", lambda *_: None)
    monkeypatch.setattr(search, "tqdm", NoBar)


@pytest.fixture
def measured(monkeypatch):
    """A list that fills with all that is measured."""
    calls, measure = [], search.measure
    monkeypatch.setattr(search, "measure", lambda model, *what: [measure(model, *what), calls.append(what)][0])
    return calls


@pytest.fixture(scope="module")
def undisturbed(tiny, books, tmp_path_factory):
    """A search that nothing stopped: .out, what it .printed, its .result and the .lines of its history."""
    out, printed = tmp_path_factory.mktemp("undisturbed"), StringIO()
    with redirect_stdout(printed):
        search.main(command(tiny, books, out))
    fitness = [row["fitness"] for row in rows_of(out)]
    assert len(fitness) == EVALUATIONS and fitness.index(min(fitness)) > 5  # it is not over at the start
    lines = (out / "history.jsonl").read_bytes().splitlines(True)
    return SimpleNamespace(out=out, printed=printed.getvalue(), result=result(out), lines=lines)


# ---------------------------------------------------------------------------------------------------------------------
# What a search leaves


def test_history_has_a_line_for_every_candidate(undisturbed):
    rows = rows_of(undisturbed.out)
    assert len({json.dumps(row["genes"]) for row in rows}) == EVALUATIONS
    assert [row["origin"] for row in rows[:5]] == ["yarn-su", "ntk", "pi", "none", "mutation"]
    assert [row["iteration"] for row in rows] == [0] * 5 + [1] * 5 + [2] * 5
    assert rows[3]["genes"]["rescale_factors"] == [1.0] * PAIRS
    for row in rows[:3]:
        exact = FORMULAS[row["origin"]](PAIRS, 10000.0, WINDOW, 4.0).rescale_factors
        assert np.abs(np.subtract(row["genes"]["rescale_factors"], exact)).max() <= 0.005 + 1e-12
    for row in rows:
        assert good(row["genes"].pop("rescale_factors"), 5.0) and row["genes"] == {"n_hat": 0, "attention_factor": SU}
        above = [row["nll"][document] - rows[0]["nll"][document] for document in "012"]
        assert row["fitness"] == pytest.approx(sum(above) / (SAMPLES * (LENGTH - 1)), abs=1e-12)
        assert row["answer_nll"] == 0 and [*row["nll"]] == ["0", "1", "2"]
    assert len({row["fitness"] for row in rows}) > EVALUATIONS / 2  # the factors matter


def test_rope_json_is_the_best_of_the_history_and_measures_what_it_says(undisturbed, tiny, books):
    rope, record = load_rope(undisturbed.out / "rope.json"), read_lines(undisturbed.out / "history.jsonl")[1]["run"]
    assert rope == make_rope(best_of(undisturbed.out).rescale_factors, 4.0)
    assert record["arguments"]["population_size"] == 5 and record["torch"] == torch.__version__
    record, found = written(undisturbed.out)[1], windows(read_documents([books]), load_tokenizer(tiny), LENGTH, 6)
    on, off = (ppl_of(tiny, books, rope, LENGTH, some) for some in (slice(3), slice(3, 6)))
    assert record["perplexity"] == on
    row, fitness = record["comparison"][-1], pytest.approx(math.log(record["perplexity"]), rel=1e-12)
    assert row == {"rope": "searched", "attention_factor": SU, "search": on, "unseen": off, "keys": row["keys"],
                   "fitness": fitness} and row["keys"] in range(11)
    assert (record["model"], record["target_length"], record["seed"]) == (str(tiny), LENGTH, 0)
    assert (record["evaluations"], record["kept"]) == (EVALUATIONS, "searched")
    assert record["data_sha256"] == data_hash([tokens for _, tokens in found])
    assert record["data"] == ["book0.txt", "book1.txt", "book2.txt"]


def test_search_prints_the_cost_first_and_a_table_at_the_end_and_draws_a_plot(undisturbed):
    lines = undisturbed.printed.splitlines()
    assert lines[0].startswith("15 candidates, each on 3 documents of 256 tokens and 0 pass keys, take about ")
    start = next(i for i, line in enumerate(lines) if line.startswith("rope "))
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[start + 1:start + 8]}
    assert [*rows] == ["none", "pi", "ntk", "yarn", "yarn-su", "first", "searched"]
    for row in written(undisturbed.out)[1]["comparison"]:
        expected = [row[key] for key in ("attention_factor", "search", "unseen", "keys")]
        assert rows[row["rope"]] == pytest.approx(expected, abs=1e-3)
        assert 1 < row["search"] != row["unseen"] > 1
    assert (undisturbed.out / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_with_everything_searched_all_stays_within_bounds_and_the_best_is_written(tiny, books, tmp_path, capsys):
    search.main(command(tiny, books, tmp_path, "--attention-factor", "search", "--n-hat", "search", "--slow-least", 1.1,
                        "--screening", 1, "--samples", 7, "--seed", 2))  # the last of a flag counts
    genes = [row["genes"] for row in rows_of(tmp_path)]
    attention, n_hats = {g["attention_factor"] for g in genes}, {g["n_hat"] for g in genes}
    assert all(x == round(x, 2) and 1.0 <= x <= round(1.25 * SU, 2) for x in attention) and len(attention) > 2
    assert n_hats <= {*N_HAT} and len(n_hats) > 2
    assert min(min(np.array(g["rescale_factors"])[SLOW]) for g in genes) >= 4.4  # 1.1 s
    assert load_rope(tmp_path / "rope.json").long == best_of(tmp_path)
    assert "each on 6 documents of" in (printed := capsys.readouterr().out) and " 0 unseen" in printed


def test_what_is_exported_computes_the_same_in_transformers(
        undisturbed, tiny, books, tmp_path, measured, monkeypatch, capsys):
    shutil.copytree(undisturbed.out, tmp_path / "out")
    again = command(tiny, books, tmp_path / "out", "--export", tmp_path / "hf")
    search.main(again)  # the search is over: nothing is measured
    assert not measured and result(tmp_path / "out") == undisturbed.result
    hf, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), random_tokens(LENGTH)
    model = load_model(tiny, undisturbed.out / "rope.json", device="cpu")
    torch.testing.assert_close(hf_logits(hf, tokens), model(tokens), atol=1e-4, rtol=0)
    assert "give a new directory" in complaint(search.main, capsys, *again)  # it could be a model trained since
    other = [*again, "--export", str(tmp_path / "other")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "copy_file", lambda file, path: signal.raise_signal(signal.SIGINT))
        search.main(other)
    gc.collect()  # the traceback, and with it the lock of the history
    assert not (tmp_path / "other" / "model.safetensors").exists()
    search.main(other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert "give a new directory" in complaint(search.main, capsys, *other)
    (tmp_path / "out" / "history.jsonl").unlink()  # a rope.json of something else stays
    said = complaint(search.main, capsys, *command(tiny, books, tmp_path / "out"))
    assert "has rope.json of something else; give another --out" in said and (tmp_path / "out" / "rope.json").exists()


def test_each_candidate_is_measured_on_the_next_document_against_the_first_candidate_on_the_same(
        tiny, books, tmp_path):
    search.main(command(tiny, books, tmp_path, "--samples", 1))
    first, *rows = rows_of(tmp_path)
    assert [*first["nll"]] == ["0", "1"] and first["fitness"] == 0
    for n, row in enumerate(rows, 1):
        (document, nll), = row["nll"].items()
        assert document == str(n % 2)
        assert row["fitness"] == pytest.approx((nll - first["nll"][document]) / (LENGTH - 1), abs=1e-12)


def test_with_keys_the_best_of_the_last_is_written_as_it_is_after_a_cut_and_by_two_processes(
        tiny, books, tmp_path, measured):
    """Fitness is NLL a token and a little of the keys. The best three are measured on all documents and other keys."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    keys, last, found = default_fitness(command(tiny, books, alone, "--samples", 1, "--seed", 4)), {}, {}
    search.main(keys)
    for row in rows_of(alone, "rope"):
        found.setdefault(row["rope"], {})[row["item"]] = row["found"]
    first = rows_of(alone)[0]["nll"]
    for row in rows_of(alone):
        rope, answer = make_rope(row["genes"]["rescale_factors"], 4.0), row["answer_nll"]
        above = [(nll - first[document]) / (LENGTH - 1) for document, nll in row["nll"].items()]
        assert row["fitness"] == pytest.approx(np.mean(above) + KEY_WEIGHT * math.log1p(answer), rel=1e-9)
        assert answer > 0 and row["keys"] in range(6) and min(np.array(rope.long.rescale_factors)[SLOW]) >= 4.76
        of = found[sha256_of(rope_to_dict(rope))]
        assert of["search"][0] == answer and {str(key): of[key] for key in map(int, row["nll"])} == row["nll"]
        if "last" in of:
            assert of["last"][0] != answer  # of other keys
            last[(of[0] + of[1]) / (2 * (LENGTH - 1)) + KEY_WEIGHT * math.log1p(of["last"][0])] = rope_to_dict(rope)
    assert len(last) in (3, 4) and written(alone)[0] == last[min(last)]
    assert load_rope(alone / "rope.json").long != best_of(alone)  # it was not the lowest before

    lines = (alone / "history.jsonl").read_bytes().splitlines(True)
    cut.mkdir()
    left = sum('"item"' in line.decode() for line in lines)
    for kept in (10 + 3 * EVALUATIONS - 1, 10 + 3 * EVALUATIONS + 5):  # in the search, in the last stage
        (cut / "history.jsonl").write_bytes(b"".join(lines[:kept]))
        measured.clear()
        search.main([*keys, "--out", str(cut)])
        asked = [item for _, item in measured if type(item) is list]
        assert len({str([tokens.tolist() for tokens, *_ in prompts]) for prompts in asked}) <= 3  # keys of each stage
        assert result(cut) == result(alone)
        assert len(measured) == left - sum('"item"' in line.decode() for line in lines[:kept])
    both = start(2, [*keys, "--out", str(tmp_path / "both")])
    assert [process.join(100) or process.exitcode for process in both] == [0, 0]
    assert result(tmp_path / "both") == result(alone)
    items = [type(row["item"]) for row in rows_of(tmp_path / "both", "rope")]  # alike ones in a round
    assert items[:23] == [int] * 8 + [str] * 4 + [int] * 6 + [str] * 5  # plain RoPE and the formulas, five candidates


@pytest.mark.parametrize("given, fitness, bound, s", [
    ("", "ppl", 0, 8**0.5), ("--slow-least 1.19", "ppl", 1.19, 9.52), ("--fitness keys", "keys", 1.19, 9.52),
    ("--fitness ppl", "ppl", 0, 8.0)])
def test_where_plain_rope_is_better_than_all_formulas_perplexity_is_searched_unless_keys_are_asked_for(
        tiny, books, tmp_path, monkeypatch, capsys, given, fitness, bound, s):
    """As in Qwen2.5, whose theta is a million: plain RoPE itself is a candidate then, and formulas for less than s."""
    measure, none = search.measure, make_rope([1.0] * PAIRS, 1.0, attention_factor=1.0).long
    monkeypatch.setattr(search, "measure", lambda model, rope, item: measure(model, rope, item) if isinstance(
        item, list) else 100.0 * (1 + (rope.long.rescale_factors != none.rescale_factors)))
    search.main([*default_fitness(command(tiny, books, tmp_path, "--attention-factor", "none", "--len", 8 * WINDOW)),
                 *given.split()])
    rows = rows_of(tmp_path)
    genes = {row["origin"]: row["genes"]["rescale_factors"] for row in rows}
    assert set(genes["none"]) == ({1.0, 9.52} if bound else {1.0})
    formula = FORMULAS["yarn"](PAIRS, 10000.0, WINDOW, s).rescale_factors
    assert np.abs(np.subtract(genes["yarn-su"], formula)).max() <= 0.0051
    assert all(row["answer_nll"] > 0 for row in rows) if fitness == "keys" else not any(row["keys"] for row in rows)
    assert ("--fitness ppl" in capsys.readouterr().out) is ("--fitness" not in given)
    record = json.loads((tmp_path / "rope.json").read_text())["search"]
    assert (record["arguments"]["fitness"], record["bound"]) == (fitness, bound)
    assert (record["kept"] == "none") == (not bound)  # though a candidate is the same
    assert {row["item"] for row in rows_of(tmp_path, "rope") if type(row["item"]) is str} == (
        {"table"} | ({"search", "last"} if fitness == "keys" else set() if "--fitness" in given else {"search"}))


def test_plain_rope_that_is_better_but_for_its_keys_is_not_enough_for_perplexity(tiny, books, tmp_path, monkeypatch):
    """As in the 0.5B of Qwen2.5-Coder at 4 times its window."""
    def measure(model, rope, item):
        plain = set(rope.long.rescale_factors) == {1.0}
        return ((30.0, 0) if plain else (0.1, 5)) if isinstance(item, list) else 102.0 - 2 * plain
    monkeypatch.setattr(search, "measure", measure)
    search.main([*default_fitness(command(tiny, books, tmp_path)), "--max-evals", "1"])
    assert json.loads((tmp_path / "rope.json").read_text())["search"]["arguments"]["fitness"] == "keys"


def test_a_formula_better_than_plain_rope_is_enough_for_keys(tiny, books, tmp_path, monkeypatch):
    """As in a second stage, where NTK can be far better than what the model has, and YaRN worse."""
    ntk, measure = FORMULAS["ntk"](PAIRS, 10000.0, WINDOW, 4.0), search.measure
    monkeypatch.setattr(search, "measure", lambda model, rope, item: measure(model, rope, item) if isinstance(
        item, list) else 1.0 if rope.long.rescale_factors == ntk.rescale_factors else 2.0 + rope.scale)
    search.main([*default_fitness(command(tiny, books, tmp_path)), "--max-evals", "1"])
    assert json.loads((tmp_path / "rope.json").read_text())["search"]["arguments"]["fitness"] == "keys"


def test_where_a_prompt_does_not_fit_that_is_said_and_perplexity_is_what_is_searched(tiny, books, tmp_path, capsys):
    search.main(command(tiny, books, tmp_path, "--fitness", "keys", "--len", 100))
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("no pass keys: a pass-key prompt takes at least ") and len(rows_of(tmp_path)) == EVALUATIONS
    assert {row["answer_nll"] for row in rows_of(tmp_path)} == {0}
    assert {row["keys"] for row in written(tmp_path)[1]["comparison"]} == {None}


def test_no_longer_length_is_advised_for_a_shorter_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "measure", lambda model, rope, item: (6.0, 1) if type(item) is list else 1.0)
    monkeypatch.setattr(search.time, "perf_counter", iter(range(0, 10**9, 1000)).__next__)
    search.main(["--len", "1100", "--max-evals", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert "; shorter: --len 1100 --max-evals 16" in capsys.readouterr().out


def test_the_picture_has_the_candidates_asked_for_whatever_the_journal_has(undisturbed, tiny, books, tmp_path,
                                                                            monkeypatch):
    shutil.copytree(undisturbed.out, tmp_path / "out")
    drawn = []
    monkeypatch.setattr(search, "plot", lambda ropes, length, found, path: drawn.extend(found))
    search.main(command(tiny, books, tmp_path / "out", "--max-evals", 9))
    assert drawn == [row["fitness"] for row in rows_of(undisturbed.out)[:9]]


def test_the_bundled_model_is_searched_for_128_times_its_window(tmp_path, monkeypatch, capsys):
    """search.py --len 131072 --max-evals 2, but for the measuring: a window takes minutes."""
    monkeypatch.setattr(search, "measure", lambda model, rope, item: (6.0, 1) if type(item) is list else 131071.0)
    search.main(["--len", "131072", "--max-evals", "2", "--out", str(tmp_path), "--device", "cpu"])
    (row, other), printed = rows_of(tmp_path), capsys.readouterr().out
    assert printed.startswith("2 candidates, each on 1 document of 131072 tokens and 5 pass keys, take about ")
    assert "; shorter: --len 16384 --max-evals 16" in printed and "by pieces" in printed
    assert written(tmp_path)[0]["long_factor"] == row["genes"]["rescale_factors"]
    assert row["origin"] == "yarn-su" and row["genes"]["rescale_factors"][-1] == 152.32  # 1.19 s
    assert other["origin"] == "yarn" and other["genes"]["rescale_factors"] == row["genes"]["rescale_factors"]
    assert [r["genes"]["attention_factor"] for r in (row, other)] == [1.3, 1.49]  # su and YaRN's
    assert (row["nll"], row["fitness"]) == ({"0": 131071.0, "1": 131071.0}, KEY_WEIGHT * math.log(7))


# ---------------------------------------------------------------------------------------------------------------------
# Stop and go on


def test_from_a_history_cut_anywhere_the_search_goes_on_and_measures_nothing_again(
        undisturbed, tiny, books, tmp_path, measured):
    lines = undisturbed.lines
    assert len(lines) == 2 + EVALUATIONS * (SAMPLES + 1) + COMPARED
    for kept in range(0, len(lines), 13):
        torn, out = lines[kept][:(0, 1, len(lines[kept]) // 2, -1)[kept % 4]], tmp_path / str(kept)
        out.mkdir()
        (out / "history.jsonl").write_bytes(b"".join(lines[:kept]) + torn)
        measured.clear()
        search.main(command(tiny, books, out))
        assert result(out) == undisturbed.result, kept
        missing = lines[kept + (kept % 4 == 3):]  # what lacks but its newline is whole
        assert len(measured) == sum(b'"item"' in line for line in missing)
        assert (out / "history.jsonl").read_bytes().startswith(b"".join(lines[:kept]) + torn * (kept > 0))
    garbled = [*lines[:7], lines[7][:20] + b"\n", *lines[8:]]  # it alone is measured again
    (out / "history.jsonl").write_bytes(b"".join(garbled))
    measured.clear()
    search.main(command(tiny, books, out))
    assert len(measured) == 1 and written(out) == undisturbed.result[0]


def one_of(number, count, port, arguments, slowly):
    """search.py in process `number` of `count`, as torchrun starts it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
    sys.stdout, search.plot, search.tqdm, measure = open(os.devnull, "w"), lambda *_: None, NoBar, search.measure
    search.measure = lambda *given: [time.sleep(slowly), measure(*given)][1]
    torch.set_num_threads(1)
    longrope.run(lambda: search.main(arguments))


def start(count, arguments, slowly=0.0):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    group = [processes.Process(target=one_of, args=(i, count, port, arguments, slowly)) for i in range(count)]
    for process in group:
        process.start()
    return group


def test_killed_at_random_moments_the_same_command_goes_on_to_the_same_result(undisturbed, tiny, books, tmp_path):
    history, rng, size = tmp_path / "history.jsonl", random.Random(0), sum(map(len, undisturbed.lines))
    for share in (0.3, 0.9):
        (process,), until = start(1, command(tiny, books, tmp_path), slowly=0.01), time.monotonic() + 60
        while time.monotonic() < until and not (history.exists() and history.stat().st_size > share * size):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join(10)
        assert process.exitcode == -signal.SIGKILL and rows_of(tmp_path, "rope") != undisturbed.result[2]
    search.main(command(tiny, books, tmp_path))
    assert result(tmp_path) == undisturbed.result


@pytest.mark.parametrize("call, line", [(10, "stopped; the same command goes"), (3 * EVALUATIONS + 7, "not finite")])
def test_ctrl_c_or_a_loss_that_is_not_finite_is_one_line_and_the_same_command_goes_on(
        undisturbed, tiny, books, tmp_path, monkeypatch, measured, capsys, call, line):
    over_window = longrope.over_window

    def disturbed(*given):
        at_once = len(measured) == call
        if at_once and line.startswith("stopped"):
            signal.raise_signal(signal.SIGINT)
        return over_window(*given) * (math.nan if at_once else 1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(longrope, "over_window", disturbed)
        longrope.run(lambda: search.main(command(tiny, books, tmp_path)))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 + (line == "not finite") and len(said) == 1 and line in said[0]
    assert load_rope(tmp_path / "rope.json").long == best_of(tmp_path)
    del ended
    gc.collect()  # the traceback holds the file, and with it the lock
    search.main(command(tiny, books, tmp_path))
    assert result(tmp_path) == undisturbed.result
    assert len(measured) == SAMPLES * EVALUATIONS + COMPARED


def test_rope_json_is_made_again_from_the_history(undisturbed, tiny, books, tmp_path, monkeypatch):
    (tmp_path / "history.jsonl").write_bytes(b"".join(undisturbed.lines))
    write_json(tmp_path / "rope.json", undisturbed.result[0][0] | {"long_factor": [1.0] * PAIRS})
    monkeypatch.setattr(search.Evaluator, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search.main(command(tiny, books, tmp_path))
    assert load_rope(tmp_path / "rope.json").long == best_of(tmp_path)


def test_max_evals_and_iterations_may_grow_and_model_and_documents_move(undisturbed, tiny, books, tmp_path, measured):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    for count in (7, 9):
        search.main(command(tiny, books, out, "--max-evals", count))
        assert rows_of(out) == undisturbed.result[1][:count] and written(out)[1]["evaluations"] == count
    shutil.copytree(tiny, tmp_path / "tiny")
    shutil.copytree(books, tmp_path / "books")
    search.main(command(tmp_path / "tiny", tmp_path / "books", out))
    assert written(out)[0] == undisturbed.result[0][0] and rows_of(out) == undisturbed.result[1]
    search.main(command(tiny, books, out, "--iterations", 4))
    assert len(measured) == len(rows_of(out, "rope"))  # nothing twice
    search.main(command(tiny, books, fresh, "--iterations", 4))
    assert result(out)[:2] == result(fresh)[:2] and len(rows_of(fresh)) == EVALUATIONS + 10
    assert len(rows_of(out, "rope")) > len(rows_of(fresh, "rope"))  # the sets of earlier ends


@pytest.mark.parametrize("changes", [
    "--len 192", "--seed 2", "--samples 1", "--population-size 6", "--num-mutations 4", "--num-crossovers 4",
    "--num-parents 4", "--n-hat 4", "--attention-factor yarn", "--slow-least 1.1: bound", "--screening 1",
    "--dtype bfloat16", "--fitness keys",
    "--data other.txt: data_sha256", "--model trained: weights_sha256", "--init rope.json --len 512: base",
    "--init rope.json --len 200 --short: short", "--start-from rope.json: starts", ": kernel"])
def test_the_history_of_another_search_is_refused_and_stays_as_it_was(
        undisturbed, tiny, books, tmp_path, monkeypatch, capsys, changes):
    changes, _, differs = changes.partition(": ")
    differs = differs or changes.split()[0].strip("-").replace("-", "_")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed.out, "out")
    if "trained" in changes:
        shutil.copytree(tiny, "trained")
        save_tiny("trained", initializer_range=0.11)
    (tmp_path / "other.txt").write_text((books / "book4.txt").read_text())
    write_json("rope.json", rope_to_dict(make_rope(random_factors(0, 4), 4.0)))
    if differs == "kernel":
        monkeypatch.setattr(longrope, "attention_kernel", lambda model: "another")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    said = complaint(search.main, capsys, *command(tiny, books, "out", *changes.split()))
    assert differs in said.partition("of a run with another ")[2].partition(";")[0].split(", ")
    assert "give another --out" in said
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_several_processes_find_what_one_finds(undisturbed, tiny, books, tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b"".join(undisturbed.lines[:3]) + undisturbed.lines[3][:50])  # of one
    ended = [process.join(100) or process.exitcode for process in start(4, command(tiny, books, tmp_path))]
    assert ended == [0] * 4 and result(tmp_path) == undisturbed.result


def test_two_processes_on_one_sequence_measure_what_one_measures(undisturbed, tiny, books, tmp_path):
    both = start(2, command(tiny, books, tmp_path, "--context-parallel", 2))
    assert [process.join(100) or process.exitcode for process in both] == [0, 0]
    scores = {json.dumps(row["genes"]): row["nll"] for row in rows_of(tmp_path)}
    for row in undisturbed.result[1][:5]:  # rounding may change what comes later
        assert scores[json.dumps(row["genes"])] == pytest.approx(row["nll"], rel=1e-5)
    alone = {(row["rope"], row["item"]): row["found"] for row in undisturbed.result[2]}
    both = {(row["rope"], row["item"]): row["found"] for row in rows_of(tmp_path, "rope")}
    assert len(shared := alone.keys() & both.keys()) >= 5 * SAMPLES + 4 * 7
    for key in shared:
        assert both[key] == pytest.approx(alone[key], rel=1e-5)
    assert read_lines(tmp_path / "history.jsonl")[0]["setup"]["context_parallel"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# The second stage, the short set, factors to start from, and mistakes

SHORT = Factors(random_factors(3, 2), 2, 1.07)
FINETUNED = replace(make_rope(random_factors(2, 4), 4.0, 8, 1.23), short=SHORT, short_max_length=100)


@pytest.fixture
def init(tmp_path):
    write_json(tmp_path / "init.json", rope_to_dict(FINETUNED) | {"search": {"perplexity": 5.0}})
    return tmp_path / "init.json"


def searched_on(init, tiny, books, *changes):
    """(rope, record, {what: perplexity on the search's documents}) of a search on top of it, which measures that."""
    out = init.parent / "out"
    search.main(command(tiny, books, out, "--init", init, *changes))
    rope, record = load_rope(out / "rope.json"), written(out)[1]
    rows = {row["rope"]: row["search"] for row in record["comparison"]}
    assert record["perplexity"] == rows[record["kept"]] == rows["searched"]
    return rope, record, rows


def test_a_second_stage_multiplies_and_the_short_set_stays(init, tiny, books):
    rope, record, rows = searched_on(init, tiny, books, "--len", 512, "--n-hat", "search")  # from 256 tokens, s = 2
    best = best_of(init.parent / "out")
    assert rope == replace(FINETUNED, long=best.on(FINETUNED.long), scale=8.0) and len(set(best.rescale_factors)) > 1
    assert rope.long.attention_factor == su_factor(8.0, WINDOW)  # of both stages
    assert rows["searched"] == ppl_of(tiny, books, rope, 512)
    assert rows["none"] == ppl_of(tiny, books, FINETUNED, 512)  # as it was fine-tuned


@pytest.mark.parametrize("length", [WINDOW, 2 * WINDOW])
def test_short_replaces_the_short_set_and_leaves_the_long_one(init, tiny, books, capsys, length):
    rope, record, rows = searched_on(init, tiny, books, "--short", "--len", length)
    assert record["kept"] == "searched"
    assert ("serves 100 tokens, the new one fewer" in capsys.readouterr().err) is (length < 100)
    assert rope == replace(FINETUNED, short=best_of(init.parent / "out"), short_max_length=length)
    assert rows["searched"] == ppl_of(tiny, books, rope, length) and rows["long"] == ppl_of(
        tiny, books, replace(FINETUNED, short=None), length)


@pytest.mark.parametrize("length, fewer", [(WINDOW // 2, False), (WINDOW, False), (2 * WINDOW, True)])
def test_a_new_short_set_for_fewer_tokens_is_told(length, fewer, capsys):
    rope = replace(FINETUNED, short_max_length=WINDOW if not fewer else 3 * WINDOW)
    search.problem_of(SimpleNamespace(short=True, init="rope.json", len=length, export=None), rope)
    assert ("the new one fewer" in capsys.readouterr().err) is fewer


def test_a_short_set_of_another_length_is_where_a_search_starts(init, tiny, books):
    *_, first = searched_on(init, tiny, books, "--short", "--len", 128, "--start-from", init, "--n-hat", "search",
                            "--attention-factor", "search", "--max-evals", 1), rows_of(init.parent / "out")[0]
    assert first["origin"] == "start" and first["genes"]["rescale_factors"] == list(SHORT.rescale_factors)


def prefer(monkeypatch, better):
    """Let that rope have the lowest fitness where ropes are compared."""
    compare = search.Evaluator.compare
    monkeypatch.setattr(search.Evaluator, "compare", lambda *given: [
        row | {"fitness": 0.0} if row["rope"] == better else row for row in compare(*given)])


@pytest.mark.parametrize("better, length, least", [
    ("none", WINDOW, 0), ("long", WINDOW, 0), ("long", WINDOW + 8, 1), ("none", 128, 1.19), ("long", 128, 1.19)])
def test_plain_rope_or_the_long_set_is_kept_as_the_short_one_where_it_is_better_and_within_the_bound(
        init, tiny, books, monkeypatch, capsys, better, length, least):
    kept = least <= 1
    prefer(monkeypatch, better)
    rope, record, _ = searched_on(init, tiny, books, "--short", "--len", length, "--attention-factor", "search",
                                  "--n-hat", "search", *["--slow-least", least] * (least > 0))
    assert (record["kept"] == better) is kept and rope.long == FINETUNED.long
    assert (f"rope.json ({better})" in capsys.readouterr().out) is kept
    if kept:
        assert rope.at(length) == (plain(PAIRS) if better == "none" else FINETUNED.long)
    else:
        assert rope.short == best_of(init.parent / "out") and min(np.array(rope.short.rescale_factors)[SLOW]) >= 2.38


@pytest.mark.parametrize("better, fitness, kept", [
    ("none", "ppl", True), ("ntk", "ppl", True), ("none", "keys", False), ("ntk", "ppl --n-hat 4", False)])
def test_plain_rope_or_a_formula_is_kept_where_it_is_better_and_a_search_might_have_found_it(
        tiny, books, tmp_path, monkeypatch, better, fitness, kept):
    prefer(monkeypatch, better)
    search.main(command(tiny, books, tmp_path, "--attention-factor", "search", "--max-evals", 3,
                        "--fitness", *fitness.split()))
    rope = load_rope(tmp_path / "rope.json")
    assert (written(tmp_path)[1]["kept"] == better) is kept
    assert (rope.at(LENGTH) == FORMULAS[better](PAIRS, 10000.0, WINDOW, 4.0)) is kept and rope.target_length == LENGTH
    assert rope.long.n_hat == 4 * ("n-hat" in fitness)


def test_a_search_from_good_factors_ends_no_worse(undisturbed, tiny, books, tmp_path):
    search.main(command(tiny, books, tmp_path, "--start-from", undisturbed.out / "rope.json", "--iterations", 0,
                        "--population-size", 3))
    assert [row["origin"] for row in rows_of(tmp_path)] == ["start", "yarn-su", "ntk", "pi", "none"]
    record = written(tmp_path)[1]
    *_, given, searched = record["comparison"]
    assert given["rope"] == "first" == record["kept"]  # the others are worse
    assert searched["search"] == given["search"] == pytest.approx(undisturbed.result[0][1]["perplexity"])


def test_starts_that_differ_below_the_bound_alone_are_two_searches(tiny, books, tmp_path, capsys):
    for slowest in (8, 9):  # under 1.19 s both become one candidate, but the table has the sets as they are
        write_json(tmp_path / f"{slowest}.json", rope_to_dict(make_rope((*[1.0] * (PAIRS - 1), slowest), 8.0)))
    start = command(tiny, books, tmp_path / "out", "--slow-least", 1.19, "--iterations", 0, "--start-from")
    search.main([*start, str(tmp_path / "8.json")])
    assert rows_of(tmp_path / "out")[0]["origin"] == "start"
    said = complaint(search.main, capsys, *start, tmp_path / "9.json")
    assert "another starts; give another --out" in said


@pytest.mark.parametrize("changes, said", [
    ("--model nowhere", "nowhere"), ("--data nowhere.txt", "nowhere.txt"),
    ("--len 100000", "no document of 100000 tokens"), ("--len 64", "nothing to extend"), ("--short", "--init"),
    ("--init nowhere.json", "nowhere.json"), ("--init init.json", "256 tokens are served already"),
    ("--init other.json --len 512", "factors, needs"), ("--init init.json --short", "--len below its long set's"),
    ("--start-from nowhere.json", "nowhere.json"), ("--slow-least -1", "bounds"), ("--slow-least nan", "bounds"),
    ("--slow-least 1.26", "above 5, the largest"), ("--slow-least 0.2", "bounds nothing"),
    ("--out init.json", "init.json"),
    ("--export hf --n-hat 4", "n_hat"), ("--export hf --init init.json --len 512", "n_hat"),
    ("--context-parallel 2", "--context-parallel 2"), *[
        (f"--attention-factor {x}", "--attention-factor") for x in ("foo", "nan", "0", "1.1")]])
def test_a_users_mistake_is_one_line_and_exit_code_2(init, tiny, books, tmp_path, monkeypatch, capsys, changes, said):
    monkeypatch.chdir(tmp_path)
    write_json("other.json", rope_to_dict(make_rope(random_factors(0, 4, pairs=16), 4.0)))
    assert said in complaint(search.main, capsys, *command(tiny, books, "out", *changes.split()))
    assert not (tmp_path / "out").exists()  # found before any work


@pytest.mark.parametrize("changes", [
    "--seed -1", "--samples 0", "--iterations 1.5", "--max-evals x", "--n-hat -1", "--len 1", "--population-size 2",
    "--num-parents 1"])
def test_an_argument_that_is_no_such_number_ends_at_once(changes, capsys):
    line = complaint(search.main, capsys, *changes.split())
    assert f"argument {changes.split()[0]}: " in line and line.endswith("(--help explains)")


def test_the_script_for_lengths_that_take_minutes_searches_by_pieces_on_top_of_the_model(
        tiny, books, tmp_path, capsys):
    shutil.copytree(tiny, model_path := tmp_path / "model")
    write_json(model_path / "rope.json", rope_to_dict(FINETUNED))
    for name, factors in (("falling", FINETUNED.long.rescale_factors[::-1]), ("below", (1.0,) * PAIRS)):
        (tmp_path / name).mkdir()  # on top of the model's
        write_json(tmp_path / name / "rope.json", rope_to_dict(make_rope(factors, 16.0)))
    given = ["--model", model_path, "--data", books, "--len", 1024, "--until", 1, 20, "--turns", 13, "--attention", 1.1,
             "--rope", *(tmp_path / name / "rope.json" for name in ("falling", "below")), "--iterations", 1,
             "--depths", 0.3, 0.8, "--pieces", 5, "--out", tmp_path / "out"]
    for _ in range(2):  # the second time from the journal
        second_stage.main([str(x) for x in given])
        rows = [row for row in read_lines(tmp_path / "out/sets.jsonl") if "nll" in row]
        *lines, whole = capsys.readouterr().out.splitlines()[1:]
    assert len({str(row) for row in rows}) == len(rows)
    best, sets = whole.split()[-1], {row["rope"] for row in rows}
    assert {"ramp-0.7-1-13-1.1", "ramp-1-1-13-1.1", "pi", "ntk", "yarn-su", "given-falling", "given-below"} < sets
    assert len(sets) == 8 + 8 == len(lines)
    assert load_rope(tmp_path / "out/rope.json") == load_rope(tmp_path / f"out/{best}.json")
    model = load_model(model_path, device="cpu")
    for name in sets:
        mine = {(row["of"], row["at"]): row["nll"] for row in rows if row["rope"] == name}
        text, key = (np.mean([mine[at] for at in mine if at[0] == of]) for of in ("text", "key"))
        line, = (line.split() for line in lines if line.split()[-1] == name)
        assert float(line[0]) == pytest.approx(text + 0.3 * math.log1p(key), abs=1e-4)
        assert line == lines[0].split() if name == best else float(line[0]) >= float(lines[0].split()[0])
        model.rope = load_rope(tmp_path / f"out/{name}.json")
        assert model.rope.scale == 16 and model.rope.short == FINETUNED.short
        assert min(np.divide(model.rope.long.rescale_factors, FINETUNED.long.rescale_factors)) > 0.99
        for depth in (0.3, 0.8) if name == best else ():
            trial, = make_trials(f"second 0 {depth}", [1024], 1, 1)
            tokens, count, _ = make_prompt(load_tokenizer(model_path), 1024, depth, trial["key"])
            assert mine["whole prompt", depth] == pytest.approx(
                window_nll(model, torch.tensor(tokens), len(tokens) - count).sum().item())
            prompt = prompt_in_pieces(load_tokenizer(model_path), trial | {"depth": depth}, 5)
            assert mine["key", depth] == pytest.approx(ask_in_pieces(model, model.rope, [prompt])[0])
            assert len(prompt[1]) < 950  # of 1024 places
    text, every = random_tokens(300)[0], torch.arange(300)
    assert ask_in_pieces(model, model.rope, [(text, every, every, 40)])[0] == pytest.approx(
        window_nll(model, text, 260).sum().item())


def test_between_the_pieces_of_a_text_lie_earlier_ones_alone():
    text, kept, source, count = second_stage.text_in_pieces(random_tokens(20_000)[0], 7, 0)
    places = np.arange(len(text))
    read = np.isin(places, kept)
    assert count == len(kept) - 1 and read.sum() == 4 * 2 * 312 and read[[0, -1]].all()
    assert (kept[source[read]].numpy() == places[read]).all()
    assert (kept[source[~read]].numpy() < places[~read] // 64 * 64).all()
    blocks = [block[~read[i * 64:(i + 1) * 64]] for i, block in enumerate(source.split(64))]
    assert all((block.diff() == 1).all() for block in blocks)  # in whole, as the text goes on
    assert len(source[~read].unique()) > 3 * 2 * 300 and len({block[0].item() for block in blocks if len(block)}) > 200

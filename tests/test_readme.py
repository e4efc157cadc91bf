"""The commands of the README and of the pages in results/ take options that the scripts have, their links lead
somewhere, and what the README says of lines, and we of sizes, is true."""
import json
import math
import re
import runpy
import shlex
import sys
from collections import Counter
from importlib import import_module
from statistics import fmean, median

import numpy as np
import pytest
from conftest import ROOT

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("results/**/*.md")))}
SCRIPTS = ("search", "finetune", "eval_ppl", "eval_passkey")


def commands(text):
    """(script, arguments) of every command of one of the four scripts, in code blocks and between backticks."""
    command = rf"(?:^|(?:python|torchrun) (?:[^&]* )?)({'|'.join(SCRIPTS)})\.py( [^&]*|$)"
    for code in re.findall(r"`([^`\n]+)`|^    (.+)$|^(python.+)$", text, re.MULTILINE):
        yield from re.findall(command, "".join(code))


@pytest.fixture
def plots(monkeypatch):  # which reads the files of results/
    monkeypatch.syspath_prepend(ROOT / "tests/experiments")
    return import_module("plots")


def cells_of(page):
    """The rows of a page's tables."""
    return [[cell.replace("*", "").strip() for cell in line[1:-1].split("|")]
            for line in page.splitlines() if line.startswith("|")]


def tables(page, head):
    """{name: {length: cell}} of each table of a page whose first row begins so; empty cells are left out."""
    for table in re.findall(rf"^{head} *\d+ *\|.*\n(?:\|.*\n)+", PAGES[page], re.MULTILINE):
        (_, *lengths), _, *rows = cells_of(table)
        yield {name: {int(n): cell for n, cell in zip(lengths, cells) if cell} for name, *cells in rows}


def cells_under(plots, rope, digits, model="", asked=30, folder="qwen2.5-coder"):
    """{length: cell}: perplexity, and keys where there are any, of a model (Qwen2.5-Coder-1.5B) under a rope."""
    ppl, hits = (plots.values(ROOT / f"results/{folder}/{what}{model}.jsonl", rope)
                 for what in ("ppl", "passkey"))
    keys = {n: [f"({sum(found)}" + f" of {len(found)}" * (len(found) != asked) + ")"] for n, found in hits.items()}
    return {n: " ".join([f"{x:.{digits}f}" for x in ppl.get(n, [])] + keys.get(n, [])) for n in {**ppl, **keys}}


@pytest.mark.parametrize(("script", "arguments"), sorted({c for text in PAGES.values() for c in commands(text)}))
def test_a_command_has_only_options_that_there_are(script, arguments):
    import_module(script).parser().parse_args(shlex.split(arguments, comments=True))


def test_the_commands_are_found():
    text = "`python search.py`, `torchrun x finetune.py --len 4`\n\n    python eval_ppl.py --len 1  # so\n"
    assert list(commands(text)) == [("search", ""), ("finetune", " --len 4"), ("eval_ppl", " --len 1  # so")]
    assert {page.parent.name: len({*commands(text)}) > 4 for page, text in PAGES.items()}.items() >= {
        ROOT.name: True, "bundled": True, "mix": True, "smollm2": True, "two-million": True}.items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_or_a_heading(page):
    headings = [h.lower() for h in re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)]
    headings = {re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("http"):
            assert link[1:] in headings if link[0] == "#" else (page.parent / link).exists(), link


def test_the_table_of_files_has_their_lines():
    rows = re.findall(r"^\|\[(\w+\.py)\].*\|(\d+/\d+)\|$", PAGES[ROOT / "README.md"], re.MULTILINE)
    files = {f"{name}.py": (ROOT / f"{name}.py").read_text() for name in ("longrope", *SCRIPTS)}
    ends = {name: text[:text.index("# Here the lesson ends")].count("\n") for name, text in files.items()}
    assert rows == [(name, f"{ends[name]}/{len(text.splitlines())}") for name, text in files.items()]


def test_the_readme_is_short_in_words_paragraphs_and_tables():
    text = PAGES[ROOT / "README.md"]
    assert len(text.split()) <= 2300
    prose = re.sub(r"(?s:```.*?```)|^    .*$|^[|#!].*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose):
        assert len(paragraph.split()) <= 90, paragraph
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = table.splitlines()
        assert len(rows) - 2 <= 8 and max(row.count("|") - 1 for row in rows) <= 6, rows[0]


def test_the_numbers_of_the_readme_are_those_in_its_files(plots):
    text = PAGES[ROOT / "README.md"]
    smollm2, qwen = tables(ROOT / "README.md", r"\|\|")
    sources = {label: [plots.of_smollm2(what, name, rope) for what in ("ppl", "passkey")]
               for label, name, rope, *_ in plots.SMOLLM2}
    assert {*smollm2} == {*plots.FEW}
    for name, cells in smollm2.items():
        for length, cell in cells.items():
            (ppl,), hits = (source.get(length) for source in sources[name])
            assert hits or length <= 8192  # where a set not trained under is plain RoPE, not asked again
            keys = f" ({sum(hits)})" if hits else ""
            assert cell == f"{ppl:.{0 if ppl > 1000 else 1}f}{keys}", (name, length)
    assert qwen == {name: cells_under(plots, rope, 2) for name, rope in (
        ("plain RoPE", "none"), ("YaRN for the length", "yarn"), ("`yarn:4`, as the 7B's card says", "yarn:4"),
        ("searched for 262144", "262144.rope.json"))}
    bundled = ROOT / "results/bundled"
    ropes = "yarn:9.52", "yarn-su:9.52", "out/seed0/rope.json"
    elsewhere = [plots.values(bundled / "default-unseen.jsonl", rope)[8192][0] for rope in ("yarn", *ropes)]
    keys = json.loads((bundled / "longer.json").read_text())["default"]["of 50 at b1e1939"].values()
    assert ("in other books `yarn` has {:.1f}, `yarn:9.52` {:.1f}, `yarn-su:9.52` {:.1f}, searched {:.1f}; of 50 whole "
            "prompts the last three answer {}, {} and {} (other seeds {}, {}).").format(*elsewhere, *keys) in text
    speed = {name: cells for name, *cells in cells_of(PAGES[ROOT / "results/search/README.md"]) if len(cells) == 3}
    (_, theirs, _), (share, default, _) = speed["Algorithm 1"], speed["with the bound and the key, nearly the default"]
    assert "on {} of its tokens; nearly the default, on {}, ends {:.1%} above".format(
        speed["`--fitness ppl`"][0], share, float(default) / float(theirs) - 1) in text
    printed = dict(re.findall(r"^(none|pi|ntk|yarn|yarn-su|first|searched) +(.+)$", text, re.MULTILINE))
    for row in json.loads((ROOT / "results/bundled/default.rope.json").read_text())["search"]["comparison"]:
        expected = [f"{row[key]:.3f}" for key in ("attention_factor", "search", "unseen")] + [str(row["keys"])]
        assert printed[row["rope"]].split() == expected
    assert f"searched {math.sqrt(row['search'] * row['unseen']):.1f} at 8192" in text  # as many tokens in each


def test_the_numbers_of_the_recipes_are_those_in_their_files(plots):
    text, here = PAGES[ROOT / "README.md"], ROOT / "results/smollm2"

    def found(rope):
        """(perplexities, keys) of a rope in the recipes' journals, at the lengths at which keys were asked."""
        ppl, hits = (plots.of_smollm2(what, "recipes", rope) for what in ("ppl", "passkey"))
        return [f"{ppl[n][0]:.1f}" for n in hits], [sum(some) for some in hits.values()]

    (*_, ppl), keys = found("out/long/rope.json")
    (*_, again), again_keys = found("out/long1/rope.json")
    (*_, formula), formula_keys = found("yarn-su")
    (*_, longer), longer_keys = found("yarn-su:9.52")
    assert ppl == again
    assert (f"perplexity {ppl}, {keys[-1]} or {again_keys[-1]} keys of 30 (two seeds); the formula `yarn-su` (below) "
            f"has {formula} and {formula_keys[-1]}, `yarn-su:9.52` {longer} and {longer_keys[-1]} ") in text
    trained, trained_keys = found("model")
    assert f": {trained[-1]} and {trained_keys[-1]}, {trained[0]} and {trained_keys[0]}. No formula" in text
    shown = {1: f": {ppl}", 2: f": {keys[-1]} keys", 7: f": {' '.join(trained)}",
             8: f": {' '.join(map(str, trained_keys))} keys"}
    *_, table = tables(here / "README.md", r"\| \|")
    names = {"searched for 65536, seed 0": "out/long/rope.json", "... seed 1": "out/long1/rope.json",
             "searched for 131072, trained, exported": "model"}
    formulas = "yarn", "yarn-su", "yarn-su:8", "yarn:9.52", "yarn-su:9.52"
    assert table == {name: cells_under(plots, rope, 1, "-recipes", folder="smollm2")
                     for name, rope in ({f"`{rope}`": rope for rope in formulas} | names).items()}
    page, recipes = PAGES[here / "README.md"], json.loads((here / "recipes.json").read_text())
    for words, name, rope in (("in {} of {};", "recipes", "model"),
                              ("misses {} keys of {},", "tuned", "recovered/rope.json")):
        rows = [json.loads(line) for line in (here / f"passkey-{name}.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row.get("rope", "").endswith(rope)]
        misses = [row for row in rows if not row["hit"]]
        assert words.format(len(misses), len(rows)) in page
        assert all(row["answer"].endswith(row["key"]) for row in misses)
    losses = {row["len"]: [] for row in recipes["training"]}
    for row in map(json.loads, (here / "log-tuned.jsonl").read_text().splitlines()[1:]):
        losses[row["len"]].append(row["loss"])
    ours, theirs = ([f"{x:.2f}" for x in some] for some in (
        [row["loss_of_the_last_ten"] for row in recipes["training"]], [fmean(some[-10:]) for some in losses.values()]))
    assert "losses of {} (8192), {}, {}, {} and {} (131072), there {}, {}, {}, {} and {}.".format(
        *ours, *theirs) in page
    assert re.findall(r"^    (torchrun .+)$", text, re.MULTILINE) == [
        f"{line['command']}  # {line['seconds']:.0f}s{shown.get(at, '')}" for at, line in enumerate(recipes["lines"])]


def test_the_numbers_of_searches_without_the_key_are_those_in_their_file():
    page, rows = PAGES[ROOT / "results/search/README.md"], json.loads(
        (ROOT / "results/search/keys.json").read_text())["without_the_key"]["rows"]
    by_default = json.loads((ROOT / "results/bundled/longer.json").read_text())["default"]
    keys = [by_default["of 50 at b1e1939"][f"seed{seed}"] for seed in range(3)]
    ppl = [by_default["two unseen books"][f"seed{seed}"] for seed in range(3)]
    assert "find {}, {} and {}, with it [{}, {} and {}](../bundled)".format(
        *(row["keys 8192"] for row in rows), *keys) in page
    assert "{:.2f}, {:.2f} and {:.2f} on two unseen books, with it {:.2f}, {:.2f} and {:.2f}".format(
        *(row["two unseen books"] for row in rows), *ppl) in page


def test_the_numbers_of_the_qwen_page_are_those_in_its_files(plots):
    here = ROOT / "results/qwen2.5-coder"
    ours, small, theirs = tables(here / "README.md", r"\|(?: rope)? \|")
    assert ours == {name: cells_under(plots, rope, 3) for name, rope in (
        ("plain RoPE", "none"), ("NTK for the length", "ntk"), ("YaRN for the length", "yarn"),
        ("static YaRN for 4 times", "yarn:4"), ("searched for 262144", "262144.rope.json"),
        ("... with attention factor 1", "262144-factor-1.rope.json"),
        ("searched for 131072, from that set", "131072.rope.json"),
        ("searched for 262144 on the 0.5B", "onto.rope.json"))}
    assert small == {name: cells_under(plots, rope, 3, "-0.5b", asked=10) for name, rope in (
        ("plain RoPE", "none"), ("NTK for the length", "ntk"), ("YaRN for the length", "yarn"),
        ("static YaRN for 4 times", "yarn:4"), ("searched for 262144 on the 1.5B", "carried.rope.json"),
        ("searched for 262144", "alone.rope.json"), ("... beginning with the 1.5B's", "0.5b.rope.json"),
        ("... so, with keys in spread pieces", "again.rope.json"), ("searched for 524288", "half.rope.json"),
        ("YaRN for 262144, attention factor 1.1", "yarn-8-1.1.rope.json"), ("... 1.15", "yarn-8-1.15.rope.json"),
        ("YaRN for 524288, attention factor 1.15", "yarn-16-1.15.rope.json"),
        ("searched for 262144 from the first of these, key's weight 0.3, bound 1·s", "third.rope.json"),
        ("... weight 0.1, bound 0.6·s", "tenth.rope.json"))}
    nll, tokens = Counter(), Counter()  # of transformers; some rows are halves of one
    for part in json.loads((here / "in_transformers.json").read_text()):
        for row in part["rows"]:
            name = {"exported": "exported", "exported, attention factor 1": "... with attention factor 1"}.get(
                row["model"], "as trained" if row["rope"] == "its own" else "static YaRN for 4 times")
            nll[name, row["length"]] += row["nll"]
            tokens[name, row["length"]] += row["tokens"]
    shown = {(name, length): cell for name, cells in theirs.items() for length, cell in cells.items()}
    assert shown == {at: f"{math.exp(total / tokens[at]):.3f}" for at, total in nll.items()}
    four = {row["rope"].rpartition("/")[2]: row["ppl"] for row in json.loads((
        ROOT / "results/qwen2.5-coder/variants.json").read_text())["four_books_at_262144"] if "ppl" in row}
    cells = [four[name] for name in ("none", "plain-1.05.json", "262144.rope.json", "slow-2-1.05.json")]
    assert ("plain RoPE {:.3f}, with attention factor 1.05 {:.3f}, the searched set {:.3f}, slow pairs λ = 2 with 1.05 "
            "(by hand, [below](#by-hand-before-the-search)) {:.3f}").format(*cells) in PAGES[here / "README.md"]
    assert ("perplexity {2:.1f} (plain RoPE {0:.1f}; with only the searched attention factor {1:.1f}, with hand-made "
            "factors and it {3:.1f});").format(*cells) in PAGES[ROOT / "README.md"]


def test_the_numbers_of_ruler_are_those_in_its_file():
    here, scores = ROOT / "results/qwen2.5-coder", {}
    for row in map(json.loads, (here / "ruler.jsonl").read_text().splitlines()[2:]):
        scores.setdefault((row["rope"], str(row["length"])), {}).setdefault(row["task"], []).append(100 * row["score"])
    names = {"plain RoPE": "none", "static YaRN for 4 times": "yarn:4", "searched for 262144": "262144.rope.json"}
    shown = {(names[row[0]], row[1]): row[2:] for row in cells_of(PAGES[here / "README.md"]) if len(row) == 9
             and row[0] in names}
    assert {len(some) for tasks in scores.values() for some in tasks.values()} == {20}
    assert shown == {at: [f"{x:.1f}" for x in (*map(fmean, tasks.values()), fmean(map(fmean, tasks.values())))]
                     for at, tasks in scores.items()}


def test_the_numbers_of_the_trained_05b_are_those_in_its_files(plots):
    here = ROOT / "results/two-million"
    _, trained, *_ = tables(here / "README.md", r"\| rope \|")
    assert trained == {name: cells_under(plots, rope, 3, "-0.5b", 10, "two-million") for name, rope in (
        ("trained with", "model"), ("YaRN for the length", "yarn"), ("plain RoPE", "none"))}
    log = [json.loads(line) for line in (here / "log-0.5b.jsonl").read_text().splitlines()]
    losses = {n: [row["loss"] for row in log if row.get("len") == n] for n in (262144, 32768)}
    first, last = ([f"{sum(some[part]) / 22:.2f}" for some in losses.values()] for part in (slice(22), slice(44, 66)))
    assert [len(some) for some in losses.values()] == [66, 66]
    assert (f"from {first[0]} (the first 22) to {last[0]} (the last 22), of pieces of 32,768 tokens from {first[1]} to "
            f"{last[1]}") in PAGES[here / "README.md"]


def test_the_numbers_of_the_second_stage_are_those_in_its_file():
    here = ROOT / "results/two-million"
    page, found = PAGES[here / "README.md"], json.loads((here / "second-stage.json").read_text())
    at_524288 = {(row["set"], row["attention_factor"]): f"{row['key_nll']:.2f}" for row in found[
        "trained_in_whole_prompts"] if (row["length"], row["depth"]) == (524288, 0.4)}
    cells = [at_524288[name, factor] for name in ("nothing", "slow pairs twice") for factor in (1.1, 1.2, 1.3)
             if (name, factor) in at_524288]
    assert "has {}, {} and {} with attention factors 1.1, 1.2 and 1.3, with slow pairs twice as slow {} and {} ".format(
        *cells) in page
    untrained = [[row["set"].removeprefix("slow pairs ") + f", {row['attention_factor']}" * bool(
        row["attention_factor"]), str(row["length"]), *(f"{row[key]:.3f}" if key in row else "" for key in (
            "whole", "pieces", "spread_9_evenly", "spread_33_evenly", "spread"))] for row in found["untrained"]]
    assert sum(row in untrained for row in cells_of(page)) == len(untrained) == 13
    shown = {name: cells for name, *cells in cells_of(page)}
    weights = {"trained": "trained", "halfway": "averaged", "untrained": "untrained", "at 1e-5": "third"}
    names = {"at 1e-5, PI": "pi", "at 1e-5, NTK": "ntk", "at 1e-5, YaRN": "yarn"}
    sets = {of: found[f"{name}_at_2097152"] for of, name in weights.items()}
    best = {of: min(some, key=lambda row: fmean(row["key_nll"])) for of, some in sets.items()}
    rows = {f"{of}, the best by keys": row for of, row in best.items()} | {
        name: next(row for row in sets["at 1e-5"] if row["set"] == of) for name, of in names.items()}
    for name, row in rows.items():
        assert shown[name] == [f"{row['attention_factor']:.2f}", *(f"{x:.3f}" for x in row["key_nll"])], name
    mean = {of: f"{fmean(row['key_nll']):.2f}" for of, row in best.items()}
    larger = min(fmean(row["key_nll"]) for row in found["untrained_1.5b"]["sets_at_2097152"])
    assert (f"by keys is {mean['untrained']} untrained, {mean['at 1e-5']} after the gentler training and 200 more "
            f"sets; the 1.5B, untrained, has {larger:.2f}.") in page
    assert "*The best by keys*, of {}, {}, {} and {} sets".format(*map(len, sets.values())) in page
    for training, words in (("second_training", "fell from {} (the first five) to {} (the last five), of code from {} "
                             "to {}."), ("third_training", "from {} to {} and from {} to {};")):
        whole = [row["loss"] for row in found[training]["steps"] if row["len"] == 262144]
        of = [x for x in whole if x > 3], [x for x in whole if x < 1]
        ends = [f"{sum(some[part]) / 5:.2f}" for some in of for part in (slice(5), slice(-5, None))]
        assert words.format(*ends) in page
    found_at = Counter()
    for key in found["third_keys"]:
        found_at[key["length"]] += key["hit"]
    assert found_at == {4096: 10, 8192: 10, 32768: 10, 131072: 10, 262144: 10, 524288: 7}
    further = {row["set"]: fmean(row["key_nll"]) for row in found["third_at_524288"]}
    assert (f"({len(further)} sets; by spread pieces a key's mean NLL is {min(further.values()):.2f}, NTK's "
            f"{further['ntk']:.2f}) finds 7 of 10") in page


def test_the_numbers_of_the_15b_in_pieces_at_two_million_are_those_in_its_files():
    page, here = PAGES[ROOT / "results/two-million/README.md"], ROOT / "results/two-million"
    found = json.loads((here / "second-stage.json").read_text())["untrained_1.5b"]
    sets = {row["set"]: row for row in found["sets_at_2097152"]}
    names = {"nothing, attention factor 1": "given-none", "PI": "pi", "NTK": "ntk", "YaRN": "yarn",
             "YaRN, su": "yarn-su", "YaRN for 64 times, put in order on the base": "given-yarn",
             "searched": "mutation-2-6", "the 0.5B's at 1e-5, carried over": "given-carried"}
    _, _, *shown = cells_of(page[:page.index("### The same text")])
    for name, *cells in shown:
        row = sets[names.get(name) or f"ramp-{int(name.split()[2]) / 8:g}-8-1000-{float(cells[0]):g}"]
        assert cells == [f"{row['attention_factor']:.2f}",
                         *(f"{x:.3f}" for x in (row["text_nll"], *row["key_nll"]))], name
    assert len(shown) == 13 and len(sets) == 36

    def best(weight):
        return min(sets.values(), key=lambda row: row["text_nll"] + weight * math.log1p(fmean(row["key_nll"])))["set"]
    assert (best(0.15), best(0.3)) == ("mutation-2-6", "ramp-1-8-1000-1.25")
    assert min(row["text_nll"] for row in sets.values()) == sets["ramp-0.5-8-1000-1.1"]["text_nll"]
    factors = json.loads((here / "1.5b.rope.json").read_text())
    base = json.loads((ROOT / found["base"]).read_text())
    assert factors["factor"] == 64 and np.divide(factors["long_factor"], base["long_factor"]).max() == pytest.approx(8)
    assert factors["attention_factor"] == 1.25
    text = {name: row["text_nll"] for name, row in sets.items()}
    ahead = [name for name, nll in text.items() if nll < text["ramp-1-8-1000-1.25"]]
    made = {name for name in sets if name.startswith(("mutation", "crossover"))}
    assert made < {*ahead} and sum(name.startswith("ramp") for name in ahead) == 6
    assert f"not measured at 2,097,152 tokens {len(ahead)} predict the text of pieces better" in page
    assert len(ahead) == len(made) + 7


def test_the_numbers_of_the_15b_in_whole_prompts_and_windows_are_those_in_its_files(plots):
    page, here = PAGES[ROOT / "results/two-million/README.md"], ROOT / "results/two-million"
    lines = (here / "passkey-1.5b.jsonl").read_text().splitlines()
    keys = [key for key in map(json.loads, lines) if key.get("length") == 2097152]
    nearer = [(row["length"], row["hit"]) for row in map(json.loads, lines) if 262144 < row.get("length", 0) < 2097152]
    assert Counter(nearer) == {(524288, True): 10, (1048576, True): 10}
    hits, seconds = sum(key["hit"] for key in keys), [key["seconds"] for key in keys]
    assert f"finds the key in {hits} of {len(keys)}, the first nine of ten depths, 0 to {keys[-1]['depth']:.2f}" in page
    assert f"takes {min(seconds):.0f} to {max(seconds):.0f} s on four H100, one sequence on all, 71.6 GiB" in page
    whole, *_ = tables(here / "README.md", r"\| rope \|")
    ropes = {"plain RoPE": "none", "searched for 262144": "262144.rope.json", "PI on top": "pi.json",
             "NTK on top": "ntk.json", "YaRN on top": "yarn.json", "the bold set": "1.5b.rope.json"}
    assert whole == {name: cells_under(plots, rope, 3, "-1.5b", 30, "two-million") for name, rope in ropes.items()}
    rows = {(row["rope"].rpartition("/")[2], row["length"]): row for row in map(json.loads, (
        here / "ppl-1.5b.jsonl").read_text().splitlines()) if "ppl" in row}
    best, ntk, yarn, pi, alone = (rows[name, 2097152] for name in (
        "1.5b.rope.json", "ntk.json", "yarn.json", "pi.json", "262144.rope.json"))
    base, plain = rows["262144.rope.json", 262144], rows["none", 262144]

    def first(row, bins):
        nll = np.log(row["ppl_by_position"][:bins])
        return math.exp(np.average(nll, weights=row["tokens_by_position"][:bins]))
    (begun,) = tables(here / "README.md", r"\| on top \|")
    assert begun == {name: {n: f"{first(row, n // 131072):.3f}" for n in (262144, 524288, 1048576, 2097152)}
                     for name, row in (("nothing", alone), ("PI", pi), ("NTK", ntk), ("YaRN", yarn),
                                       ("the bold set", best))}
    assert ("{:.1%} below NTK and {:.1%} below YaRN, up to 1,048,576 tokens above NTK and nothing**: in the last "
            "sixteenth it has {:.2f}, NTK {:.2f}, YaRN {:.2f}, nothing {:.2f}.").format(
        1 - best["ppl"] / ntk["ppl"], 1 - best["ppl"] / yarn["ppl"],
        *(row["ppl_by_position"][-1] for row in (best, ntk, yarn, alone))) in page
    assert first(alone, 8) < first(ntk, 8) < first(best, 8) < best["ppl"]
    assert "{:.1%} above plain RoPE in windows of 65,536, {:.1%} below it in those of 262,144, there {:.1%} in".format(
        rows["262144.rope.json", 65536]["ppl"] / rows["none", 65536]["ppl"] - 1, 1 - base["ppl"] / plain["ppl"],
        1 - base["ppl_by_position"][-1] / plain["ppl_by_position"][-1]) in page
    assert "nine keys of nine (depths 0 to {:.2f})".format(keys[-1]["depth"]) in PAGES[ROOT / "README.md"]
    assert ("One book's perplexity is {:.1f} (NTK {:.1f}, YaRN {:.1f}, the searched set alone {:.1f}, PI {:.1f}), over "
            "its first 1048576 tokens {:.1f} (NTK {:.1f}, the searched set alone {:.1f})").format(
        *(row["ppl"] for row in (best, ntk, yarn, alone, pi)), *(first(row, 8) for row in (best, ntk, alone))
    ) in PAGES[ROOT / "README.md"]
    above = rows["262144.rope.json", 65536]["ppl"] / rows["none", 65536]["ppl"]
    assert (f"At 65536 tokens plain RoPE predicts [one book](results/two-million) {above - 1:.1%} better"
            in PAGES[ROOT / "README.md"])


@pytest.mark.parametrize("path", [path for path in sorted(ROOT.glob("tests/experiments/*.py"))
                                  if "Parser(" in path.read_text()], ids=lambda path: path.name)
def test_an_experiment_says_how_it_is_used(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code and "--out" in capsys.readouterr().out


def test_there_are_at_most_100_results_and_50_options():
    assert sum(path.is_file() for path in ROOT.glob("results/**/*")) <= 100
    actions = [action for name in SCRIPTS for action in import_module(name).parser()._actions]
    assert 20 < len({option for action in actions for option in action.option_strings if option[:2] == "--"}) <= 50


def test_the_numbers_of_smollm2_at_two_million_are_those_in_its_file():
    path = ROOT / "results/two-million/README.md"
    file = json.loads((path.parent / "second-stage.json").read_text())
    found, read = file["smollm2"], file["bundled_at_32768"]
    within, beyond = [*tables(path, r"\| rope \|")][2:]
    hits = Counter()
    for key in found["keys_of_ropes"]:
        hits[key["rope"], key["length"]] += key["hit"]
    measured = {(row["rope"], row["length"]): row["ppl"] for row in found["by_length"]}
    assert within["trained with"] == {
        n: f"{ppl:.3f}" + f" ({hits[rope, n]})" * (n not in (16384, 65536)) for (rope, n), ppl in measured.items()
        if rope == "model" and n > 2048}
    control = {row["length"]: row["ppl"] for row in found["control"]["perplexity"]}
    assert within["control"] == {n: f"{control[n]:.3f}" for n in (4096, 8192)}
    hits_of_control = Counter(key["length"] for key in found["control"]["keys"] if key["hit"])
    assert hits_of_control == {4096: 27, 8192: 27}
    above = [f"{100 * measured['model', n] / control[n] - 100:.1f}" for n in (8192, 4096)]
    assert f"{above[0]} or {above[1]}% above the control's" in PAGES[path]
    names = {"trained with": "model", "PI": "pi", "NTK": "ntk", "YaRN": "yarn", "YaRN, su": "yarn-su",
             "searched in pieces": "searched"}
    far = found["further"] + found["whole_windows"]
    assert beyond == {name: {row["length"]: f"{row['ppl']:.3f}" for row in far if row["rope"] == rope}
                      for name, rope in names.items()}
    one, two = ([row["seconds"] for row in found["whole_windows"] if row["gpus"] == n] for n in (1, 2))
    assert (f"{median(one):.1f} s and 10.3 GiB, two {median(two):.1f} s and 9.6 GiB each (medians of three and four): "
            f"{median(one) / median(two):.2f} times as fast") in PAGES[path]
    first, second = (row["nll"] for row in found["whole_windows"] if row["rope"] == "searched")
    assert first == second
    sets = found["sets_at_2097152"] + found["second_search_at_2097152"]
    text = {row["set"]: row["text_nll"] for row in found["second_search_at_2097152"]}
    assert (f"NLL of {text[found['searched']['name']]:.2f} and NTK {text['ntk']:.2f}; in the whole window it has "
            "{:.2f} and NTK {:.2f}.".format(*(math.log(float(beyond[name][2097152]))
                                              for name in ("searched in pieces", "NTK")))) in PAGES[path]
    near = {row["rope"]: row for row in found["text_in_pieces_at_131072"]}
    above = [", ".join(f"{near[rope][how] - near['model'][how]:.2f}" for rope in ("yarn-su", "ntk", "searched", "pi"))
             for how in ("whole", "pieces", "spread")]
    assert "by {} in the whole, by {} in nine pieces alone and by {} in pieces spread".format(*above) in PAGES[path]
    assert [sorted(near, key=lambda rope: near[rope][how]) == [*near][:1] + ["yarn-su", "ntk", "searched", "pi"]
            for how in ("whole", "pieces", "spread")] == [True, False, True]
    keys = {tuple(row["key_nll"]) for row in sets}
    assert (f"none of {len(keys)} sets brings one near, the lowest mean NLL of a key in spread pieces is "
            f"{min(map(fmean, keys)):.1f}.") in PAGES[path]
    hits = {at: sum(key["hit"] for key in found["keys"] if (key["weights"], key["length"]) == at)
            for at in (("128k", 131072), ("256k", 8192), ("256k", 131072), ("256k", 262144))}
    assert ("{} of 10 at 131,072 tokens after the first training; after the second {} at 8192, {} at 131,072 and {} at "
            "262,144").format(*hits.values()) in PAGES[path]
    rank = {how: np.argsort(np.argsort([row[how] for row in read])) for how in ("whole", "pieces", "spread")}
    assert "with the whole is {:.2f}, that of the same pieces alone {:.2f}.".format(
        *(np.corrcoef(rank["whole"], rank[how])[0, 1] for how in ("spread", "pieces"))) in PAGES[path]
    shown = [cells for _, *cells in cells_of(PAGES[path]) if len(cells) == 3]
    assert len(read) == 12 and all([f"{row[how]:.3f}" for how in rank] in shown for row in read)
    losses = [step["loss"] for step in found["training_at_262144"]["steps"] if step["len"] == 262144]
    assert (f"from {fmean(losses[:10]):.2f} (the first ten of {len(losses)}) to {fmean(losses[-10:]):.2f} (the last "
            "ten)") in PAGES[path]

"""The idea of the method, its stages, one sequence over several processes; perplexity and pass keys over the length: of
the progressive run, of SmolLM2 and of Qwen2.5-Coder; the README's first picture.

    $ python tests/experiments/plots.py   # assets/{headline,idea,context_parallel,...}.png
"""
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from longrope import FORMULAS, inv_freq_of  # noqa: E402

PROGRESSIVE = (  # label, files, end of the rope's name, colour, line
    ("as trained", "as-trained", "none", "#999999", "-"),
    ("searched for 32x", "as-trained", "search-32x/rope.json", "#56B4E9", "--"),
    ("searched for 64x", "as-trained", "search-64x/rope.json", "#E69F00", "--"),
    ("fine-tuned at 32x", "32x", "model", "#0072B2", "-"),
    ("fine-tuned at 64x", "64x", "model", "#D55E00", "-"),
    ("second stage, 512x", "64x", "search-512x/rope.json", "#009E73", "-"))
SMOLLM2 = (
    ("as trained", "128k", "none", "#999999", "-"),
    ("YaRN for each length", "64k", "yarn", "#E69F00", "-"),
    ("yarn-su", "recipes", "yarn-su", "#8C510A", "-"),
    ("YaRN for 65536, su", "64k", "yarn-su.json", "#8C510A", "--"),
    ("searched for 65536", "recipes", "out/long/rope.json", "#0072B2", "-"),
    ("... without the bound", "64k", "search-64k/rope.json", "#56B4E9", "-"),
    ("... that, then bounded", "64k", "bounded-64k/rope.json", "#56B4E9", "--"),
    ("searched for 131072", "128k", "search-128k/rope.json", "#CC79A7", "-"),
    ("searched for 131072, then bounded", "128k", "bounded-128k/rope.json", "#CC79A7", "--"),
    ("fine-tuned for 131072", "tuned", "recovered/rope.json", "#D55E00", "-"),
    ("... by the recipe, exported", "recipes", "model", "#D55E00", "--"),
    ("control", "control", "none", "#000000", "--"))
FEW = ("as trained", "YaRN for each length", "yarn-su", "searched for 65536", "fine-tuned for 131072",
       "... by the recipe, exported", "control")
TWO_MILLION = (
    ("plain RoPE", "1.5b", "none", "#999999", "-"),
    ("searched for 262144", "1.5b", "262144.rope.json", "#0072B2", "-"),
    ("one of 36 sets on top", "1.5b", "1.5b.rope.json", "#56B4E9", "-"),
    ("NTK on top", "1.5b", "ntk.json", "#009E73", "-"),
    ("YaRN on top", "1.5b", "yarn.json", "#E69F00", "-"))
QWEN = (
    ("NTK for the length", "ntk", "#009E73"),
    ("YaRN for the length", "yarn", "#E69F00"),
    ("static YaRN for 4 times", "yarn:4", "#CC79A7"),
    ("searched for 262144", "262144.rope.json", "#0072B2"))
QWEN_SMALL = (
    ("plain RoPE", "0.5b", "none", "#999999", "-"),
    *((label, "0.5b", rope, color, "-") for label, rope, color in QWEN[:3]),
    ("searched on the 1.5B", "0.5b", "carried.rope.json", "#56B4E9", "-"),
    ("searched for 262144", "0.5b", "alone.rope.json", "#0072B2", "-"),
    ("... beginning with the 1.5B's", "0.5b", "0.5b.rope.json", "#0072B2", "--"),
    ("... with heavier keys", "0.5b", "third.rope.json", "#D55E00", "-"))


def values(path, rope):
    """{length: [perplexity or hit, ...]} of a journal's rows whose rope's name ends so."""
    found = {}
    for row in sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row.get("length", 0)):
        if row.get("rope", "").endswith(rope):
            found.setdefault(row["length"], []).append(row["ppl" if "ppl" in row else "hit"])
    return found


def of_smollm2(what, name, rope):
    """The `values` of one of SMOLLM2's curves, what: ppl or passkey."""
    return values(ROOT / f"results/smollm2/{what}-{name}.jsonl", rope)


def of_progressive(what, name, rope):
    path = ROOT / f"results/two-million/{what}-{name}.jsonl"
    found = values(path, rope)
    if what == "ppl":  # many windows of 1024 tokens were measured last; up to there no long set is used
        found[1024] = values(path, "none" if name == "as-trained" else "model")[1024][-1:]
    return found


def draw(curves, of, left, right, ticks):
    for label, name, rope, color, line in curves:
        style = {"label": label, "color": color, "ls": line, "marker": "o", "ms": 4}
        ppl, hits = (of(what, name, rope) for what in ("ppl", "passkey"))
        left.plot(list(ppl), [p for p, *_ in ppl.values()], **style)
        right.plot(list(hits), [sum(found) / len(found) for found in hits.values()], **style)
    left.set(xscale="log", xlabel="window (tokens)", ylabel="perplexity")
    right.set(xscale="log", ylim=(-0.05, 1.05), xlabel="prompt (tokens)", ylabel="pass keys found")
    for ax in (left, right):
        ax.set_xticks(list(ticks), list(ticks.values()), fontsize=8 if curves is PROGRESSIVE else None)
        ax.minorticks_off()


def idea(path):
    """SmolLM2, 8 times its window: which pairs turn within the window, their factors, and a slow pair's angle."""
    found = json.loads((ROOT / "results/smollm2/recipes.json").read_text())["ropes"]["out/long"]
    window, theta, s = found["original_max_position_embeddings"], found["rope_theta"], found["factor"]
    pairs = np.arange(len(found["long_factor"]))
    turns = window / (2 * math.pi) * inv_freq_of(np.ones(len(pairs)), theta)
    critical = int((turns >= 1).sum())
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    left.plot(pairs, turns, color="black")
    left.axhline(1, color="gray", ls=":")
    left.set(yscale="log", xlabel="rotary pair i", ylabel=f"turns within {window} tokens",
             title=f"SmolLM2: no full turn from pair {critical}, the critical one")
    for name, color in (("pi", "#CC79A7"), ("ntk", "#009E73"), ("yarn", "#E69F00")):
        factors = FORMULAS[name](len(pairs), theta, window, s).rescale_factors
        middle.plot(pairs, factors, color=color, label={"pi": "PI", "ntk": "NTK", "yarn": "YaRN"}[name])
    middle.plot(pairs, found["long_factor"], color="#0072B2", label="searched")
    middle.set(xlabel="rotary pair i", ylabel=r"$\lambda_i$", title=f"factors for {s:g} times the window")
    middle.legend(fontsize=9)
    n, pair = np.array([0, s * window]), critical + 4
    trained = 2 * math.pi * turns[pair]
    right.axhspan(0, trained, color="#E0E0E0", label="angles seen in training")
    right.plot(n, n * trained / window, color="#999999", label=r"$\lambda = 1$")
    right.plot(n, n * trained / window / found["long_factor"][pair], color="#0072B2", label="searched")
    right.axvline(window, color="gray", ls=":")
    right.set_xticks([0, window, int(s * window)])
    right.set(xlabel="position n (tokens)", ylabel="angle (radians)", title=f"a slow pair, i = {pair}")
    right.legend(fontsize=9)
    for ax in (left, middle):
        ax.axvline(critical - 0.5, color="gray", ls=":")
    fig.savefig(path, dpi=110)


def pipeline(path):
    """The paper's stages with the bundled model: what each makes, and the tokens that it took."""
    def searched(name):
        found = json.loads((ROOT / f"results/two-million/{name}.rope.json").read_text())["search"]
        return f"{found['evaluations']} candidates\n{in_tokens(found['document_evaluations'] * found['target_length'])}"

    def in_tokens(count):
        return f"{count / 1e6:.0f} million tokens"

    def measured():
        rows = (ROOT / f"results/two-million/{what}-64x.jsonl" for what in ("ppl", "passkey"))
        rows = [json.loads(line) for path in rows for line in path.read_text().splitlines()]
        keys = sum("hit" in row for row in rows)
        return f"{keys} keys\n{in_tokens(sum(row.get('tokens', row.get('length', 0)) for row in rows))}"
    steps, batch = 600, 4  # of the command on the page
    stages = (
        ("search.py", "--len 65536", "1 search", searched("search-64x"), "rope.json\nlong set, 64 times"),
        ("finetune.py", "--len 65536", "2 train", f"{steps} steps\n{in_tokens(steps * batch * 65536)}\n"
         "(after a round at 32768)", "model\nwindow 65536"),
        ("search.py", "--init --len 524288", "3 search again", searched("search-512x"),
         "rope.json\nlong set, 512 times"),
        ("search.py", "--init --short", "4 recover", searched("recovered"), "rope.json\nlong set, short set"),
        ("eval_ppl.py", "eval_passkey.py", "5 measure", measured(), "ppl.jsonl\npasskey.jsonl"))
    fig, ax = plt.subplots(figsize=(12, 2.6), layout="constrained")
    ax.set(xlim=(0, 4 * len(stages) + 2), ylim=(0.2, 4))
    ax.axis("off")
    for at, made in enumerate(("model\nwindow 1024", *(stage[-1] for stage in stages))):
        x, (word, detail) = 4 * at + 1, made.split("\n")
        ax.text(x, 2.1, f"{word}\n{detail.replace(', ', chr(10))}", ha="center", va="center", size=10.5,
                bbox={"boxstyle": "round", "facecolor": "#DCEAF4" if "json" in made else "#F8E8C8", "lw": 0})
    for at, (script, options, name, cost, _) in enumerate(stages):
        x = 4 * at + 3
        ax.annotate("", (x + 0.75, 2.1), (x - 0.75, 2.1), arrowprops={"arrowstyle": "-|>", "lw": 1.5, "color": "black"})
        ax.text(x, 3.9, name, ha="center", va="top", size=12, weight="bold")
        ax.text(x, 3.35, f"{script}\n{options}", ha="center", va="top", size=10)
        ax.text(x, 1.1, cost, ha="center", va="top", size=10, color="#555555")
    fig.savefig(path, dpi=110)


def context_parallel(path, processes=4):
    """Which of the 2N chunks of a sequence are whose (`Context` in longrope.py), and the keys that each needs."""
    colors, chunks = ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), 2 * processes
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(4, 5))

    def color(chunk):
        return colors[min(chunk, chunks - 1 - chunk)]
    for i in range(chunks):
        for j in range(i + 1):
            whole = [[0, 0, 1, 1], [0, 1, 1, 0]] if j < i else [[0, 0, 1], [0, 1, 1]]  # or a triangle: causal
            left.fill(np.add(whole[0], j), np.add(whole[1], i), facecolor=color(i), edgecolor="white", lw=2)
    left.set(xlabel="keys and values, by chunk", ylabel="queries, by chunk", aspect="equal", xlim=(0, chunks),
             ylim=(chunks, 0), title="causal attention: each process (colour) has the same area")
    for ticks in (left.set_xticks, left.set_yticks):
        ticks(np.arange(chunks) + 0.5, range(chunks))
    right.set(xlim=(0, chunks + 0.2), ylim=(processes + 2.2, -0.8), title="what is where, in each layer")
    right.axis("off")

    def box(x, y, chunk, alpha):
        right.add_patch(plt.Rectangle((x, y), 0.86, 0.7, color=color(chunk), alpha=alpha, lw=0))
        right.text(x + 0.43, y + 0.35, str(chunk), ha="center", va="center")
    for r in range(processes):
        right.text(0, r + 0.35, f"process {r}: tokens and queries of chunks", va="center")
        for at, chunk in enumerate((r, chunks - 1 - r)):
            box(4.4 + at, r, chunk, 1)
    right.text(0, processes + 0.3, "gathered by every process: keys and values of all, in order", va="center")
    for chunk in range(chunks):
        box(chunk, processes + 0.7, chunk, 0.45)
    fig.savefig(path, dpi=110)


def qwen(path):
    """Perplexity of Qwen2.5-Coder-1.5B over plain RoPE's: of windows of each length, and along the longest."""
    rows = [row for row in map(json.loads, (ROOT / "results/qwen2.5-coder/ppl.jsonl").read_text().splitlines())
            if "ppl" in row]
    found = {(row["rope"], row["length"]): row for row in rows}
    lengths = sorted({length for rope, length in found if rope == "none"})
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for label, rope, color in QWEN:
        left.plot(lengths, [found[rope, n]["ppl"] / found["none", n]["ppl"] for n in lengths], color=color, marker="o",
                  label=label)
        here, plain = (np.array(found[name, lengths[-1]]["ppl_by_position"]) for name in (rope, "none"))
        right.plot((np.arange(len(here)) + 0.5) * lengths[-1] / len(here), here / plain, color=color)
    left.set(xscale="log", xlabel="window (tokens)", ylabel="perplexity over plain RoPE's")
    left.set_xticks(lengths, lengths)
    right.set(xlabel=f"position in windows of {lengths[-1]} tokens")
    right.set_xticks([2**15, 2**16, 2**17, 3 * 2**16, 2**18])
    for ax in (left, right):
        ax.minorticks_off()
        ax.axhline(1, color="#999999", label="plain RoPE")
        ax.axvline(32768, color="gray", ls=":")
    left.legend(fontsize=9)
    fig.savefig(path, dpi=110)


def of_qwen(what, name, rope):
    path = ROOT / f"results/qwen2.5-coder/{what}-{name}.jsonl"
    if what == "passkey":
        return values(path, rope)
    plain = values(path, "none")  # over its perplexity, as at 524288 tokens the documents are others
    return {n: [ppl / plain[n][0]] for n, (ppl,) in values(path, rope).items()}


def draw_smollm2(curves, left, right):
    draw(curves, of_smollm2, left, right, {2048 * 2**i: f"{2 * 2**i}k" for i in range(7)})
    left.set_ylim(19, 47)


def of_two_million(what, name, rope):
    """Perplexity is of the same text at every length; the keys of 262144 tokens are in another run's file."""
    found = values(ROOT / f"results/two-million/{what}-{name}.jsonl", rope)
    if what == "passkey" and rope == "262144.rope.json":
        found[262144] = values(ROOT / "results/qwen2.5-coder/passkey.jsonl", rope)[262144]
    return dict(sorted(({524288: [math.nan]} | found).items()))  # no line over what was not measured


def headline(path):
    """Above SmolLM2, with and without training, below Qwen2.5-Coder-1.5B, untrained."""
    fig = plt.figure(figsize=(11, 7.6), layout="constrained")
    above, below = fig.subfigures(2, 1)
    (left, right), axes = (part.subplots(1, 2) for part in (above, below))
    draw_smollm2([curve for curve in SMOLLM2 if curve[0] in FEW], left, right)
    draw(TWO_MILLION, of_two_million, *axes, {4096 * 2**i: ("4k", "", "16k", "", "64k", "", "256k", "", "1M", "2M")[i]
                                              for i in range(10)})
    for part, window, title in ((above, 8192, "SmolLM2-135M"), (below, 32768, "Qwen2.5-Coder-1.5B, untrained")):
        part.suptitle(f"{title} (dotted: its window, {window})")
        part.legend(*part.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        for ax in part.axes:
            ax.axvline(window, color="gray", ls=":")
    fig.savefig(path, dpi=110)


def main(assets):
    headline(assets / "headline.png")
    qwen(assets / "qwen_ppl.png")
    idea(assets / "idea.png")
    pipeline(assets / "pipeline.png")
    context_parallel(assets / "context_parallel.png")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    ticks = {1024: "1024", 8192: "8192", 32768: "32768", 65536: "", 524288: "524288"}
    draw(PROGRESSIVE, of_progressive, left, right, ticks)
    left.set_yscale("log")
    left.minorticks_off()
    left.set_yticks([25, 50, 100, 200], ["25", "50", "100", "200"])
    left.legend(fontsize=8, loc="center", bbox_to_anchor=(0.42, 0.58))
    fig.savefig(assets / "progressive.png", dpi=110)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw(QWEN_SMALL, of_qwen, left, right, {32768 * 2**i: f"{32 * 2**i}k" for i in range(5)})
    left.set_ylabel("perplexity over plain RoPE's")
    left.legend(fontsize=9)
    fig.savefig(assets / "qwen_small.png", dpi=110)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    draw_smollm2(SMOLLM2, left, right)
    fig.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    fig.savefig(assets / "smollm2_ppl.png", dpi=110)


if __name__ == "__main__":
    main(Path(*sys.argv[1:]) if sys.argv[1:] else ROOT / "assets")

"""The two pictures of the experiment with SmolLM2, from the files in results/smollm2, which COMMANDS.md there names.

    $ python tests/experiments/smollm2_plot.py results/smollm2 assets

smollm2_search.png: the best so far as the searches went on (the paper's figure 6), for both fitnesses. smollm2_ppl.png:
perplexity and pass keys over the length, before and after fine-tuning.
"""
import json
import sys
from pathlib import Path

import numpy as np
from progressive_plot import keys_found, plt, rows

LENGTHS = {"64k": (65536, "#0072B2"), "128k": (131072, "#D55E00")}
TUNED = "tuned"  # below results
CURVES = (  # label, directories ({} is ppl or passkey), rope, style
    ("as trained", "{}-original", "none", "#999999", "-"),
    ("YaRN", "{}-64k", "yarn", "#E69F00", "-"),
    ("YaRN, su", "{}-64k", "yarn-su.json", "#009E73", "-"),
    ("searched for 65536", "{}-64k", "search-64k/rope.json", "#0072B2", "-"),
    ("searched for 65536, then bounded", "{}-64k", "bounded-64k/rope.json", "#0072B2", "--"),
    ("searched for 65536 within the bound", "slow-least-1.19-64k", "rope.json", "#56B4E9", "-"),
    ("searched for 131072", "{}-original", "search-128k/rope.json", "#CC79A7", "-"),
    ("searched for 131072, then bounded", "{}-original", "bounded-128k/rope.json", "#CC79A7", "--"),
    ("fine-tuned at 131072", TUNED + "/{}", "recovered/rope.json", "#D55E00", "-"),
    ("control", TUNED + "/{}-control", "none", "#000000", ":"),
)


def progress(results, picture):
    fig, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, fitness, what in zip(panels, ("search", "needle"), ("perplexity of books", "perplexity of the pass key")):
        for name, (length, color) in LENGTHS.items():
            history = (results / f"{fitness}-{name}" / "history.jsonl").read_text().splitlines()[1:]
            lines = [json.loads(line) for line in history]
            ppl = np.array([line["ppl"] or np.nan for line in lines])  # none where racing dropped it
            read = np.cumsum([len(line["nll"]) for line in lines])
            ax.step(read, np.fmin.accumulate(ppl), where="post", color=color, lw=2, label=f"{length} tokens")
            for line in lines:
                if style := {"ntk": ":", "yarn": "--"}.get(line["origin"]):
                    ax.axhline(line["ppl"], color=color, ls=style, lw=1, label=f"{line['origin']} there")
        ax.set(yscale="log", xlabel="documents evaluated", ylabel=what,
               title=f"{'plain' if fitness == 'search' else fitness} fitness")
        ax.legend(fontsize=8)
    fig.savefig(picture, dpi=110)


def over_length(results, picture):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for label, where, rope, color, line in CURVES:
        ppl = {row["length"]: row["ppl"] for row in rows(results / where.format("ppl") / "ppl.json", rope)}
        hits, trials = keys_found(results / where.format("passkey") / "passkey.json", rope)
        accuracy = {length: hits[length] / trials[length] for length in hits}
        style = {"label": label, "color": color, "ls": line, "marker": "o", "ms": 4}
        left.plot(*zip(*sorted(ppl.items())), **style)
        right.plot(*zip(*sorted(accuracy.items())), **style)
    left.set(xscale="log", xlabel="window (tokens)", ylabel="perplexity", ylim=(19, 47))
    right.set(xscale="log", xlabel="prompt (tokens)", ylabel="pass keys found", ylim=(-0.05, 1.05))
    for ax in (left, right):
        ax.set_xticks([2048 * 2**i for i in range(7)], [f"{2 * 2**i}k" for i in range(7)])
        ax.minorticks_off()
    fig.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    fig.savefig(picture, dpi=110)


if __name__ == "__main__":
    results, assets = map(Path, sys.argv[1:])
    progress(results, assets / "smollm2_search.png")
    over_length(results, assets / "smollm2_ppl.png")

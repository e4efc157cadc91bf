"""A set for a second stage where a pass takes minutes, as at 2,097,152 tokens: by pieces first, then by whole prompts.

    $ torchrun --nproc-per-node 4 tests/experiments/second_stage.py --model FINETUNED --len 2097152 --data books/search

On top of the fine-tuned factors: PI, NTK, YaRN; and lambda = R s for slow pairs, M at one turn within the model's
window, 1 at T turns or more, a power of the turns between, for each R, M, T and attention factor. Of each, in pieces of
prompts and texts at true positions (eval_passkey.py): NLL of the key, the mean and the highest of --depths, and of the
end of 8 stretches of text. In a whole prompt the filler outnumbers the key, in pieces hardly: so here a piece's filler
stands for what was left out around it, too; the log of how many tokens each is worth is added to its logits in every
layer. The --whole sets of the lowest fitness, search.py's with that NLL, are asked in whole prompts. In --out:
sets.jsonl, each set as NAME.json, and second.json, that of the lowest NLL in whole prompts.
"""
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eval_passkey  # noqa: E402
from longrope import (Journal, Parser, begin, describe, inv_freq_of, load_tokenizer, natural, over_window,  # noqa: E402
                      rank, read_documents, recorded, resolve_rope, rope_to_dict, run, say, spread, token_nll,
                      write_json)
from search import formulas, second_stage, with_key  # noqa: E402

KEY, EDGE = "71938", 40  # tokens about the key's middle, and at the prompt's ends, that are no filler, or more


def ramp(problem, slow, middle, turns):
    """lambda of the second stage for each pair, by its turns within the window that the base serves."""
    base = problem.base.rescale_factors
    now = problem.window / (2 * math.pi) * inv_freq_of(base, problem.rope.rope_theta)
    lambdas = middle ** np.clip(np.log(turns / now) / np.log(turns), 0, 1)
    lambdas = np.maximum.accumulate(np.where(now < 1, max(middle, slow * problem.scale), lambdas))
    return replace(problem.base, rescale_factors=tuple(lambdas.round(2).tolist()))


def runs_of(kept):
    """Of the places that are kept (n,) the number of each one's run, and the places left out behind each run."""
    new = np.diff(kept) > 1
    return np.concatenate([[0], new.cumsum()]), (np.diff(kept) - 1)[new]


def bias_of(kept, middle, length):
    """(n, n), added to the logits of a prompt's kept places: -inf above the diagonal; for filler of another run the log
    of the tokens it stands for, which are half of each gap beside its run, of that before the query's own run all."""
    run, gaps = runs_of(kept)
    filler = (kept >= 2 * EDGE) & (abs(kept - middle) > EDGE) & (kept < length - EDGE)
    count = np.bincount(run, filler)
    weight = np.zeros((len(count), len(count)))  # of each query's run, for each run before
    for q, r in itertools.combinations(range(len(count)), 2):
        beside = (gaps[q - 1] / 2 if q else 0) + gaps[q] / (1 if r == q + 1 else 2)
        weight[r, q] = math.log1p(beside / count[q]) if count[q] else 0
    bias = torch.from_numpy(weight[run][:, run] * filler).float()
    return bias.masked_fill(torch.ones_like(bias).triu(1) > 0, -math.inf)


@torch.inference_mode()
def in_pieces(model, rope, tokens, kept, count, bias=None):
    """Summed -log p of the last `count` of the tokens (T,), of which only the places kept (n,) are read."""
    device = model.unembedding.device
    cos, sin = rope.table(len(tokens), device)
    kept = torch.from_numpy(kept).to(device)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias.to(q), enable_gqa=True).transpose(1, 2)
    tokens = tokens.to(device)[kept]
    attends = None if bias is None else itertools.repeat(attend)
    hidden = model.hidden(tokens[None], (cos[kept], sin[kept]), attends)[0, -1 - count:-1]
    return token_nll(hidden, model.unembedding, tokens[-count:]).sum().item()


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--len", type=natural, required=True, help="target length")
    add("--slow", type=float, nargs="+", default=[0.75, 1, 1.19], metavar="R", help="default: 0.75 1 1.19")
    add("--middle", type=float, nargs="+", default=[1, 2, 4, 8], metavar="M", help="default: 1 2 4 8")
    add("--turns", type=float, nargs="+", default=[13, 100], metavar="T", help="default: 13 100")
    add("--attention", type=float, nargs="+", default=[1.1, 1.2, 1.3], metavar="A", help="default: 1.1 1.2 1.3")
    add("--depths", type=float, nargs="+", default=[0.1, 0.4, 0.8], help="of the keys (default: 0.1 0.4 0.8)")
    add("--pieces", type=natural, default=9, help="of a prompt or text, of 512 tokens (default: 9)")
    add("--whole", type=int, default=4, metavar="N", help="sets to ask in whole prompts (default: 4)")
    add("--rope", nargs="+", default=[], help="rope.json of more sets, as they are")
    add("--out", type=Path, default=Path("out/second"))
    args = p.parse_args(argv)
    eval_passkey.PIECES = args.pieces
    model = begin(args)
    tokenizer = load_tokenizer(args.model)
    problem = second_stage(resolve_rope("model", model), args.len)
    sets = formulas(problem, args.len) | {
        f"ramp-{slow:g}-{middle:g}-{turns:g}-{attention:g}": replace(ramp(problem, slow, middle, turns),
                                                                      attention_factor=attention)
        for slow, middle, turns, attention in itertools.product(args.slow, args.middle, args.turns, args.attention)
        if middle > 1 or turns == args.turns[0]}
    ropes = {name: problem.put(factors, args.len) for name, factors in sets.items()} | {
        Path(path).stem: resolve_rope(path, model) for path in args.rope}
    prompts = []
    for depth in args.depths:
        tokens, count, middle = eval_passkey.make_prompt(tokenizer, args.len, depth, KEY)
        kept = eval_passkey.pieces(args.len, middle)
        prompts.append((torch.tensor(tokens), kept, count, bias_of(kept, middle, args.len)))
    text = " ".join(text for _, text in read_documents(args.data, args.len))
    tokens = torch.tensor([i for e in tokenizer.encode_batch_fast(
        [text[at:at + 100_000] for at in range(0, len(text), 100_000)], add_special_tokens=False) for i in e.ids])
    texts = [tokens[at:at + args.len] for at in np.linspace(0, len(tokens) - args.len, 8).round().astype(int)]
    some = eval_passkey.pieces(args.len, args.len // 3)
    run, _ = runs_of(some)
    end = int((run == run[-1]).sum()) - 1  # tokens of the last run, save its first

    def by_pieces(name):
        nll = float(np.mean([in_pieces(model, ropes[name], each, some, end) / end for each in texts]))
        answers = [in_pieces(model, ropes[name], *prompt) for prompt in prompts]
        return {"rope": name, "text_nll": nll, "answer_nll": float(np.mean(answers)), "worst": max(answers),
                "fitness": with_key(nll, float(np.mean(answers)))}

    def by_whole_prompts(task):
        name, (tokens, _, count, _) = task
        model.rope = ropes[name]
        return over_window(model, tokens, len(tokens) - count).sum().item()
    rows = sorted(spread(by_pieces, list(ropes)), key=lambda row: row["fitness"])
    asked = [(row["rope"], prompt) for row in rows[:args.whole] for prompt in prompts[:1]]
    for row, whole in zip(rows, spread(by_whole_prompts, asked)):
        row["whole_nll"] = whole
    journal = Journal(args.out / "sets.jsonl", describe(model, tokenizer) | {"len": args.len, "seed": args.seed},
                      recorded(args))
    for row in rows:
        row = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
        journal.write(row)
        say(f"{row['rope']:24}" + "".join(f"{row.get(key, '-'):>12}" for key in (
            "text_nll", "answer_nll", "worst", "fitness", "whole_nll")))
        if rank() == 0:
            write_json(args.out / f"{row['rope']}.json", rope_to_dict(ropes[row["rope"]]))
    best = min(rows[:max(1, args.whole)], key=lambda row: row.get("whole_nll", 0))["rope"]
    if rank() == 0:
        write_json(args.out / "second.json", rope_to_dict(ropes[best]))
    say(f"second.json is {best}")


if __name__ == "__main__":
    run(main)

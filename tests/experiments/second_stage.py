"""A set for a second stage where a pass takes minutes, as at 2,097,152 tokens: by pieces first, then by whole prompts.

    $ torchrun --nproc-per-node 4 tests/experiments/second_stage.py --model FINETUNED --len 2097152 --data books/search

On top of the fine-tuned factors, s = --len over the length they are for: PI, NTK, YaRN; and, by a pair's turns within
that length, lambda = R s below one turn (at least M), M at one, 1 at T or more, in log-log a line between, for each R,
M, T and attention factor. Of each, in pieces of prompts and texts at true positions (eval_passkey.py): NLL of a key at
each of --depths, and of the end of 8 stretches of text. In a whole prompt the filler outnumbers the key, in pieces
hardly: so here a piece's filler stands for what was left out around it, too; the log of how many tokens each is worth
is added to its logits in every layer. Then the --whole sets of the lowest fitness, search.py's, are asked in whole
prompts. In --out: sets.jsonl, a line for each measurement (the same command goes on), and each set as NAME.json.
"""
import functools
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
from eval_ppl import anywhere  # noqa: E402
from longrope import (Journal, Parser, UserError, begin, data_hash, describe, inv_freq_of, load_tokenizer,  # noqa: E402
                      measured, over_window, rank, read_documents, recorded, resolve_rope, resolve_ropes,
                      rope_to_dict, run, say, token_nll, whole, write_json)
from search import formulas, second_stage, with_key  # noqa: E402

KEY = "71938"
EDGE = 40  # so many tokens on either side of the key's middle and at the end are no filler, twice as many at the start


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
def in_pieces(model, tokens, kept, count, bias=None):
    """Summed -log p of the last `count` of the tokens (T,), of which only the places kept (n,) are read."""
    device = model.unembedding.device
    cos, sin = model.rope.table(len(tokens), device)
    kept = torch.from_numpy(kept).to(device)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True).transpose(1, 2)
    tokens = tokens.to(device)[kept]
    attends = None if bias is None else itertools.repeat(attend)
    hidden = model.hidden(tokens[None], (cos[kept], sin[kept]), attends)
    return token_nll(hidden[0, -1 - count:-1], model.unembedding, tokens[-count:]).sum().item()


def read_data(args, model, tokenizer):
    """{depth: (tokens, places that are kept, tokens of the key, bias)}, [tokens of a text], the places kept of each."""
    prompts = {}
    for depth in args.depths:
        tokens, count, middle = eval_passkey.make_prompt(tokenizer, args.len, depth, KEY)
        kept = eval_passkey.pieces(args.len, middle)
        prompts[depth] = torch.tensor(tokens), kept, count, bias_of(kept, middle, args.len).to(model.unembedding)
    text = " ".join(text for _, text in read_documents(args.data, args.len))
    tokens = torch.tensor([i for e in tokenizer.encode_batch_fast(
        [text[at:at + 100_000] for at in range(0, len(text), 100_000)], add_special_tokens=False) for i in e.ids])
    if len(tokens) < args.len:
        raise UserError(f"{len(tokens)} tokens in all documents, fewer than --len {args.len}: give more --data")
    return prompts, anywhere(tokens, args.len, 8, args.seed), eval_passkey.pieces(args.len, args.len // 3)


def main(argv=None):
    p = Parser(__doc__)
    add, two = p.add_argument, functools.partial(whole, least=2)
    add("--len", type=two, required=True, help="target length")
    add("--slow", type=float, nargs="+", default=[1, 1.19, 1.5], metavar="R", help="default: 1 1.19 1.5")
    add("--middle", type=float, nargs="+", default=[1, 2, 4, 8], metavar="M", help="default: 1 2 4 8")
    add("--turns", type=float, nargs="+", default=[13, 100], metavar="T", help="above 1 (default: 13 100)")
    add("--attention", type=float, nargs="+", default=[1.2, 1.25, 1.3], metavar="A", help="factors (default: 1.2 1.25 "
        "1.3)")
    add("--rope", nargs="+", default=[], help="rope.json of more sets, as they are")
    add("--depths", type=float, nargs="+", default=[0.05, 0.3, 0.6, 0.9], help="of the keys (default: .05 .3 .6 .9)")
    add("--pieces", type=two, default=9, help="of a prompt or text, of 512 tokens (default: 9)")
    add("--whole", type=whole, default=1, metavar="N", help="sets to ask in whole prompts (default: 1)")
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
    ropes = {(name, args.len): problem.put(factors, args.len) for name, factors in sets.items()}
    for (name, _), rope in ropes.items() if rank() == 0 else ():
        write_json(args.out / f"{name}.json", rope_to_dict(rope))
    ropes |= resolve_ropes(args.rope, [args.len], model) if args.rope else {}
    prompts, texts, some = read_data(args, model, tokenizer)
    run_of, _ = runs_of(some)
    end = int((run_of == run_of[-1]).sum()) - 1  # tokens of a text's last run, save its first
    journal = Journal(args.out / "sets.jsonl", describe(model, tokenizer) | {
        "len": args.len, "pieces": args.pieces, "data_sha256": data_hash(texts)}, recorded(args))

    def measure(task):
        if task["of"] == "text":
            return {"nll": in_pieces(model, texts[task["at"]], some, end) / end}
        if task["of"] == "key":
            return {"nll": in_pieces(model, *prompts[task["at"]])}
        tokens, _, count, _ = prompts[task["at"]]
        return {"nll": over_window(model, tokens, len(tokens) - count).sum().item()}

    def found(ropes, of, places):
        """Yield (name, NLLs) for each rope."""
        tasks = [{"length": args.len, "of": of, "at": at} for at in places]
        return ((name, [row["nll"] for row in rows])
                for name, _, rows in measured(journal, model, ropes, tasks, measure))
    text = dict(found(ropes, "text", range(len(texts))))
    rows = sorted((with_key(np.mean(text[name]), np.mean(keys)), name, np.mean(text[name]), keys)
                  for name, keys in found(ropes, "key", prompts))
    say(f"{'fitness':>10}{'text':>8}   key's NLL at depths {' '.join(map(str, args.depths))}   rope")
    for fitness, name, nll, keys in rows:
        say(f"{fitness:10.4f}{nll:8.4f}   {' '.join(f'{key:7.3f}' for key in keys)}   {name}")
    best = {(name, args.len): ropes[name, args.len] for _, name, *_ in rows[:args.whole]}
    for name, keys in found(best, "whole prompt", prompts):
        say(f"{'whole':>18}   {' '.join(f'{key:7.3f}' for key in keys)}   {name}")


if __name__ == "__main__":
    run(main)

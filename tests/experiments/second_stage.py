"""A second stage where a pass takes minutes, as at 2,097,152 tokens: search.py's search by pieces of texts and prompts.

    $ torchrun --nproc-per-node 4 tests/experiments/second_stage.py --model FINETUNED --len 2097152 --data books/search

On top of the fine-tuned factors, s = --len over the length they are for, the search begins with search.py's formulas
and ramps: lambda = R s for pairs of up to P turns within that length, as the base slows them, 1 from T turns on, in
log-log a line between, for each R, P, T above P and attention factor. Fitness is as in search.py, but for a larger
weight: of the NLL of 4 stretches of text and of a key at each of --depths, both read in pieces that attend to as many
tokens as in the whole. The --whole sets of the lowest fitness are asked in whole prompts, too.
In --out: sets.jsonl, a line for each measurement (the same command goes on), each set as NAME.json, and the one of the
lowest fitness so far as rope.json.
"""
import functools
import itertools
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from eval_passkey import ask_in_pieces, make_trials, piece_size, prompt_in_pieces  # noqa: E402
from eval_ppl import anywhere  # noqa: E402
from finetune import encode_all  # noqa: E402
from longrope import (Journal, Parser, UserError, begin, data_hash, describe, inv_freq_of,  # noqa: E402
                      load_tokenizer, measured, rank, read_documents, recorded, resolve_rope, resolve_ropes,
                      rope_to_dict, run, say, titles_of, whole, window_nll, write_json)
from search import Space, formulas, search, second_stage  # noqa: E402

WEIGHT = 0.3  # of the key; with 0.15 a set won that pays for 2% less of the text's NLL with the key in the middle


def with_lambdas(factors, lambdas):
    """`factors` with these lambda, put in order, none below 1."""
    lambdas = np.maximum.accumulate(np.maximum(lambdas, 1)).round(2)
    return replace(factors, rescale_factors=tuple(lambdas.tolist()))


def ramp(problem, slow, until, turns):
    """lambda of the second stage for each pair, by its turns within the window that the base serves."""
    now = problem.window / (2 * math.pi) * inv_freq_of(problem.base.rescale_factors, problem.rope.rope_theta)
    return with_lambdas(problem.base, (slow * problem.scale) ** np.clip(
        np.log(turns / now) / np.log(turns / until), 0, 1))


def first_sets(args, problem, model):
    """{factors: name}, on top of the base: ramps, formulas, those given. Equal ones are one."""
    sets = {f"ramp-{slow:g}-{until:g}-{turns:g}-{factor:g}": replace(ramp(problem, slow, until, turns),
                                                                   attention_factor=factor)
            for slow, until, turns, factor in itertools.product(args.slow, args.until, args.turns, args.attention)
            if turns > until}
    sets |= formulas(problem, args.len)
    titles = titles_of(args.rope)
    for (name, _), rope in resolve_ropes(args.rope, [args.len], model).items() if args.rope else ():
        given = rope.at(args.len).over(problem.base)
        sets[f"given-{titles[name]}"] = with_lambdas(given, given.rescale_factors)
    return {factors: name for name, factors in sets.items()}


def text_in_pieces(tokens, count, seed):
    """As prompt_in_pieces, in half as many pieces, evenly placed, of twice the size. What lies between them in the text
    (T,) has keys and values of earlier ones, drawn 64 by 64: as in the whole text most tokens are far and of no use,
    and none is of what is still to be predicted. (A piece's first token is predicted from the piece before, one of a
    thousand.)"""
    places, size = np.arange(len(tokens)), min(2 * piece_size(len(tokens)), len(tokens))
    starts = np.linspace(0, len(tokens) - size, (count + 1) // 2).round().astype(int)
    kept = np.unique(np.add.outer(starts, np.arange(size)))
    before = kept.searchsorted(places // 64 * 64)  # tokens read before those 64
    drawn = np.random.default_rng(seed).random(-(-len(tokens) // 64))[places // 64] * (before - 63)
    source = np.where(np.isin(places, kept), kept.searchsorted(places), drawn.astype(int) + places % 64)
    return tokens, torch.from_numpy(kept), torch.from_numpy(source), len(kept) - 1


def read_data(args, tokenizer):
    """{depth: its prompt, for ask_in_pieces}, [a text, for it, too]"""
    prompts = {depth: prompt_in_pieces(tokenizer, trial | {"depth": depth}, args.pieces) for depth in args.depths
               for trial in make_trials(f"second {args.seed} {depth}", [args.len], 1, 1)}
    text = " ".join(text for _, text in read_documents(args.data))
    tokens = torch.tensor([i for some in encode_all([text], tokenizer) for _, ids in some for i in ids])
    if len(tokens) < args.len:
        raise UserError(f"{len(tokens)} tokens in all documents, fewer than --len {args.len}: give more --data")
    return prompts, [text_in_pieces(text, args.pieces, args.seed) for text in anywhere(tokens, args.len, 4, args.seed)]


def parser():
    p = Parser(__doc__)
    add = p.add_argument
    add("--len", type=functools.partial(whole, least=2), required=True, help="target length")
    add("--slow", type=float, nargs="+", default=[0.7, 1], metavar="R", help="default: 0.7 1")
    add("--until", type=float, nargs="+", default=[1, 10], metavar="P", help="default: 1 10")
    add("--turns", type=float, nargs="+", default=[100, 1000], metavar="T", help="above P (default: 100 1000)")
    add("--attention", type=float, nargs="+", default=[1.2, 1.3], metavar="A", help="factors (default: 1.2 1.3)")
    add("--rope", nargs="+", default=[], help="rope.json of more sets, put in order and to at least 1")
    add("--iterations", type=whole, default=10, help="generations of 8 candidates after those (default: 10)")
    add("--depths", type=float, nargs="+", default=[0.02, 0.25, 0.5, 0.8], help="of the keys (default: .02 .25 .5 .8)")
    add("--pieces", type=functools.partial(whole, least=5), default=17, help="of a prompt or text (default: 17)")
    add("--whole", type=whole, default=1, metavar="N", help="sets to ask in whole prompts (default: 1)")
    add("--out", type=Path, default=Path("out/second"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.context_parallel > 1:
        raise UserError("no --context-parallel here: each process reads pieces of its own")
    model = begin(args)
    tokenizer = load_tokenizer(model.path)
    problem = second_stage(resolve_rope("model", model), args.len)
    if args.len <= problem.window:
        raise UserError(f"--len {args.len}: the model's factors serve {problem.window} tokens already")
    prompts, texts = read_data(args, tokenizer)
    journal = Journal(args.out / "sets.jsonl", describe(model, tokenizer) | {
        "len": args.len, "pieces": args.pieces, "data_sha256": data_hash([text for text, *_ in texts])}, recorded(args))
    asked = [{"length": args.len, "of": of, "at": at} for of, places in (("text", range(len(texts))), ("key", prompts))
             for at in places]
    table = {}

    def measure(task):
        if task["of"] == "text":
            text = texts[task["at"]]
            return {"nll": ask_in_pieces(model, model.rope, [text])[0] / text[-1]}
        prompt = prompts[task["at"]]
        if task["of"] == "key":
            return {"nll": ask_in_pieces(model, model.rope, [prompt])[0]}
        tokens, *_, count = prompt
        return {"nll": window_nll(model, tokens, len(tokens) - count).sum().item()}

    def evaluate(population, iteration):
        """{candidate: fitness}; each is written, and a line of the table."""
        ropes = {}
        for candidate, name in population.items():
            name = name if iteration == 0 else f"{name}-{iteration}-{len(ropes)}"
            ropes[name, args.len] = problem.put(candidate, args.len)
            if rank() == 0:
                write_json(args.out / f"{name}.json", rope_to_dict(ropes[name, args.len]))
        for name, _, rows in measured(journal, model, ropes, asked, measure):
            text, keys = np.mean([row["nll"] for row in rows[:len(texts)]]), [row["nll"] for row in rows[len(texts):]]
            table[name] = text + WEIGHT * math.log1p(np.mean(keys)), text, keys, ropes[name, args.len]
            if rank() == 0:
                write_json(args.out / "rope.json", rope_to_dict(table[min(table, key=lambda it: table[it][0])][3]))
        return dict(zip(population, (table[name][0] for name, _ in ropes), strict=True))
    starts = first_sets(args, problem, model)
    largest = max(2 * problem.scale, *(max(it.rescale_factors) for it in starts))
    space = Space((1.0,) * len(problem.base.rescale_factors), largest, (problem.base.n_hat,), (1.0, 1.6))
    sizes = Namespace(population_size=len(starts), num_mutations=5, num_crossovers=3, num_parents=8, turns=1,
                      iterations=args.iterations, screening=64, max_evals=len(starts) + 8 * args.iterations)
    search(sizes, np.random.default_rng(args.seed), starts, space, evaluate)

    def values(rows):
        return " ".join(f"{row:7.3f}" for row in rows)
    say(f"{'fitness':>10}{'text':>8}   key's NLL at depths {' '.join(map(str, args.depths))}   rope")
    best = sorted(table, key=lambda name: table[name][0])
    for name in best:
        fitness, text, keys, _ = table[name]
        say(f"{fitness:10.4f}{text:8.4f}   {values(keys)}   {name}")
    tasks = [{"length": args.len, "of": "whole prompt", "at": depth} for depth in prompts]
    ropes = {(name, args.len): table[name][3] for name in best[:args.whole]}
    for name, _, rows in measured(journal, model, ropes, tasks, measure):
        say(f"{'whole':>18}   {values(row['nll'] for row in rows)}   {name}")


if __name__ == "__main__":
    run(main)

"""Search the rescale factors of LongRoPE: Algorithm 1 of the paper (arXiv 2402.13753), an evolution over perplexity.

    $ python search.py                                        # the bundled model, 8 times its window
    $ torchrun --nproc-per-node 8 search.py --model DIR --data books/search --len 262144      # or without torchrun
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --len 2097152       # second stage, no more training
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --short --len 8192  # short-window recovery

The paper's search, but for plain RoPE among the first candidates, is --fitness ppl --screening 1 --n-hat search
--attention-factor su --samples 5 --population-size 64 --num-mutations 16 --num-crossovers 16 --num-parents 32
--iterations 40; here fewer candidates find a set that keeps more keys. In --out: rope.json, the best factors so far at
any time; history.jsonl, a line for each measurement and each candidate, from which the same command goes on where it
was stopped; search.png.
"""
import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval_passkey import ask_in_pieces, make_trials, prompt_in_pieces
from longrope import (COLORS, FORMULAS, Factors, Journal, Parser, Rope, UserError, begin, copy_file, data_hash,
                      describe, forward_flops, in_vocabulary, inv_freq_of, load_tokenizer, natural, panels_of,
                      perplexity, rank, read_documents, recorded, resolve_rope, rope_to_dict, run, save_config, say,
                      sha256_of, share_sequences, spread_in_rounds, su_factor, warm_up, warn, weight_files, whole,
                      window_nll, windows, world_size, write_json, yarn_factor)

# ---------------------------------------------------------------------------------------------------------------------
# The search space and its operators. A candidate is a Factors: one lambda for each rotary pair, relative to the base
# that the search multiplies onto, one n_hat and one attention factor as they will be used.

BASELINES = ("pi", "ntk", "yarn", "yarn-su")
SIZES = {"population_size": 8, "num_mutations": 5, "num_crossovers": 3, "num_parents": 8, "iterations": 36}
ON_CPU = SIZES | {"population_size": 5, "iterations": 2}
SLOW_LEAST = 1.19  # of lambda_i / s in slow pairs; from 1 on no angle is unseen, at this more keys were found
N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)  # table 4 of the paper
MUTATION_PROB = 0.3  # p, of a gene
DOUBT, DOUBT_FROM = 2, 50  # standard deviations in favour of what is unexplored, from so many candidates on


@dataclass(frozen=True)
class Space:
    smallest: tuple   # lambda_i, (D/2,), non-decreasing: 1, for slow pairs the bound (--slow-least)
    largest: float    # of lambda: 1.25 s
    n_hats: tuple     # N_HAT, or the one that is fixed
    attention: tuple  # lowest and highest attention factor; equal if it is fixed


def is_monotone(factors):
    """The paper's constraint: lambda_i <= lambda_(i+1)."""
    return all(a <= b for a, b in zip(factors, factors[1:]))


def draw(rng, low, high):
    """Uniform on the multiples of 0.01 from low to high, both included."""
    return int(rng.integers(round(100 * low), round(100 * high) + 1)) / 100


def mutate(rng, parent, space):
    """Each gene, with probability p, anew: n_hat from its set, lambda_i between its neighbours as they then are, so
    that the constraint holds without sorting."""
    factors = [1.0, *parent.rescale_factors, space.largest]
    for i in range(1, len(factors) - 1):
        if rng.random() < MUTATION_PROB:
            factors[i] = draw(rng, max(factors[i - 1], space.smallest[i - 1]), factors[i + 1])
    n_hat = int(rng.choice(space.n_hats)) if rng.random() < MUTATION_PROB else parent.n_hat
    attention_factor, (low, high) = parent.attention_factor, space.attention
    if low < high and rng.random() < MUTATION_PROB:
        attention_factor = draw(rng, low, high)
    return Factors(tuple(factors[1:-1]), n_hat, attention_factor)


def crossover(rng, a, b):
    """Every gene from one of two parents, by a coin for each gene.

    Where the coin's parent would break the constraint the gene comes from the parent of the gene before, whose own
    order guarantees that it fits. The walk goes up or down by another coin: always upward would favour large factors.
    """
    up = bool(rng.integers(2))
    factors, parent = [], a
    for i in range(len(a.rescale_factors)) if up else reversed(range(len(a.rescale_factors))):
        gene = (other := (a, b)[rng.integers(2)]).rescale_factors[i]
        if not factors or (gene >= factors[-1] if up else gene <= factors[-1]):
            parent = other
        factors.append(parent.rescale_factors[i])
    n_hat, attention_factor = (a, b)[rng.integers(2)].n_hat, (a, b)[rng.integers(2)].attention_factor
    return Factors(tuple(factors if up else factors[::-1]), n_hat, attention_factor)


def unseen(make, count, seen):
    """Up to `count` candidates from make(), none of them twice and none in `seen`."""
    made = {}
    for _ in range(100 * count):  # a space almost used up ends here
        if len(made) < count and (candidate := make()) not in seen:
            made[candidate] = None
    return list(made)


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1. Not the paper's is the screening of new candidates by a Gaussian process (--screening 1: none).


def search(args, rng, starts, space, evaluate):
    """The candidates, the best first, after `args.iterations` generations, or `args.max_evals` evaluations.

    starts: {candidate: name}, what the search begins with, as a rule the formulas and plain RoPE. evaluate({candidate:
    origin}, iteration) -> {candidate: its fitness}, which is to be small.
    """
    fitness, given = {}, list(starts)  # fitness: of every candidate ever evaluated
    mutants = unseen(lambda: mutate(rng, given[rng.integers(len(given))], space), args.population_size - len(given),
                     starts)
    population = starts | dict.fromkeys(mutants, "mutation")
    for iteration in itertools.count():
        allowed = itertools.islice(population.items(), args.max_evals - len(fitness))
        fitness |= evaluate(dict(allowed), iteration)
        ranking = promising(fitness, args.turns) if args.screening > 1 else sorted(fitness, key=fitness.get)
        if iteration == args.iterations or len(fitness) == args.max_evals:
            return ranking
        parents = ranking[:args.num_parents]  # the top k stay, with screening by the process's mean
        mutants = unseen(lambda: mutate(rng, parents[rng.integers(len(parents))], space),
                         args.screening * args.num_mutations, fitness)
        children = unseen(lambda: crossover(rng, *(parents[i] for i in rng.choice(len(parents), 2, replace=False))),
                          args.screening * args.num_crossovers if len(parents) > 1 else 0, {*fitness, *mutants})
        population = dict.fromkeys(mutants, "mutation") | dict.fromkeys(children, "crossover")
        if args.screening > 1 and population:
            doubt = DOUBT if len(fitness) >= DOUBT_FROM else 0  # of few, all are equally doubtful
            chosen = promising(fitness, args.turns, [*population], doubt)[:args.num_mutations + args.num_crossovers]
            population = {candidate: population[candidate] for candidate in chosen}


def promising(fitness, turns, candidates=None, doubt=0):
    """The candidates (by default all measured), the most promising first, by a Gaussian process: its mean less `doubt`
    standard deviations, so that unexplored ones get a chance.

    x = (log lambda, n_hat, attention factor), y = the normal distribution's quantile for a candidate's rank; the
    kernel is exp(-|x - x'|^2 / 2 l^2), and 0.1 more for two of one group: candidate i, but for the first, was measured
    on group i % turns of the documents, and a group's luck is not a candidate's worth. On the diagonal is noise; l and
    noise are those of the highest likelihood. No randomness and one thread: all processes choose the same.
    """
    def features(some):  # (n, D/2 + 2), so scaled that a step in each matters alike
        return torch.tensor([(*map(math.log, c.rescale_factors), math.log2(1 + c.n_hat) / 10, 10 * c.attention_factor)
                             for c in some], dtype=torch.float64)

    def kernel(a, b, length):
        return (-torch.cdist(a, b) ** 2 / (2 * length**2)).exp()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    candidates = [*fitness] if candidates is None else candidates
    x, new, group = features(fitness), features(candidates), torch.arange(len(fitness)) % turns
    ranks = torch.tensor([*fitness.values()], dtype=x.dtype).argsort(stable=True).argsort().to(x.dtype)
    y = torch.special.ndtri((ranks + 0.5) / len(x))
    shared = 0.1 * (group[:, None] == group)
    fits = []
    for length, noise in itertools.product((0.5, 1, 2, 4), (0.01, 0.1, 1)):
        root = torch.linalg.cholesky(kernel(x, x, length) + shared + noise * torch.eye(len(x), dtype=x.dtype))
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]  # K^-1 y
        fits.append((0.5 * y @ weights + root.diagonal().log().sum(), length, root, weights))  # -log likelihood
    _, length, root, weights = min(fits, key=lambda fit: fit[0])
    k = kernel(new, x, length)
    deviation = (1 - (k.T * torch.cholesky_solve(k.T, root)).sum(0)).clamp(min=0).sqrt()
    best_first = (k @ weights - doubt * deviation).argsort(stable=True)
    torch.set_num_threads(threads)
    return [candidates[i] for i in best_first]


# ---------------------------------------------------------------------------------------------------------------------
# What is searched. The same loop serves a first stage, a second one on top of factors found, and a short set: they
# differ in what the candidates' lambdas multiply onto, how far they go, and which of a rope's two sets they replace.


@dataclass(frozen=True)
class Problem:
    rope: Rope        # what the model has now; the result becomes one of its sets
    base: Factors     # what the candidates' lambdas multiply onto
    window: int       # tokens that the base serves
    scale: float      # s; lambda goes up to 1.25 s
    short: bool       # is it the short set that is searched?

    def put(self, candidate, length):
        """The Rope with a candidate in its place, for `length` tokens."""
        found, window = candidate.on(self.base), self.rope.original_max_position_embeddings
        if self.short:
            return replace(self.rope, short=found, short_max_length=max(length, window))
        return replace(self.rope, long=found, scale=length / window, short=self.rope.short or self.base,
                       short_max_length=self.rope.short_max_length if self.rope.short else window)


def first_stage(rope, length):
    """From the window that the model was trained on, onto what it was trained with."""
    window = rope.original_max_position_embeddings
    trained = replace(rope, long=rope.trained, scale=1.0, short=None, short_max_length=0)
    return Problem(trained, rope.trained, window, length / window, short=False)


def second_stage(rope, length):
    """From a fine-tuned model's window, without training: lambda = lambda_finetuned * lambda_second (section 3.3)."""
    return Problem(rope, rope.long, rope.target_length, length / rope.target_length, short=False)


def recovery(rope, length):
    """The short set, up to `length` tokens: lambda goes less far (published factors reach 2.8 to 5)."""
    window = rope.original_max_position_embeddings
    return Problem(rope, rope.trained, window, max(min(rope.scale, 5.0), length / window), short=True)


# ---------------------------------------------------------------------------------------------------------------------
# Fitness. Perplexity alone is blind to slow pairs at angles that were never trained: it loses little there,
# retrieval often everything. (LongRoPE2, arXiv 2502.20082, asks the key alone, and keeps slow pairs at s or more.)

KEY_WEIGHT = 0.03
KEYS = 10  # when the last are measured again, and in the table; a candidate is asked 5


def with_key(nll, answer):
    """NLL a token + KEY_WEIGHT log(1 + NLL of a pass key): the log, lest keys that are lost outweigh the text."""
    return nll + KEY_WEIGHT * math.log1p(answer)


def measure(model, rope, item):
    """Of a window of text (T,) the summed -log p; of pass-key prompts what `ask_in_pieces` says."""
    if isinstance(item, list):
        return ask_in_pieces(model, rope, item)
    model.rope = rope
    return window_nll(model, item).sum().item()


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: bounds and first candidates, the journal, tables, plots, arguments.

CHOICE = ("none", "pi", "ntk", "yarn")  # by which the fitness is chosen where none is given
UNFINISHED = "export.part"  # in --export until it is whole, so that the same command may go on there


def formulas(problem, length, beyond=1.0):
    """PI, NTK and YaRN for `beyond` times s, which is length over window, or where the base serves so many the
    problem's. YaRN counts turns within the model's own window, on a base too: it has slowed slow pairs by about as much
    as its window grew. YaRN has its own attention factor or su for all of `length`, the others have the rope's."""
    rope, s = problem.rope, length / problem.window if length > problem.window else problem.scale
    window = rope.original_max_position_embeddings
    attention = {"yarn": yarn_factor(length / window), "yarn-su": su_factor(length / window, window)}
    return {name: replace(FORMULAS[name](len(rope.long.rescale_factors), rope.rope_theta, window, beyond * s),
                          n_hat=rope.long.n_hat, attention_factor=attention.get(name, rope.long.attention_factor))
            for name in BASELINES}


def bound_of(args):
    """The least lambda_i / s of slow pairs."""
    return SLOW_LEAST * (args.fitness != "ppl" and not args.short) if args.slow_least is None else args.slow_least


def first_candidates(args, problem, start=None, beyond=1.0):
    """(Space, {candidate: name}): the set of --start-from; YaRN under su, YaRN, NTK and PI for `beyond` times s, or
    more if the bound on slow pairs is; the rope's own sets. All are clipped to the bounds."""
    rope, base, s = problem.rope, problem.base.rescale_factors, args.len / problem.window
    window, largest = rope.original_max_position_embeddings, round(1.25 * problem.scale, 2)
    scale = rope.scale if problem.short else args.len / window
    fixed = {"su": su_factor(scale, window), "yarn": yarn_factor(scale), "none": 1.0,
             "the long set's": rope.long.attention_factor}
    low = high = fixed.get(args.attention_factor)
    if args.attention_factor == "search":
        low, high = 1.0, round(1.25 * fixed["su"], 2)
    slow = problem.window / (2 * math.pi) * inv_freq_of(base, rope.rope_theta) < 1  # no full turn within the window
    bound = bound_of(args)
    least = round(bound * s, 2)
    if args.slow_least and not (s > 1 and slow.any() and 1 < least <= largest):
        raise UserError(f"--slow-least {args.slow_least:g} times {s:.4g}, s, bounds nothing, or is above {largest:g}, "
                        f"the largest factor: {slow.sum()} pairs are slow")
    smallest = np.maximum.accumulate(np.where(slow, max(1.0, least), 1.0))
    n_hats = N_HAT if args.n_hat == "search" else (args.n_hat,)

    begins = su_factor(args.len / window if args.len > window else scale, window)
    sets = {"start": start.over(problem.base)} if start else {}
    if start and not is_monotone(np.round(sets["start"].rescale_factors, 9)):
        say("--start-from: its factors are in no order; sorted")
    for name, factors in reversed(formulas(problem, args.len, max(beyond, bound)).items()):
        sets[name] = replace(factors, attention_factor=max(begins, factors.attention_factor))
    own = {"none": problem.base, "long": rope.long} if problem.short else {"none": problem.base}
    sets |= {name: factors.over(problem.base) for name, factors in own.items()}
    starts = {}
    for name, factors in sets.items():
        lambdas = np.clip(np.sort(factors.rescale_factors), smallest, largest).round(2)
        candidate = Factors(tuple(lambdas.tolist()), min(n_hats, key=lambda n: abs(n - factors.n_hat)),
                            float(np.clip(round(factors.attention_factor, 2), low, high)))
        starts.setdefault(candidate, name)  # two can be the same
    return Space(tuple(smallest.tolist()), largest, n_hats, (low, high)), starts


def ropes_to_compare(args, problem):
    """{name: Rope}, the rows of the table at the end."""
    rope = problem.rope
    if problem.short:  # transformers has one attention factor for both sets
        attention = rope.long.attention_factor if args.export else 1.0
        none = Factors((1.0,) * len(rope.long.rescale_factors), attention_factor=attention)
        return {"none": problem.put(none, args.len), "long": replace(rope, short=None, short_max_length=0)}
    sets = {"none": rope.long.over(problem.base)} | formulas(problem, args.len)
    return {name: problem.put(it, args.len) for name, it in sets.items()}


def within(space, problem, ropes, length):
    """Of {name: Rope} those that the search might have found: they may be better than what it did find."""
    least, (low, high) = (np.array(space.smallest) - 0.005) * problem.base.rescale_factors, space.attention
    sets = {name: rope.at(length) for name, rope in ropes.items()}
    return {name: ropes[name] for name, factors in sets.items()
            if (factors.rescale_factors >= least).all() and low <= factors.attention_factor <= high
            and factors.n_hat in space.n_hats}


class Evaluator:
    """Measures ropes on documents and prompts, {label: item}, none twice: the journal has what was found. Updates the
    bar and rope.json, the best so far. With torchrun all is dealt to the processes."""

    def __init__(self, args, model, problem, documents, prompts, journal, record):
        self.args, self.model, self.problem, self.journal, self.record = args, model, problem, journal, record
        self.items = dict(enumerate(documents)) | prompts
        self.known = {(row["rope"], row["item"]): row["found"] for row in journal.rows if "rope" in row}
        self.there = sum("genes" in row for row in journal.rows)
        self.fitness, self.first = {}, None
        self.bar = tqdm(total=args.max_evals, desc="search", unit="candidate", disable=rank() > 0)

    def found(self, tasks):
        """Yield for each (rope, labels) {label: what `measure` says}, without labels that are no item's."""
        tasks = [(rope, sha256_of(rope_to_dict(rope)), [x for x in some if x in self.items]) for rope, some in tasks]
        left = {(name, label): (rope, self.items[label]) for rope, name, labels in tasks for label in labels
                if (name, label) not in self.known}
        if world_size() > 1:  # documents first, then prompts: what is dealt in a round takes equally long
            left = dict(sorted(left.items(), key=lambda item: isinstance(item[0][1], str)))
        every = spread_in_rounds(lambda task: measure(self.model, *task), [*left.values()], self.args.context_parallel)
        todo = iter(left)
        for _, name, labels in tasks:
            while not all((name, label) in self.known for label in labels):
                begun, now = time.perf_counter(), next(todo)
                self.known[now] = next(every)
                self.journal.write({"rope": now[0], "item": now[1], "found": self.known[now],
                                    "seconds": round(time.perf_counter() - begun, 3)})
            yield {label: self.known[name, label] for label in labels}

    def __call__(self, population, iteration):
        """{candidate: fitness}: NLL a token above the first candidate's on the same documents, and a little of the
        key's. The first is measured on all of the search's documents, each other on the next --samples of them."""
        samples, tasks = self.args.samples, []
        for n, candidate in enumerate(population, len(self.fitness)):
            turn = n % self.args.turns * samples
            documents = range(turn, turn + samples) if n else range(self.args.searched)
            tasks.append((self.problem.put(candidate, self.args.len), [*documents, "search"]))
        for candidate, nlls in zip(population, self.found(tasks)):
            answer, asked = nlls.pop("search", (0.0, 0))
            self.first = self.first or nlls
            above = math.fsum(nlls[d] - self.first[d] for d in nlls) / (len(nlls) * (self.args.len - 1))
            self.fitness[candidate] = with_key(above, answer)
            if len(self.fitness) > self.there:
                self.journal.write({"iteration": iteration, "origin": population[candidate],
                                    "genes": asdict(candidate), "nll": nlls, "answer_nll": answer, "keys": asked,
                                    "fitness": self.fitness[candidate]})
            best = min(self.fitness, key=self.fitness.get)
            self.bar.set_postfix_str(f"best fitness {self.fitness[best]:.4f}", refresh=False)
            if len(self.fitness) == self.there or len(self.fitness) > self.there and candidate == best:
                self.save(self.problem.put(best, self.args.len), fitness=self.fitness[best])
            self.bar.update()
        return {candidate: self.fitness[candidate] for candidate in population}

    def compare(self, ropes, which, documents):
        """A row for each rope: perplexity on the search's documents and on others, and what it finds of the keys."""
        rows, found = [], self.found([(rope, [*range(documents), which]) for rope in ropes.values()])
        bar = tqdm(found, "compare", len(ropes), unit="rope", leave=False, disable=rank() > 0)
        for (name, rope), nlls in zip(ropes.items(), bar):
            answer, asked = nlls.pop(which, (0.0, None))
            nlls = [*nlls.values()]
            on, off = (perplexity(some, len(some) * (self.args.len - 1))
                       for some in (nlls[:self.args.searched], nlls[self.args.searched:]))
            rows.append({"rope": name, "attention_factor": rope.at(self.args.len).attention_factor, "search": on,
                         "unseen": off, "keys": asked,
                         "fitness": with_key(math.log(on), answer if self.args.fitness != "ppl" else 0.0)})
        return rows

    def save(self, rope, **more):
        if rank() == 0:
            write_json(self.args.out / "rope.json", rope_to_dict(rope) | {
                "search": self.record | recorded(self.args) | {
                    "bound": bound_of(self.args), "evaluations": len(self.fitness)} | more})


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def say_table(args, rows, unseen):
    say(f"\nperplexity at {args.len} tokens, one window a document; pass keys found of {KEYS}, by pieces of prompts")
    say(f"{'rope':10}{'attention factor':>18}{f'{args.searched} searched on':>18}{f'{unseen} unseen':>14}{'keys':>8}")
    for row in rows:
        on, off, keys = ("-" if x is None else f"{x:.2e}" if x > 1e6 else f"{x:.3f}" if type(x) is float else x
                         for x in (row["search"], row["unseen"], row["keys"]))
        say(f"{row['rope']:10}{row['attention_factor']:18.3f}{on:>18}{off:>14}{keys:>8}")
    for where in ("search", "unseen") if unseen else ("search",):
        other = min(rows[:-1], key=lambda row: row[where])
        gain = 1 - rows[-1][where] / other[where]
        say(f"{where} documents: searched is {abs(gain):.1%} {'above' if gain < 0 else 'below'} {other['rope']}, the "
            "best of the others")


def plot(ropes, length, found, path):
    """Left: lambda of each pair for each rope. Right: every candidate, and the lowest fitness as the search went on."""
    height = max(np.median(found) - min(found), 0.003)
    fig, (left, right) = panels_of(2, 4.6, 3.6)
    lines = {}  # equal factors are one line, as YaRN's two
    for name, rope in ropes.items():
        lines.setdefault(rope.at(length).rescale_factors, []).append(name)
    for (factors, names), color in zip(lines.items(), COLORS):
        left.plot(factors, label=", ".join(names), color=color)
    right.plot(found, ".", color="gray", label="a candidate, on its documents")
    right.plot(np.minimum.accumulate(found), color="black", drawstyle="steps-post", label="the lowest yet")
    left.set(xlabel="rotary pair i", ylabel=r"$\lambda_i$")
    right.set(xlabel="candidates evaluated", ylabel="fitness: NLL a token above the first's, and keys",
              ylim=(min(found) - 1.5 * height, min(found) + 5 * height))
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    right.legend(loc="lower left")
    fig.savefig(path, dpi=120)


def say_cost(args, model, documents, prompts, candidates, ropes):
    """What so many candidates, the last ones and the table's ropes will take, by a probe of the machine."""
    on_cpu = model.unembedding.device.type == "cpu"
    probe = documents[0][:2048 if on_cpu and args.context_parallel == 1 else None]
    warm_up(model, len(probe))
    begun = time.perf_counter()
    window_nll(model, probe)
    # with the last candidates the lowest and the first are asked, in the table the first and the one found
    asked = {"search": candidates + len(CHOICE) * (not args.fitness), "last": args.last + 2, "table": ropes + 2}
    passes = candidates * args.samples + asked["last"] * args.searched + asked["table"] * len(documents) + sum(
        asked[name] * len(kept) / args.len for name, some in prompts.items() for _, kept, *_ in some)
    seconds = (time.perf_counter() - begun) * passes * forward_flops(model, args.len) / forward_flops(model, len(probe))
    seconds *= args.context_parallel / world_size()
    say(f"{candidates} candidates, each on {args.samples} document{'s' * (args.samples > 1)} of {args.len} tokens and "
        f"{len(prompts.get('search', []))} pass keys, take about {tqdm.format_interval(seconds)}" + (
            f"; shorter: --len {min(args.len, max(args.len // 8, 2 * model.window))} --max-evals 16"
            * (on_cpu and seconds > 1800 and not args.init)))


def parser():
    p = Parser(__doc__)
    add = p.add_argument
    add("--len", type=partial(whole, least=2), help="target length, in tokens (default: 8 times the "
        "window L, with --init 8 times what that serves, with --short L)")
    add("--samples", type=natural, default=1, metavar="N",
        help="documents a candidate is evaluated on, the next N in turn. Ten are read (on a CPU 4; 2 N if that is "
        "more; all if fewer), about half of them to search on, the others to compare on (default: 1; the paper: all 5)")
    for key, least, what in (("population_size", 3, "first candidates, P"), ("num_mutations", 1, "mutants, N1"),
                             ("num_crossovers", 1, "children, N2"), ("num_parents", 2, "the best, which breed, k"),
                             ("iterations", 0, "generations after the first, T")):
        add(f"--{key.replace('_', '-')}", type=partial(whole, least=least, most=100_000), metavar="N",
            help=f"{what} (default: {SIZES[key]}" + f", on a CPU {ON_CPU[key]}" * (SIZES[key] != ON_CPU[key]) + ")")
    add("--n-hat", type=lambda text: text if text == "search" else whole(text), default=0, metavar="N|search",
        help="first tokens that no factor changes; search = a gene (default: 0, as transformers and vLLM know none)")
    add("--attention-factor", choices=["su", "yarn", "none", "search"],
        help="su = sqrt(1 + ln s / ln L), yarn = 0.1 ln s + 1, s = --len / L, with --short the long set's; none = 1; "
        "search = a gene, from 1 to 1.25 su (default: search; with --short and --export the long set's, since "
        "Hugging Face has one for both)")
    add("--slow-least", type=float, metavar="R", help="the bound: no factor below R s, s = --len over what the "
        "base serves, for slow pairs, those that make no full turn within that: it keeps pass keys (default: "
        f"{SLOW_LEAST}; 0, as in the paper, with --fitness ppl or --short)")
    add("--start-from", dest="start", type=Path, metavar="ROPE",
        help="rope.json, say of another length, whose factors, put within the bounds, are a first candidate, too")
    add("--init", type=Path, metavar="ROPE",
        help="rope.json of a fine-tuned model: search a second stage on top of it; with --short of any extended one")
    add("--short", action="store_true", help="search the short set of --init, for lengths up to --len")
    add("--screening", type=natural, default=64, metavar="N",
        help="make N times as many candidates, evaluate the most promising; 1 is the paper's search (default: 64)")
    add("--fitness", choices=["keys", "ppl"],
        help=f"keys = NLL a token + {KEY_WEIGHT} log(1 + NLL of a pass key), ppl = the first alone, as in the paper "
        "(default: keys; ppl where by keys plain RoPE beats PI, NTK and YaRN, but not with --short)")
    add("--max-evals", type=natural, metavar="N", help="stop after so many candidates (default: all)")
    add("--out", type=Path, help="directory of the result (default: out/search-LEN[-short])")
    add("--export", type=Path, metavar="DIR", help="write a Hugging Face directory, a new one, with the result and "
        "a copy of the weights, too; --n-hat 0 only")
    return p


def fill_in(args, model, rope):
    """Defaults that depend on the model, the rope of --init and the machine."""
    args.len = args.len or (model.window if args.short else 8 * (rope.target_length if args.init else model.window))
    args.out = args.out or Path(f"out/search-{args.len}{'-short' * args.short}")
    args.attention_factor = args.attention_factor or ("the long set's" if args.short and args.export else "search")
    on_cpu = model.unembedding.device.type == "cpu"
    if args.short and not args.fitness:
        args.fitness = "keys"
    args.last = 3 if on_cpu else 12  # candidates that are measured again before the table
    args.documents = max(2 * args.samples, 4 if on_cpu else 10)  # half of them to compare on
    defaults = ON_CPU if on_cpu else SIZES
    vars(args).update({key: value for key, value in defaults.items() if getattr(args, key) is None})


def problem_of(args, rope):
    """The Problem that the arguments ask for."""
    problem = (recovery if args.short else second_stage if args.init else first_stage)(rope, args.len)
    if args.short and (not args.init or args.len >= rope.target_length):
        raise UserError("--short: give an extended model's rope.json with --init, and a --len below its long set's")
    if args.short and rope.short and max(args.len, problem.window) < rope.short_max_length:
        warn(f"--len {args.len}: the short set that there is serves {rope.short_max_length} tokens, the new one fewer")
    if not args.short and args.len <= problem.window:
        raise UserError(f"--len {args.len}: nothing to extend, {problem.window} tokens are served already; if config "
                        "says more than was trained, lower its max_position_embeddings in a copy")
    if args.export and (args.n_hat or rope.long.n_hat or rope.short and rope.short.n_hat):
        raise UserError("--export: config.json cannot say n_hat above 0")
    if args.export and (args.export.resolve() == args.out.resolve() or args.export.is_file() or
                        list(args.export.glob("*")) and not (args.export / UNFINISHED).exists()):
        raise UserError(f"--export {args.export}: it is --out or has files; give a new directory")
    return problem


def read_data(args, model, tokenizer):
    """(names, documents, {"search", "last", "table": what `ask_in_pieces` takes}); the first documents are searched."""
    documents = read_documents(args.data, 5 * args.len)
    names, documents = zip(*windows(documents, tokenizer, args.len, args.documents))
    in_vocabulary(model, torch.stack(documents))
    args.samples = min(args.samples, len(documents))
    args.turns = max(1, len(documents) // 2 // args.samples)  # candidates, until the same documents come again
    args.searched = args.turns * args.samples
    counts = ({"search": 5, "last": KEYS} if args.fitness != "ppl" else {}) | {"table": KEYS}
    try:
        prompts = {name: [prompt_in_pieces(tokenizer, trial) for trial in make_trials(
            f"{name} {args.seed}", [args.len], count, 1)] for name, count in counts.items()}
    except UserError as e:
        warn(f"no pass keys: {e}")
        prompts = {}
    for tokens, *_ in itertools.chain(*prompts.values()):
        in_vocabulary(model, tokens)
    return names, documents, prompts


def main(argv=None):
    args = parser().parse_args(argv)
    model = begin(args)
    rope = resolve_rope(args.init or "config", model)
    fill_in(args, model, rope)
    tokenizer = load_tokenizer(model.path)
    share_sequences(model, args.context_parallel, [args.len])
    problem = problem_of(args, rope)
    start = resolve_rope(args.start, model, args.len) if args.start else None
    start = start and start.at(min(args.len, start.short_max_length) if args.short else args.len)
    space, starts = first_candidates(args, problem, start)
    total = max(args.population_size, len(starts)) + args.iterations * (args.num_mutations + args.num_crossovers)
    args.max_evals = min(args.max_evals or total, total)
    ropes = ropes_to_compare(args, problem)
    names, documents, prompts = read_data(args, model, tokenizer)

    same = {*SIZES, "samples", "len", "seed", "n_hat", "attention_factor", "short", "screening",
            "context_parallel", "fitness"} - {"iterations"}  # which may grow
    setup = describe(model, tokenizer) | {key: getattr(args, key) for key in sorted(same)} | {
        "bound": bound_of(args), "data_sha256": data_hash(documents), "base": rope_to_dict(problem.rope),
        "starts": sha256_of([asdict(c) for c in (*starts, *[start] * bool(start))])}
    record = {"model": str(args.model), "data": names[:args.searched], "data_sha256": setup["data_sha256"],
              "target_length": args.len, "seed": args.seed}
    journal = Journal(args.out / "history.jsonl", setup, record | recorded(args), ["rope.json"])
    evaluate = Evaluator(args, model, problem, documents, prompts, journal, record)
    say_cost(args, model, documents, prompts, max(0, args.max_evals - evaluate.there), len(ropes))
    if not args.fitness:
        asked = {name: ropes[name] for name in CHOICE}
        none, *others = (row["fitness"] for row in evaluate.compare(asked, "search", args.searched))
        args.fitness = "ppl" if none < min(others) else "keys"
        if args.fitness == "ppl":  # as with a theta of a million, where slow pairs do no harm
            say("plain RoPE is better than PI, NTK and YaRN: --fitness ppl, blind to keys; --fitness keys sees them")
            space, starts = first_candidates(args, problem, start, problem.scale ** -0.5)  # for the square root of s
            evaluate.items = {label: item for label, item in evaluate.items.items() if label not in ("search", "last")}
    ranking = search(args, np.random.default_rng(args.seed), starts, space, evaluate)
    evaluate.bar.close()
    lowest = min(evaluate.fitness, key=evaluate.fitness.get)
    ropes["first"] = problem.put(next(iter(starts)), args.len)  # kept if nothing is better
    last = {"first": ropes["first"]} | {it: problem.put(it, args.len) for it in (lowest, *ranking[:args.last])}
    last |= within(space, problem, ropes, args.len)
    best = min(evaluate.compare(last, "last", args.searched), key=lambda row: row["fitness"])["rope"]

    kept = next((name for name, it in ropes.items() if it == last[best]), "searched")
    ropes["searched"] = last[best]
    rows = evaluate.compare(ropes, "table", len(documents))
    say_table(args, rows, len(documents) - args.searched)
    model.rope = last[best]
    evaluate.save(model.rope, perplexity=rows[-1]["search"], kept=kept, comparison=rows)
    if rank() == 0:
        plot(ropes, args.len, [*evaluate.fitness.values()], args.out / "search.png")
        if args.export:
            args.export.mkdir(parents=True, exist_ok=True)
            (args.export / UNFINISHED).touch()
            save_config(model, args.export)
            for file in weight_files(model.path):  # the search changes none
                copy_file(file, args.export)
            (args.export / UNFINISHED).unlink()
    say(f"\nwrote {args.out / 'rope.json'} ({kept}), history.jsonl and search.png")


if __name__ == "__main__":
    run(main)

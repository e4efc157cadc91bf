"""The operators, Algorithm 1, screening, what is searched, pass keys. (Whole runs are in test_search_runs.py.)"""
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HEAD_DIM, VOCAB, WINDOW, make_rope, random_factors, random_tokens

import eval_passkey
import longrope
import search
from eval_passkey import (FILLER, NEEDLE, PIECES, QUESTION, ask_in_pieces, make_prompt, piece_size, pieces,
                          prompt_in_pieces, tokens_of)
from longrope import FORMULAS, Factors, UserError, load_tokenizer, plain, resolve_rope, su_factor
from search import (BASELINES, N_HAT, Space, crossover, first_stage, is_monotone, mutate, promising, recovery,
                    second_stage)

PAIRS, DRAWS = HEAD_DIM // 2, 1000


def good(factors, largest):
    """Do they keep the constraint, the grid and the bounds?"""
    return is_monotone(factors) and all(x == round(100 * x) / 100 and 1 <= x <= largest for x in factors)


def candidate(factors, n_hat=0, attention_factor=1.0):
    return Factors(tuple(factors), n_hat, attention_factor)


def space(largest, n_hats=N_HAT, attention=(1.0, 1.0), smallest=(1.0,) * PAIRS):
    return Space(smallest, largest, n_hats, attention)


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def test_the_constraint_is_that_no_factor_is_below_the_one_before():
    assert is_monotone((1.0,)) and is_monotone((1.0, 1.0, 1.01, 8.0))
    assert not is_monotone((1.0, 1.01, 1.0)) and not is_monotone((2.0, 1.0))


@pytest.mark.parametrize("least", [1.0, 9.5], ids=["free", "slow pairs bounded"])
def test_every_operator_keeps_the_constraint_the_grid_and_the_bounds_over_1000_draws(monkeypatch, least):
    rng, slow, made = np.random.default_rng(0), 20, []
    within = space(10.0, smallest=(1.0,) * slow + (least,) * (PAIRS - slow))
    parents = [candidate([*random_factors(1, 9.5)[:slow], *[high] * (PAIRS - slow)]) for high in (9.5, 9.75, 10.0)]
    parents += [candidate([10.0] * PAIRS), candidate([least] * PAIRS)]
    for n in range(DRAWS):
        monkeypatch.setattr(search, "MUTATION_PROB", (0.05, 0.3, 1.0)[n % 3])
        a, b = (parents[rng.integers(5)] if n % 10 == 0 else rng.choice(made[-1]) for _ in range(2))
        made.append([mutate(rng, a, within), crossover(rng, a, b)])  # children of children
        for factors in (child.rescale_factors for child in made[-1]):
            assert good(factors, 10.0) and len(factors) == PAIRS and min(factors[slow:]) >= least
    lowest = [[min(child.rescale_factors[i] for child in children) for children in zip(*made)] for i in (0, slow)]
    assert lowest[0] == [1.0] * 2 and (least == 1.0 or lowest[1] == [9.5] * 2)  # it is reached, by the slow pairs alone


def test_mutation_changes_3_genes_of_10_every_gene_alike_and_leaves_all_others():
    """If a redrawn gene pushed its neighbours, they would be found changed beside it more often than elsewhere."""
    rng, parent = np.random.default_rng(0), candidate(range(2, PAIRS + 2), 8)  # far apart: a redraw mostly shows
    children = [mutate(rng, parent, space(PAIRS + 5.0)) for _ in range(4 * DRAWS)]
    changed = np.array([np.not_equal(c.rescale_factors, parent.rescale_factors) for c in children])
    n_hat = np.array([c.n_hat != 8 for c in children])
    assert abs(changed.mean() - 0.30) < 0.01 and np.abs(changed.mean(axis=0) - 0.30).max() < 0.05
    assert abs(n_hat.mean() * 14 / 13 - 0.30) < 0.03  # one redraw of 14 gives the parent's own n_hat again
    for distance in (1, 2, 5):
        before, after = changed[:, :-distance], changed[:, distance:]
        assert abs(after[before].mean() - 0.30) < 0.02 and abs(before[after].mean() - 0.30) < 0.02
    assert abs(changed[n_hat].mean() - 0.30) < 0.02
    assert abs(changed.sum(axis=1).std() / math.sqrt(PAIRS * 0.3 * 0.7) - 1) < 0.1  # binomial: independent genes


def test_a_redrawn_gene_takes_every_multiple_of_a_hundredth_between_its_neighbours_alike():
    rng, factors = np.random.default_rng(0), (1.1, 1.15, 1.2)
    drawn = np.array([mutate(rng, candidate(factors), space(1.25)).rescale_factors for _ in range(20_000)])
    alone = (drawn != factors).sum(axis=1) == 1
    for i, (low, high) in enumerate(((1.0, 1.15), (1.1, 1.2), (1.15, 1.25))):
        values, counts = np.unique(drawn[alone & (drawn[:, i] != factors[i]), i], return_counts=True)
        expected = [x / 100 for x in range(round(100 * low), round(100 * high) + 1) if x / 100 != factors[i]]
        assert values.tolist() == expected and counts.max() < 1.5 * counts.min()
    n_hats = {mutate(rng, candidate(factors), space(1.25)).n_hat for _ in range(DRAWS)}
    assert n_hats == set(N_HAT) == {0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256}


def test_n_hat_and_the_attention_factor_are_redrawn_only_if_they_are_searched(monkeypatch):
    rng, parent = np.random.default_rng(0), candidate([1.5] * PAIRS, 0, 1.2345)
    drawn = [mutate(rng, parent, space(10.0, attention=(1.0, 1.33))).attention_factor for _ in range(4 * DRAWS)]
    assert abs(np.mean([x != 1.2345 for x in drawn]) - 0.30) < 0.03
    assert {x for x in drawn if x != 1.2345} == {x / 100 for x in range(100, 134)}
    monkeypatch.setattr(search, "MUTATION_PROB", 1.0)
    fixed = [mutate(rng, parent, space(10.0, (0,), (1.2345, 1.2345))) for _ in range(100)]
    assert {(c.n_hat, c.attention_factor) for c in fixed} == {(0, 1.2345)}


def test_every_gene_of_a_child_is_a_parents_at_that_place_and_the_order_is_kept_over_1000_draws():
    rng, mixed = np.random.default_rng(0), 0
    for n in range(DRAWS):
        a, b = (candidate(random_factors(2 * n + i, 10.0)) for i in range(2))
        child = crossover(rng, a, b)
        genes = zip(child.rescale_factors, a.rescale_factors, b.rescale_factors, strict=True)
        assert is_monotone(child.rescale_factors) and all(gene in (x, y) for gene, x, y in genes)
        mixed += child.rescale_factors not in (a.rescale_factors, b.rescale_factors)
    assert mixed > 0.9 * DRAWS and crossover(rng, a, a) == a


def test_both_parents_give_genes_each_about_half_where_any_mixture_keeps_the_order():
    rng = np.random.default_rng(0)
    a, b = candidate(1 + np.arange(PAIRS) / 10, 0, 1.1), candidate(1.05 + np.arange(PAIRS) / 10, 256, 1.2)
    children = [crossover(rng, a, b) for _ in range(DRAWS)]
    from_a = np.array([[*np.equal(c.rescale_factors, a.rescale_factors), c.n_hat == 0, c.attention_factor == 1.1]
                       for c in children])
    assert abs(from_a.mean() - 0.5) < 0.02 and np.abs(from_a.mean(axis=0) - 0.5).max() < 0.06
    assert {(c.n_hat, c.attention_factor) for c in children} == {*itertools.product((0, 256), (1.1, 1.2))}


def test_crossover_favours_neither_the_larger_factors_nor_the_smaller():
    """Walked in one direction only, a child of PI and plain RoPE would almost always be one of the two."""
    rng, ones, eights = np.random.default_rng(0), [1.0] * PAIRS, [8.0] * PAIRS
    low, high = np.linspace(1, 4, PAIRS).round(2), np.linspace(2, 8, PAIRS).round(2)
    for pairs in ([(ones, eights)] * 4 * DRAWS, [(eights, ones)] * 4 * DRAWS, [(low, high)] * DRAWS,
                  [(random_factors(n, 10.0), random_factors(n + DRAWS, 10.0)) for n in range(DRAWS)]):
        larger = [gene == max(x, y) for a, b in pairs for gene, x, y in
                  zip(crossover(rng, candidate(a), candidate(b)).rescale_factors, a, b) if x != y]
        assert 0.45 < np.mean(larger) < 0.55


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1, with a fitness that costs nothing


def arguments(*changes):
    """Of Algorithm 1 as it is printed."""
    args = search.parser().parse_args(["--screening", "1", "--population-size", "12", "--num-mutations", "6",
                                       "--num-crossovers", "5", "--num-parents", "7", "--iterations", "8",
                                       "--max-evals", "1000", *changes])
    args.turns = 1
    return args


TARGET, WEIGHTS = np.array(random_factors(77, 6.0)), np.sqrt(np.arange(2, PAIRS + 2))
STARTS = {candidate(np.round(FORMULAS[name](PAIRS, 10000.0, WINDOW, 8.0).rescale_factors, 2).tolist()): name
          for name in BASELINES}


def distance(c):
    """A fitness with one best point; irrational weights, so that no two candidates are equally good."""
    return float(np.abs(np.array(c.rescale_factors) - TARGET) @ WEIGHTS + c.n_hat * math.pi / 100)


def fake_search(seed=0, *changes, starts=STARTS, within=None, nll=distance):
    """The candidates, the best first, and (candidate, origin, iteration) of all evaluated, in their order."""
    calls = []

    def evaluate(population, iteration):
        calls.extend((c, origin, iteration) for c, origin in population.items())
        return {c: nll(c) for c in population}
    args = arguments(*changes)
    ranking = search.search(args, np.random.default_rng(seed), starts, within or space(8.13), evaluate)
    assert args.screening > 1 or ranking == sorted((c for c, *_ in calls), key=nll)
    return ranking, calls


def test_the_search_evaluates_pi_ntk_yarn_and_their_mutants_then_mutants_and_children_every_iteration():
    calls = fake_search()[1]
    by_iteration = [[origin for _, origin, t in calls if t == iteration] for iteration in range(9)]
    assert by_iteration == [["pi", "ntk", "yarn-su"] + ["mutation"] * 9] + [["mutation"] * 6 + ["crossover"] * 5] * 8
    assert [t for *_, t in calls] == sorted(t for *_, t in calls) and [c for c, *_ in calls[:3]] == [*STARTS]
    for c, *_ in calls[3:12]:  # each descends from one of the three
        assert max(np.equal(c.rescale_factors, base.rescale_factors).sum() for base in STARTS) >= PAIRS * 0.4
    for c, *_ in calls:
        assert good(c.rescale_factors, 8.13) and c.n_hat in N_HAT


@pytest.mark.parametrize("screening", ["1", "4"])
@pytest.mark.parametrize("probability", [0.3, 0.01])  # with 0.01 three mutants of four are copies of their parents
def test_nothing_is_evaluated_twice_and_the_same_seed_is_the_same_search(monkeypatch, screening, probability):
    monkeypatch.setattr(search, "MUTATION_PROB", probability)
    one, two, other = (fake_search(seed, "--screening", screening) for seed in (5, 5, 6))
    assert len(one[1]) == 12 + 8 * 11 == len({c for c, *_ in one[1]}) and one == two != other


@pytest.mark.parametrize("screening", ["1", "3"])
def test_a_space_that_is_used_up_ends_the_search(screening):
    """Two pairs between 1 and 1.01 and one n_hat: three points."""
    starts = {candidate((1.0, 1.0)): "pi", candidate((1.01, 1.01)): "ntk"}
    ranking, calls = fake_search(0, "--screening", screening, starts=starts, nll=lambda c: sum(c.rescale_factors),
                                 within=space(1.01, (0,), smallest=(1.0, 1.0)))
    found = [c.rescale_factors for c in ranking]
    assert {*found} == {(1.0, 1.0), (1.0, 1.01), (1.01, 1.01)} and len(found) == len(calls) == 3


def test_parents_are_the_top_k_of_all_that_was_evaluated_and_all_are_returned_the_best_first(monkeypatch):
    used, evaluated, ranks, older, last = [], [], set(), [], []
    monkeypatch.setattr(search, "mutate", lambda rng, p, space: [used.append(p), mutate(rng, p, space)][1])
    monkeypatch.setattr(search, "crossover", lambda rng, a, b: [used.extend((a, b)), crossover(rng, a, b)][1])

    def evaluate(population, iteration):
        if iteration:
            top = sorted(evaluated, key=distance)[:7]
            assert set(used) <= set(top)
            ranks.update(map(top.index, used))
            older.append(not set(top) <= set(last))
        evaluated.extend(population)
        used[:], last[:] = [], population
        return {c: distance(c) for c in population}

    ranking = search.search(arguments(), np.random.default_rng(0), STARTS, space(10.0), evaluate)
    assert ranking == sorted(evaluated, key=distance)
    assert ranks == set(range(7)) and any(older)  # all of the top k have offspring, and stay while nothing better comes


def test_max_evals_and_iterations_end_the_search_early():
    everything = fake_search()[1]
    for limit in (1, 5, 12, 20, 23, 29):
        assert fake_search(0, "--max-evals", str(limit))[1] == everything[:limit]
    for iterations in (0, 3):
        assert fake_search(0, "--iterations", str(iterations))[1] == everything[:12 + 11 * iterations]


# ---------------------------------------------------------------------------------------------------------------------
# Screening


def screened(count=150):
    """Mutants of NTK, twice `count` of them, and the NLL of the first half."""
    rng, ntk = np.random.default_rng(0), [*STARTS][1]
    made = search.unseen(lambda: mutate(rng, ntk, space(10.0)), 2 * count, set())
    return made[count:], {c: distance(c) + 20.0 for c in made[:count]}


def test_screening_keeps_those_that_turn_out_to_be_good():
    children, nll = screened()
    kept = promising(nll, 1, children)
    assert sorted(map(str, kept)) == sorted(map(str, children))
    for few in (1, 2, 3):  # with little to go by there are as many
        assert len({*promising(dict([*nll.items()][:few]), 1, children)}) == len(children)
    place = sorted(children, key=distance).index
    assert np.mean([place(c) for c in kept[:15]]) < 0.15 * len(children)  # by chance it is half
    known = promising(nll, 1)
    assert {*known} == {*nll} and np.mean([sorted(nll, key=nll.get).index(c) for c in known[:15]]) < 0.15 * len(nll)


def test_screening_hopes_for_much_where_nothing_is_known():
    """Doubt turns the order of what lies between good candidates and of what is far from all."""
    near, far = candidate([1.51] * PAIRS), candidate([10.0] * PAIRS)
    fitness = {candidate([1.5] * i + [1.51] * (PAIRS - i)): 1.0 + i / 100 for i in range(1, PAIRS)}
    assert promising(fitness, 1, [far, near]) == [near, far] != promising(fitness, 1, [near, far], 5)


def test_the_search_doubts_only_once_it_knows_some_candidates(monkeypatch):
    asked = []
    monkeypatch.setattr(search, "promising", lambda fitness, turns, candidates=None, doubt=0: [
        asked.append((candidates is None, len(fitness) >= 50, doubt)), promising(fitness, turns, candidates, doubt)][1])
    fake_search(0, "--screening", "2")
    assert {*asked} == {(True, False, 0), (True, True, 0), (False, False, 0), (False, True, 2)}


def test_screening_averages_over_neighbours():
    """What is best by luck, among neighbours that are worse, is not the parent of all."""
    rng, ntk = np.random.default_rng(0), [*STARTS][1]
    made = search.unseen(lambda: mutate(rng, ntk, space(10.0)), 190, set())
    noisy = {c: distance(c) + rng.normal() * np.std([*map(distance, made)]) for c in made}
    best, true = sorted(noisy, key=noisy.get)[:20], sorted(made, key=distance)
    assert np.mean([true.index(c) for c in promising(noisy, 1)[:20]]) < 0.7 * np.mean([true.index(c) for c in best])


def test_screening_takes_no_documents_luck_for_a_candidates_worth():
    """Every fifth candidate is on a document on which all gain more: only where that is known is it told apart."""
    nll = screened(200)[1]
    spread = np.std([*nll.values()])
    lucky = {c: x - 2 * spread * (i % 5 == 3) for i, (c, x) in enumerate(nll.items())}
    place = {c: i for i, c in enumerate(sorted(nll, key=nll.get))}
    told, taken = (np.mean([place[c] for c in promising(lucky, turns)[:20]]) for turns in (5, 1))
    assert told < 0.7 * taken


def test_screening_sees_n_hat_and_is_not_misled_by_those_that_are_far_off(monkeypatch):
    monkeypatch.setattr(search, "MUTATION_PROB", 0.02)
    rng, ntk = np.random.default_rng(1), [*STARTS][1]
    made = search.unseen(lambda: replace(mutate(rng, ntk, space(10.0)), n_hat=int(rng.choice(N_HAT))), 500, set())
    nll = {c: 10.0 - math.log2(1 + c.n_hat) for c in made[:250]}
    nll |= dict.fromkeys(made[250:320], 1e6)  # and these would drown the others, were it not for the ranks
    assert {c.n_hat for c in promising(nll, 1, made[320:])[:10]} <= {128, 256}


def test_screening_runs_in_one_thread(monkeypatch):
    (children, nll), inside, cholesky, threads = screened(), [], torch.linalg.cholesky, torch.get_num_threads()
    monkeypatch.setattr(torch.linalg, "cholesky", lambda x: [inside.append(torch.get_num_threads()), cholesky(x)][1])
    try:
        torch.set_num_threads(3)
        promising(nll, 1, children)
        assert torch.get_num_threads() == 3 and set(inside) == {1}
    finally:
        torch.set_num_threads(threads)


def test_the_search_comes_nearer_to_the_target_than_pi_ntk_and_yarn_and_sooner_with_screening():
    def best(seed, *changes):
        return distance(fake_search(seed, *changes)[0][0])
    for seed in range(3):
        assert best(seed, "--screening", "64") < 0.8 * best(seed)
        assert best(seed, "--iterations", "40") < 0.5 * min(map(distance, STARTS))


# ---------------------------------------------------------------------------------------------------------------------
# Bounds, first candidates, and where a candidate goes

ROPE = make_rope([1.0] * PAIRS, 1.0, attention_factor=1.0)  # of a model that was never extended
SLOW = WINDOW / (2 * math.pi * 10000.0 ** (np.arange(PAIRS) / PAIRS)) < 1  # (PAIRS,), no full turn within the window


def extended(scale, **changes):
    return replace(make_rope(random_factors(2, scale), scale), **changes)


def filled_in(device, *arguments, window=131072):
    args = search.parser().parse_args(arguments)
    search.fill_in(args, SimpleNamespace(window=window, unembedding=SimpleNamespace(device=torch.device(device))),
                   SimpleNamespace(target_length=4 * window))
    return args


def begun(problem, length, *changes, start=None):
    """({name: first candidate}, Space)"""
    args = filled_in("cpu", "--len", str(length), "--fitness", "ppl", *changes, window=WINDOW)
    space, starts = search.first_candidates(args, problem, start)
    for c in starts:
        assert good(c.rescale_factors, space.largest) and c.n_hat in space.n_hats
        assert all(map(float.__le__, space.smallest, c.rescale_factors))
        assert space.attention[0] <= c.attention_factor <= space.attention[1]
    return {name: c for c, name in starts.items()}, space


@pytest.mark.parametrize("n_hat, attention", [("0", "su"), ("4", "yarn"), ("16", "none"),
                                              ("search", "search")])
@pytest.mark.parametrize("kind, length, scale, largest", [
    (first_stage, 512, 1, 10.0), (first_stage, 160, 1, 3.12), (second_stage, 512, 4, 2.5), (recovery, 64, 4, 5.0),
    (recovery, 64, 8, 6.25), (recovery, 64, 5, 6.25), (recovery, 100, 2, 2.5), (recovery, 448, 8, 8.75)])
def test_lambda_goes_to_a_quarter_above_s_and_first_candidates_lie_within_all_bounds(
        kind, length, scale, largest, n_hat, attention):
    """Of the short set to 1.25 times the lesser of s and 5, or as far as it goes beyond the window."""
    far = candidate(np.linspace(0.5, 3 * largest, PAIRS), 250, 2.5)
    rope = extended(float(scale), long=candidate(np.linspace(1, 3, PAIRS), 8, 1.9))
    starts, space = begun(kind(rope, length), length, "--n-hat", n_hat, "--attention-factor", attention, start=far)
    assert space.largest == largest and set(space.smallest) == {1.0}
    assert space.n_hats == (N_HAT if n_hat == "search" else (int(n_hat),))
    beyond = scale if kind is recovery else length / WINDOW
    su = su_factor(beyond, WINDOW)
    fixed = {"su": su, "yarn": 0.1 * math.log(beyond) + 1, "none": 1.0}.get(attention)
    assert space.attention == ((fixed, fixed) if fixed else (1.0, round(1.25 * su, 2)))
    begins = su_factor(length / WINDOW, WINDOW) if length > WINDOW else su
    begins = begins if kind is first_stage else space.attention[1]  # the rope's own is 1.9
    assert starts["pi"].attention_factor == (fixed or round(begins, 2))
    assert [*starts] == ["start", "yarn-su", "ntk", "pi", "none", *["long"] * (kind == recovery)]  # YaRN's two are one
    if n_hat == attention == "search":
        assert (starts["start"].n_hat, starts["start"].attention_factor) == (256, round(1.25 * su, 2))
        assert starts["yarn-su"].n_hat == (0 if kind is first_stage else 8)  # the model's own
    own = replace(rope.long, rescale_factors=(1.0,) * PAIRS) if kind is second_stage else plain(PAIRS)
    assert starts["none"] == replace(own, n_hat=own.n_hat if n_hat == "search" else int(n_hat),
                                     attention_factor=float(np.clip(own.attention_factor, *space.attention)))


def test_slow_least_bounds_the_pairs_that_make_no_full_turn_within_the_window():
    assert 0 < SLOW.sum() < PAIRS
    starts, space = begun(first_stage(ROPE, 256), 256, "--slow-least", "1.1")
    assert space.smallest == tuple(np.where(SLOW, 4.4, 1.0)) and starts["pi"].rescale_factors[-1] == 4.4
    rope = extended(4.0, long=plain(PAIRS))  # pairs that turn within 4 windows, not within one, are fast
    _, space = begun(second_stage(rope, 8 * WINDOW), 8 * WINDOW, "--slow-least", "1.25")
    assert space.smallest == tuple(np.where(4 * WINDOW / (2 * math.pi) < 10000.0 ** (np.arange(PAIRS) / PAIRS), 2.5, 1))
    for length, scale, least in ((2 * WINDOW, 4.0, 2.38), (7 * WINDOW, 16.0, 8.33)):  # of how far beyond, not of s
        _, space = begun(recovery(extended(scale), length), length, "--slow-least", "1.19")
        assert space.smallest == tuple(np.where(SLOW, least, 1.0))
    starts, space = begun(first_stage(ROPE, 256), 256, "--fitness", "keys")
    assert space.smallest == starts["none"].rescale_factors == tuple(np.where(SLOW, 4.76, 1.0))
    longer = FORMULAS["yarn"](PAIRS, 10000.0, WINDOW, 4 * 1.19)  # its slow pairs are within the bound
    assert np.abs(np.subtract(starts["yarn-su"].rescale_factors, longer.rescale_factors)).max() <= 0.0051
    assert starts["ntk"].attention_factor == round(su_factor(4, WINDOW), 2)
    assert set(begun(recovery(extended(4.0), 128), 128, "--fitness", "keys", "--short")[1].smallest) == {1.0}


@pytest.mark.parametrize("problem, length, least", [
    (recovery(extended(4.0), WINDOW), WINDOW, "1.19"), (recovery(extended(4.0), 32), 32, "1.19"),
    (first_stage(ROPE, 256), 256, "0.2"), (first_stage(replace(ROPE, rope_theta=10.0), 256), 256, "1.1")])
def test_a_slow_least_that_bounds_nothing_is_said_where_it_is_given(problem, length, least):
    with pytest.raises(UserError, match="bounds nothing"):
        begun(problem, length, "--slow-least", least)
    begun(problem, length, "--fitness", "keys")
    assert set(begun(problem, length, "--fitness", "keys", "--slow-least", "0")[1].smallest) == {1.0}


def test_first_candidates_are_relative_to_what_the_model_was_trained_with_or_fine_tuned_to():
    trained = candidate([1.0] * 16 + [8.0] * 16)
    long = trained.on(candidate([2.0] * PAIRS))
    rope, given = replace(extended(16.0), trained=trained, long=long), trained.on(candidate([1.5] * PAIRS))
    for problem in first_stage(rope, 256), recovery(rope, 128), second_stage(replace(rope, long=trained), 2048):
        assert set(begun(problem, 256, start=given)[0]["start"].rescale_factors) == {1.5}
    assert set(begun(recovery(rope, 128), 128)[0]["long"].rescale_factors) == {2.0}
    _, space = begun(recovery(rope, 128), 128, "--slow-least", "1.19")
    assert space.smallest[16:] == (2.38,) * 16  # times 8


def test_a_given_set_that_is_not_in_order_is_sorted_and_that_is_said_and_equal_ones_are_one(capsys):
    falling = random_factors(3, 4)[::-1]
    starts, _ = begun(first_stage(ROPE, 256), 256, start=candidate(falling))
    assert starts["start"].rescale_factors == tuple(sorted(falling)) and "sorted" in capsys.readouterr().out
    starts, _ = begun(recovery(extended(4.0, long=candidate(falling)), 64), 64)
    assert starts["long"].rescale_factors == tuple(sorted(falling))
    begun(first_stage(ROPE, 256), 256, start=candidate(sorted(falling)))
    assert not capsys.readouterr().out
    starts, _ = begun(recovery(extended(4.0, long=candidate([4.0] * PAIRS)), 64), 64, "--attention-factor", "su")
    assert [*starts] == ["yarn-su", "ntk", "pi", "none"]  # PI's is the long set


def test_a_candidate_is_multiplied_onto_what_it_extends_and_the_other_set_stays():
    found, trained = candidate(random_factors(9, 2), 64, 1.5), candidate(random_factors(8, 3))
    rope = extended(4.0, trained=trained, short=candidate(random_factors(3, 2), 2, 1.07), short_max_length=100)
    first, second, short = (kind(rope, length).put(found, length) for kind, length in (
        (first_stage, 512), (second_stage, 512), (recovery, 128)))
    product = tuple(a * b for a, b in zip(rope.long.rescale_factors, found.rescale_factors))
    assert second == replace(rope, long=Factors(product, 64, 1.5), scale=8.0)
    one = replace(rope, short=None, short_max_length=0)  # whose long set serves all lengths, and goes on to
    assert second_stage(one, 512).put(found, 512) == replace(second, short=rope.long, short_max_length=WINDOW)
    never = replace(rope, short_max_length=0)  # nor does this one's short set serve any
    assert second_stage(never, 512).put(found, 512) == replace(second, short_max_length=0)
    product = tuple(a * b for a, b in zip(trained.rescale_factors, found.rescale_factors))
    assert first == replace(rope, long=Factors(product, 64, 1.5), scale=8.0, short=trained, short_max_length=WINDOW)
    assert short == replace(rope, short=Factors(product, 64, 1.5), short_max_length=128)
    assert recovery(rope, 32).put(found, 32).short_max_length == WINDOW


def test_the_formulas_are_compared_with_their_own_attention_factors_and_plain_rope_as_an_export_has_it():
    def compared(kind, rope, length, *changes):
        args = search.parser().parse_args(["--len", str(length), *changes])
        return {name: r.at(length) for name, r in search.ropes_to_compare(args, kind(rope, length)).items()}
    rope, attention = extended(4.0), su_factor(4, WINDOW)
    first, second = compared(first_stage, rope, 512), compared(second_stage, rope, 512)
    yarn = FORMULAS["yarn"](PAIRS, 10000.0, WINDOW, 8)
    assert first["yarn-su"] == replace(yarn, attention_factor=su_factor(8, WINDOW))
    assert second["yarn-su"].attention_factor == su_factor(8, WINDOW)
    assert first["none"] == rope.trained and first["yarn"] == yarn and first["pi"] == candidate([8.0] * PAIRS)
    twice = FORMULAS["yarn"](PAIRS, 10000.0, WINDOW, 2).on(rope.long).rescale_factors  # by turns within WINDOW
    assert second["none"] == rope.long and second["yarn"] == replace(yarn, rescale_factors=twice)
    assert second["pi"] == replace(candidate([2.0] * PAIRS).on(rope.long), attention_factor=attention)
    for changes, factor in (((), 1.0), (("--export", "out"), attention)):  # transformers has one for both sets
        assert compared(recovery, rope, 64, *changes) == {"none": replace(plain(PAIRS), attention_factor=factor),
                                                          "long": rope.long}


# ---------------------------------------------------------------------------------------------------------------------
# Pass keys as fitness, and defaults


@pytest.mark.parametrize("depth", [0, 0.21, 0.5, 1])
def test_pieces_hold_the_start_the_key_line_and_the_question_and_are_as_many_for_every_long_prompt(bundled, depth):
    tokenizer = load_tokenizer(bundled.path)
    for length in (200, 1024, 1100, 5000, 65536):
        tokens, _, middle = make_prompt(tokenizer, length, depth, "41975")
        kept, size = pieces(length, middle, 27).tolist(), min(piece_size(length), length)
        assert kept == sorted({*kept} & {*range(length)}) and len(kept) <= PIECES * size
        assert {*range(2 * size), *range(length - size, length), middle} <= {*kept} or length < 2 * size
        assert (len(kept) == length) is (length == 200) and np.diff(kept).max() < length / 3  # evenly
        text = tokenizer.decode([tokens[place] for place in kept])
        assert NEEDLE.format(key="41975") in text and text.endswith(f"{QUESTION} 41975")
    assert len(pieces(2097152, round(depth * 2097152), 27)) == len(kept)


@pytest.mark.parametrize("depth", [0, 0.3, 0.6, 1])
def test_what_is_left_out_of_a_prompt_has_a_source_of_its_own_token_whatever_the_tokenizer(tiny, depth):
    for length in (700, 1024, 5000):  # the filler takes 64 tokens, with Llama's 27
        tokens, kept, source, _ = prompt_in_pieces(load_tokenizer(tiny), {
            "length": length, "depth": depth, "key": "41975"})
        assert (tokens[kept[source]] == tokens).all() and len(kept) <= PIECES * 200


def test_ask_in_pieces_asks_of_all_places_what_the_model_says_of_the_whole_prompt(tiny_model):
    rope, prompts, expected = make_rope(random_factors(1, 4), 4.0, 8), [], []
    tiny_model.rope, every = rope, torch.arange(300)
    for wrong in ((), (-1,), (-3,), (-3, -2, -1)):  # of the key's three tokens; the others are what is expected most
        tokens, loss = random_tokens(300, seed=len(prompts))[0], 0.0
        for place in range(-3, 0):
            logits = tiny_model(tokens[None])[0, place - 1]
            tokens[place] = (logits.argmax() + (place in wrong)) % VOCAB
            loss -= logits.log_softmax(-1)[tokens[place]].item()
        prompts.append((tokens, every, every, 3))
        expected.append(loss)
    tiny_model.rope, tiny_model.context = None, "as before"
    for chosen in (slice(4), slice(1), slice(1, 4)):
        nll, found = ask_in_pieces(tiny_model, rope, prompts[chosen])
        assert nll == pytest.approx(np.mean(expected[chosen]), abs=1e-3) and found == (chosen.start is None)
        assert tiny_model.context == "as before"


@pytest.mark.parametrize("name, n_hat", [("yarn", 0), ("ntk", 0), ("yarn", 64)])
def test_pieces_say_of_a_key_what_the_whole_prompt_says(bundled, name, n_hat):
    model, tokenizer = bundled.model, load_tokenizer(bundled.path)
    rope = resolve_rope(name, model, 4096)
    rope = replace(rope, long=replace(rope.long, n_hat=n_hat))
    for depth in (0, 0.4, 0.9):
        prompt = prompt_in_pieces(tokenizer, {"length": 4096, "depth": depth, "key": "41975"})
        tokens, kept, source, count = prompt
        assert len(kept) < 4096 / 3 and (source[kept] == torch.arange(len(kept))).all()
        assert (tokens[kept[source]] == tokens).all()
        every = torch.arange(4096)
        nearest = abs(kept[:, None] - every).min(0).values
        assert (abs(kept[source] - every) < nearest + len(tokens_of(tokenizer, FILLER))).all()
        some, whole = (ask_in_pieces(model, rope, [it])[0] for it in (prompt, (tokens, every, every, count)))
        assert some == pytest.approx(whole, rel=0.08)


def test_a_key_is_asked_of_some_heads_at_a_time_where_a_kernel_cannot_count_all_keys(bundled, monkeypatch):
    prompt = prompt_in_pieces(load_tokenizer(bundled.path), {"length": 4096, "depth": 0.4, "key": "41975"})
    rope, heads = resolve_rope("yarn", bundled.model, 4096), []

    def counted(q, k, v, plain=eval_passkey.attention):
        heads.append((q.shape[2], k.shape[2]))
        return plain(q, k, v)
    monkeypatch.setattr(eval_passkey, "attention", counted)
    all_at_once = ask_in_pieces(bundled.model, rope, [prompt])[0]
    monkeypatch.setattr(longrope, "AT_ONCE", 4096 * 64 * 2 + 1)  # two query heads share a key head
    assert {*heads} == {(4, 2)} and ask_in_pieces(bundled.model, rope, [prompt])[0] == pytest.approx(all_at_once, 1e-3)
    assert {*heads} == {(4, 2), (2, 1)}


def test_the_defaults_are_few_candidates_and_on_a_cpu_fewer():
    def sizes(*given):
        args = filled_in(*given)
        return [getattr(args, key) for key in search.SIZES], args.samples, args.last
    assert sizes("cuda") == ([8, 5, 3, 8, 36], 1, 12) and search.MUTATION_PROB == 0.3
    assert sizes("cpu") == ([5, 5, 3, 8, 2], 1, 3)
    given = "--population-size", "9", "--iterations", "0", "--samples", "7"
    assert sizes("cuda", *given) == ([9, 5, 3, 8, 0], 7, 12)
    for given, bound in (("", 1.19), ("--fitness ppl", 0), ("--short", 0), ("--slow-least 0", 0)):
        assert search.bound_of(filled_in("cpu", *given.split())) == bound
    assert (filled_in("cpu").fitness, filled_in("cpu", "--short").fitness) == (None, "keys")
    assert [filled_in("cpu", *given.split(), window=100).len for given in (
        "", "--init found", "--init found --short")] == [800, 3200, 100]


def test_the_length_is_8_windows_or_with_short_the_window_and_the_attention_factor_is_searched():
    def given(*changes):
        args = filled_in("cpu", *changes, window=64)
        return args.len, args.out, args.attention_factor
    assert given() == (512, Path("out/search-512"), "search")
    assert given("--short") == (64, Path("out/search-64-short"), "search")
    assert given("--short", "--export", "hf")[2] == "the long set's"  # an exported directory has one for both
    assert given("--short", "--attention-factor", "yarn")[2] == "yarn"

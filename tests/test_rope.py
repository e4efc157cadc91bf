"""Ropes against transformers' rope functions, against eq. 3 of the paper, and against themselves; rope.json."""
import json
import math
from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WINDOW, assert_same_logits, complaint, make_rope, random_factors, save_tiny
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import eval_ppl
from longrope import (FORMULAS, Factors, Rope, UserError, inv_freq_of, load_model, load_rope, plain, resolve_ropes,
                      rope_from_dict, rope_to_dict, rotate, save_model, su_factor, warn, write_json,
                      yarn_factor)

METHODS = {"none": "default", "pi": "linear", "ntk": "dynamic", "yarn": "yarn", "longrope": "longrope"}
THETA, PAIRS, LLAMA3 = 10000.0, 32, {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": WINDOW // 4}


def one_set(rescale_factors, n_hat=0, attention_factor=1.0, window=WINDOW):
    """A Rope with the same factors at all lengths."""
    factors = Factors(tuple(rescale_factors), n_hat, attention_factor)
    return Rope(THETA, window, plain(len(rescale_factors)), factors)


PLAIN = one_set([1.0] * PAIRS)


def same_table(a, b, length):
    return all(torch.equal(x, y) for x, y in zip(a.table(length), b.table(length)))


@pytest.mark.parametrize("head_dim, theta, window, scale", [
    (64, 10000.0, 128, 8.0), (128, 500000.0, 4096, 4.0), (64, 10000.0, 1024, 32.0), (96, 10000.0, 2048, 1.5)])
@pytest.mark.parametrize("name", METHODS)
def test_frequencies_tables_and_attention_factors_are_those_of_transformers(name, head_dim, theta, window, scale):
    hf = {"rope_type": METHODS[name], "rope_theta": theta, "factor": scale}
    if name == "ntk":
        hf["factor"] = 1.0  # dynamic NTK of transformers: s = factor * length / window - (factor - 1)
    if name == "longrope":
        rope = make_rope(random_factors(head_dim, scale, head_dim // 2), scale, rope_theta=theta, window=window)
        hf |= {"long_factor": list(rope.long.rescale_factors), "short_factor": [1.0] * (head_dim // 2)}
    else:
        factors = FORMULAS[name](head_dim // 2, theta, window, scale)
        rope = Rope(theta, window, plain(head_dim // 2), factors, scale)
    if name in ("yarn", "longrope"):
        hf["original_max_position_embeddings"] = window
    config, length = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=hf,
                                 max_position_embeddings=window), round(window * scale)
    formula = ROPE_INIT_FUNCTIONS.get(METHODS[name], LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, attention_factor = formula(config, seq_len=length)
    np.testing.assert_allclose(inv_freq_of(rope.long.rescale_factors, theta), inv_freq.double().numpy(), rtol=1e-6)
    assert rope.long.attention_factor == pytest.approx(attention_factor, rel=1e-12) and rope.target_length == length
    positions = torch.tensor([*range(1024), length - 1])[None]  # the last one tells transformers the total length
    for ours, theirs in zip(rope.table(length), LlamaRotaryEmbedding(config)(torch.zeros(1), positions)):
        assert ours.dtype == torch.float32 and ours.shape == (length, head_dim // 2)
        for half in theirs[0, :1024].chunk(2, dim=-1):  # transformers' angles are rounded to float32, of 1024 radians
            assert_close(ours[:1024], half, atol=1e-4 * attention_factor, rtol=0)


def test_the_formulas_differ_from_each_other_and_have_the_factors_of_their_papers():
    none, pi, ntk, yarn, yarn_su = (formula(PAIRS, THETA, 1024, 8.0).rescale_factors for formula in FORMULAS.values())
    assert set(none) == {1.0} and set(pi) == {8.0}
    assert yarn_su == yarn and FORMULAS["yarn-su"](PAIRS, THETA, 1024, 8.0).attention_factor == su_factor(8.0, 1024)
    assert ntk[0] == yarn[0] == 1.0 and ntk[-1] == yarn[-1] == pytest.approx(8.0)
    assert list(ntk) == sorted(set(ntk)) and list(yarn) == sorted(yarn)
    assert max(abs(a - b) for a, b in zip(ntk, yarn)) > 1
    halved = one_set(FORMULAS["pi"](PAIRS, THETA, 64, 2.0).rescale_factors)  # interpolation: plain RoPE read at n / s
    assert all(torch.equal(x[::2], y[:256]) for x, y in zip(halved.table(512), PLAIN.table(512)))


def test_the_table_is_equation_3():
    factors, n_hat, attention_factor = random_factors(3, 4.0, 8), 5, 1.2
    cos, sin = one_set(factors, n_hat, attention_factor).table(40)
    for n in (0, 1, 4, 5, 6, 39):
        for i in range(8):
            angle = n / ((1 if n < n_hat else factors[i]) * THETA ** (2 * i / 16))
            assert cos[n, i].item() == pytest.approx(attention_factor * math.cos(angle), abs=2e-7)
            assert sin[n, i].item() == pytest.approx(attention_factor * math.sin(angle), abs=2e-7)


def test_rotate_turns_the_pair_i_and_i_plus_half_like_a_complex_number():
    x = torch.randn(2, 10, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = one_set(random_factors(0, 2, 8)).table(10)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.complex(cos, sin)[:, None, :]
    assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("n_hat", [0, 1, 4, 64, 511, 512, 100_000])
def test_the_first_n_hat_tokens_are_as_trained_and_the_others_as_without_n_hat(n_hat):
    factors, trained = random_factors(0, 8), Factors(random_factors(5, 8))  # not plain, as in Llama 3.1
    tables = (replace(one_set(factors, n_hat), trained=trained).table(512), replace(PLAIN, long=trained).table(512),
              one_set(factors).table(512))
    for ours, unscaled, rescaled in zip(*tables):
        assert torch.equal(ours[:n_hat], unscaled[:n_hat]) and torch.equal(ours[n_hat:], rescaled[n_hat:])
    assert not same_table(one_set(factors), PLAIN, 512)


def test_q_dot_k_depends_on_the_distance_only_when_n_hat_is_0():
    def scores(rope, distance):
        """q . k of one query and one key vector for every pair of positions `distance` apart."""
        q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).expand(2, 1, 512, 1, 64)
        cos, sin = rope.table(512)
        return (rotate(q, cos, sin)[0, distance:, 0] * rotate(k, cos, sin)[0, :512 - distance, 0]).sum(-1)
    factors = random_factors(0, 8)
    for distance in (0, 1, 17, 100):
        for rope in (one_set(factors), one_set([1.0] * PAIRS, 16)):
            assert scores(rope, distance).max() - scores(rope, distance).min() < 1e-3
    across = scores(one_set(factors, 16), 17)  # plain keys, rescaled queries at first
    assert across.max() - across.min() > 1
    assert across[16:].max() - across[16:].min() < 1e-3


def test_angles_at_2_million_positions_are_exact_to_float32_where_float32_angles_are_not():
    length, factors, last = 2 * 1024 * 1024, (1.07, 1.15, 3.31, 8.0), 64
    cos, sin = one_set(factors).table(length)
    getcontext().prec = 50
    tau = 2 * Decimal("3.14159265358979323846264338327950288419716939937511")
    inv_freq = [1 / (Decimal(f) * Decimal(THETA) ** (Decimal(i) / 4)) for i, f in enumerate(factors)]
    angles = np.array([[float(n * w % tau) for w in inv_freq] for n in range(length - last, length)])
    error = max(np.abs(cos[-last:].numpy() - np.cos(angles)).max(), np.abs(sin[-last:].numpy() - np.sin(angles)).max())
    assert error < 3.1e-8  # half of the last bit of a float32 just below 1 is 2.98e-8
    positions = torch.arange(length - last, length, dtype=torch.float32)
    in_float32 = (positions[:, None] * torch.tensor([float(w) for w in inv_freq], dtype=torch.float32)).cos()
    assert np.abs(in_float32.numpy() - np.cos(angles)).max() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The short or the long set, what a model was trained with


def test_the_total_length_chooses_the_short_or_the_long_set_for_the_first_positions_too():
    short, long = Factors(random_factors(5, 2), 1, 1.1), Factors(random_factors(0, 4), 2, 1.3)
    for reach in (WINDOW, 2 * WINDOW):
        rope = Rope(THETA, WINDOW, plain(PAIRS), long, 4.0, short, reach)
        assert [rope.at(n) for n in (1, reach, reach + 1, 256)] == [short, short, long, long]
        assert same_table(rope, replace(PLAIN, long=short), reach)
        assert same_table(rope, replace(PLAIN, long=long), reach + 1)
        for ours, theirs in zip(rope.table(9, total_length=reach + 1), replace(PLAIN, long=long).table(9)):
            assert torch.equal(ours, theirs)
    assert one_set(long.rescale_factors).at(1).rescale_factors == long.rescale_factors  # a set alone serves them all


def test_factors_on_a_base_multiply_and_all_else_stays_theirs():
    assert Factors((1.5, 2.0), 3, 1.2).on(Factors((2.0, 0.5), 7, 9.0)) == Factors((3.0, 1.0), 3, 1.2)


def test_the_attention_factor_is_that_of_the_released_code():
    assert su_factor(8, 1024) == pytest.approx(math.sqrt(1 + math.log(8) / math.log(1024)), rel=1e-12)
    assert su_factor(1, 1024) == su_factor(0.5, 1024) == yarn_factor(0.5) == 1.0


def test_an_extension_is_on_top_of_the_rope_the_model_was_trained_with_and_rope_json_remembers_it(tmp_path, capsys):
    """As of Llama 3.1: trained with factors that are not 1, extended, saved, and read again."""
    hf = save_tiny(tmp_path / "in", rope_parameters=LLAMA3)
    before = load_model(tmp_path / "in", device="cpu")
    trained = before.rope.trained
    assert before.rope.long == trained and max(trained.rescale_factors) > 1.0
    long = Factors(random_factors(1, 4), 0, 1.2)
    before.rope = replace(before.rope, long=long.on(trained), scale=4.0, short=trained, short_max_length=WINDOW)
    save_model(before, tmp_path / "out", torch.float32)
    assert load_rope(tmp_path / "out" / "rope.json") == before.rope
    capsys.readouterr()
    after = load_model(tmp_path / "out", "none", device="cpu")
    assert after.config.rope.trained == after.rope.long == trained
    assert_same_logits(after, hf, WINDOW)  # within the window it is what it was
    for name, length in (("none", None), ("pi", 3 * WINDOW), ("ntk", 3 * WINDOW), ("yarn:8", None)):
        ropes = [load_model(tmp_path / d, name, length, "meta").rope for d in ("in", "out")]
        alone = FORMULAS[name[:4]](PAIRS, THETA, WINDOW, ropes[0].scale)
        assert ropes[0] == ropes[1] and ropes[0].long == alone.on(trained)
    assert capsys.readouterr().err == ""
    (tmp_path / "out" / "rope.json").unlink()
    assert load_model(tmp_path / "out", "none", device="meta").rope.long == plain(PAIRS)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{tmp_path / 'out'}: no rope.json" in said[0] and "plain RoPE" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# rope.json, names


def test_rope_json_gives_back_the_same_rope_to_the_last_bit(tmp_path):
    factors = tuple((np.random.default_rng(0).random(32) + 1).tolist())  # all digits of a float64
    trained, short = Factors(random_factors(4, 3)), Factors(random_factors(5, 2), 1, 1.1)
    for rope in (make_rope(factors, 8.0, 12), make_rope(factors, 7.3, 0, 1 / 3, 5e5, 4096), PLAIN,
                 *(replace(make_rope(factors, 4.0), trained=trained, short=short, short_max_length=n)
                   for n in (128, 0))):
        write_json(tmp_path / "rope.json", rope_to_dict(rope) | {"search": {"seed": 7}})
        assert load_rope(tmp_path / "rope.json") == rope
    for name, formula in FORMULAS.items():  # one set for all lengths
        rope = replace(PLAIN, long=formula(PAIRS, THETA, WINDOW, 4.0), scale=4.0)
        assert rope_from_dict(rope_to_dict(rope)) == rope, name


def test_the_first_keys_of_rope_json_are_those_of_hugging_face_which_alone_say_less():
    d = rope_to_dict(make_rope(random_factors(0, 4), 4.0, n_hat=8))
    assert list(d) == ["rope_type", "rope_theta", "factor", "original_max_position_embeddings", "long_factor",
                       "short_factor", "attention_factor", "long_n_hat", "short_n_hat", "short_attention_factor",
                       "short_max_length", "trained_factor"]
    hf = dict(list(d.items())[:7])
    LlamaConfig(head_dim=64, max_position_embeddings=256, rope_parameters=hf).validate_rope()
    given = rope_from_dict(hf | {"attention_factor": None}, trained := Factors((2.0,) * PAIRS))
    assert given.trained == trained and rope_from_dict(hf).trained == plain(PAIRS)
    for at, name, said, factor in ((64, "short", None, su_factor(4.0, 64)), (65, "long", 1.25, 1.25)):
        found = rope_from_dict(hf | {"attention_factor": said}).at(at)
        assert found == Factors(tuple(hf[f"{name}_factor"]), 0, factor)


GOOD = rope_to_dict(make_rope(random_factors(0, 4), 4.0))
ONES = [1.0] * 31


@pytest.mark.parametrize("changes, said", [
    *[({f"{kind}_factor": [bad, *ONES]}, f"{kind}_factor: factors must be from 1") for kind, bad in (
        ("long", 0.0), ("long", 0.9), ("short", 1e300), ("trained", -1.0))],
    *[({key: value}, "is not a number") for key, value in (("attention_factor", math.nan), ("factor", math.inf))],
    *[({"long_factor": [bad, *ONES]}, "is not a number") for bad in ("1.5", None, True)],
    ({"long_factor": [*ONES, 2e6]}, "not 2e"), ({"trained_factor": ONES}, "needs 31"), ({"long_factor": ONES}, "31"),
    ({"long_factor": "1" * 32}, "long_factor is not a list"), ({"long_factor": 2.0}, "not a list"),
    ({"attention_factor": 0}, "attention factor"), ({"attention_factor": "1"}, "is not a number"),
    ({"rope_theta": -1.0}, "above 1"), ({"factor": 0.0}, "above 0"), ({"factor": 1e300}, "finite"),
    ({"long_n_hat": -1}, "n_hat"), ({"long_n_hat": 10**18}, "n_hat"), ({"short_n_hat": "few"}, "few"),
    ({"long_n_hat": 2.5}, "2.5 is not a whole number"), ({"original_max_position_embeddings": "64"}, "'64'"),
    ({"short_max_length": -1}, "lengths"), ({"rope_type": "yarn"}, "longrope"),
    *[({key: gone}, f"'{key}' is missing") for gone in (None, ...)
      for key in ("rope_theta", "original_max_position_embeddings", "long_factor", "short_factor")],
    ("", r"rope\.json"), ("{", r"rope\.json"), ("[1, 2]", r"rope\.json"), ("3", r"rope\.json"),
])
def test_a_malformed_rope_json_is_the_users_mistake(tmp_path, changes, said):
    """`...` takes a key away, a text stands for the file. The message names the file and what is wrong."""
    path = tmp_path / "rope.json"
    write_json(path, GOOD)
    assert rope_to_dict(load_rope(path)) == GOOD
    path.write_text(changes if isinstance(changes, str) else
                    json.dumps({k: v for k, v in (GOOD | changes).items() if v is not ...}))
    with pytest.raises(UserError, match=said) as e:
        load_rope(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_factors_in_no_order_are_read_and_it_is_said(tmp_path, capsys):
    path = tmp_path / "rope.json"
    for first, said in ((2.0, f"{path}: its factors are in no order, unlike the paper's\n"), (1.0, "")):
        write_json(path, GOOD | {"long_factor": [first, *ONES], "original_max_position_embeddings": float(WINDOW)})
        assert load_rope(path).long.rescale_factors == (first, *ONES) and capsys.readouterr().err == said
        save_tiny(tmp_path)
        capsys.readouterr()
        warn.cache_clear()
        model = load_model(tmp_path, device="meta")  # it is this model's own
        assert capsys.readouterr().err == said and resolve_ropes(["model"], [64, 256], model)["model", 64] == model.rope
        warn.cache_clear()
        assert resolve_ropes([str(path)], [64, 128, 256], model)[str(path), 256] == model.rope
        assert capsys.readouterr().err == said  # once, whatever the lengths


@pytest.mark.parametrize("rope, said", [
    (make_rope([2.0] * 16, 4.0), "long_factor has 16 factors, needs 32"),
    (make_rope([2.0] * PAIRS, 4.0, rope_theta=500000.0), "rope_theta"),
    (make_rope([2.0] * PAIRS, 4.0, window=WINDOW + 1), f"original_max_position_embeddings is {WINDOW + 1}"),
])
def test_a_rope_for_another_model_is_the_users_mistake(tmp_path, tiny, rope, said):
    write_json(tmp_path / "rope.json", rope_to_dict(rope))
    for given in (rope, tmp_path / "rope.json", str(tmp_path / "rope.json")):
        with pytest.raises(UserError, match=said):
            load_model(tiny, given, device="meta")


def test_a_rope_json_of_another_model_in_a_models_directory_is_told_whatever_rope_is_asked_for(tmp_path, capsys):
    save_tiny(tmp_path)
    write_json(tmp_path / "rope.json", rope_to_dict(make_rope([2.0] * 16, 4.0)))
    for name in ("none", "yarn"):
        line = complaint(eval_ppl.main, capsys, "--model", tmp_path, "--len", 256, "--rope", name)
        assert str(tmp_path / "rope.json") in line and "16" in line


def test_names_take_s_from_the_length_or_from_the_number_behind_the_colon(tmp_path, tiny):
    def rope(name, length=None):
        return load_model(tiny, name, length, "meta").rope
    for name, formula in FORMULAS.items():
        for scale, given in ((4.0, (name, 4 * WINDOW)), (16.0, (f"{name}:16", 4 * WINDOW)), (2.5, (f"{name}:2.5",))):
            assert rope(*given) == replace(PLAIN, long=formula(PAIRS, THETA, WINDOW, scale), scale=scale)
        assert rope(name, WINDOW // 2) == PLAIN  # nothing to extend
    assert rope(Path("config")) == rope("config") == PLAIN  # --init's type is a path
    for bad in ("yarn:0.5", "yarn:x", "yarn:nan", "yarn:inf", "pi:-2", "ntk:"):
        with pytest.raises(UserError, match=f"rope {bad}"):
            rope(bad, None if bad == "ntk:" else 4 * WINDOW)
    for bad, said in (("pi", "rope pi: for how many tokens"), ("yarm", "rope yarm: not none, pi, ntk, yarn"),
                      (tmp_path, "a model's directory is for --model$")):
        with pytest.raises(UserError, match=said):
            rope(bad)

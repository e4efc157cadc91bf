"""Rope against transformers' rope functions, against eq. 3 of the paper, and against itself."""
import json
import math
from decimal import Decimal, getcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HEAD_DIM, WINDOW, random_factors
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longrope import Rope, UserError, load_model, rotate, su_factor

SHAPES = [(64, 10000.0, 128, 8.0), (128, 500000.0, 4096, 4.0), (64, 10000.0, 1024, 32.0), (96, 10000.0, 2048, 1.5)]
METHODS = {"none": "default", "pi": "linear", "ntk": "dynamic", "yarn": "yarn", "longrope": "longrope"}


def both(name, head_dim, theta, window, scale):
    """Our rope and transformers' configuration of the same method."""
    hf = {"rope_type": METHODS[name], "rope_theta": theta, "factor": scale}
    if name == "ntk":
        hf["factor"] = 1.0  # dynamic NTK of transformers: s = factor * length / window - (factor - 1)
    if name == "yarn":
        hf["original_max_position_embeddings"] = window
    if name == "longrope":
        rope = Rope.longrope(random_factors(head_dim, scale, head_dim // 2), theta, window, scale)
        hf |= {"original_max_position_embeddings": window, "long_factor": list(rope.rescale_factors),
               "short_factor": [1.0] * (head_dim // 2)}
    else:
        rope = getattr(Rope, name)(head_dim, theta, window, scale)
    return rope, LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=hf,
                             max_position_embeddings=window)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_inv_freq_and_attention_factor_are_those_of_transformers(name, shape):
    rope, config = both(name, *shape)
    length = round(shape[2] * shape[3])
    if name == "none":
        inv_freq, attention_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[METHODS[name]](config, seq_len=length)
    ours = rope.at(length).inv_freq()
    assert ours.dtype == np.float64 and ours.shape == (shape[0] // 2,)
    np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_cos_and_sin_are_those_of_transformers_up_to_1024_positions(name, shape):
    rope, config = both(name, *shape)
    length = round(shape[2] * shape[3])
    positions = torch.tensor([*range(1024), length - 1])[None]  # the last one tells transformers the total length
    hf_cos, hf_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin = rope.table(length)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (length, shape[0] // 2)
    close = 1e-4 * rope.attention_factor  # what transformers' angles, rounded to float32, leave at 1024 radians
    for ours, theirs in ((cos, hf_cos), (sin, hf_sin)):
        for half in theirs[0, :1024].chunk(2, dim=-1):
            assert_close(ours[:1024], half, atol=close, rtol=0)


def test_the_constructors_differ_from_each_other_and_have_the_factors_of_their_papers():
    ropes = [getattr(Rope, name)(64, 10000.0, 1024, 8.0) for name in ("none", "pi", "ntk", "yarn")]
    none, pi, ntk, yarn = (rope.rescale_factors for rope in ropes)
    assert set(none) == {1.0} and set(pi) == {8.0}
    assert ntk[0] == yarn[0] == 1.0 and ntk[-1] == yarn[-1] == pytest.approx(8.0)
    assert list(ntk) == sorted(set(ntk)) and list(yarn) == sorted(yarn)
    assert max(abs(a - b) for a, b in zip(ntk, yarn)) > 1


def test_the_table_is_equation_3():
    factors, n_hat, attention_factor, theta, head_dim = random_factors(3, 4.0, 8), 5, 1.2, 10000.0, 16
    cos, sin = Rope(factors, theta, 64, 4.0, n_hat, attention_factor).table(40)
    for n in (0, 1, 4, 5, 6, 39):
        for i in range(head_dim // 2):
            rescale = 1 if n < n_hat else factors[i]
            angle = n / (rescale * theta ** (2 * i / head_dim))
            assert cos[n, i].item() == pytest.approx(attention_factor * math.cos(angle), abs=2e-7)
            assert sin[n, i].item() == pytest.approx(attention_factor * math.sin(angle), abs=2e-7)


def test_rotate_turns_the_pair_i_and_i_plus_half_like_a_complex_number():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3, 16)
    cos, sin = Rope.ntk(16, 10000.0, 64, 2.0).table(10)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.complex(cos, sin)[:, None, :]
    assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Identities


def same_table(a, b, length):
    return all(torch.equal(x, y) for x, y in zip(a.table(length), b.table(length)))


def test_all_ones_and_n_hat_0_is_plain_rope():
    plain = Rope.none(64, 10000.0, 64)
    assert same_table(Rope.longrope([1.0] * 32, 10000.0, 64, 8.0, attention_factor=1.0), plain, 512)
    assert not same_table(Rope.longrope([1.0] * 31 + [1.01], 10000.0, 64, 8.0, attention_factor=1.0), plain, 512)


def test_all_s_is_position_interpolation():
    pi = Rope.pi(64, 10000.0, 64, 8.0)
    assert same_table(Rope.longrope([8.0] * 32, 10000.0, 64, 8.0, attention_factor=1.0), pi, 512)
    halved = Rope.pi(64, 10000.0, 64, 2.0)  # and interpolation is plain RoPE read at n / s
    assert all(torch.equal(x[::2], y[:256]) for x, y in zip(halved.table(512), Rope.none(64, 10000.0, 64).table(512)))


@pytest.mark.parametrize("n_hat", [512, 513, 100_000])
def test_n_hat_of_the_whole_length_or_more_is_plain_rope(n_hat):
    plain, factors = Rope.none(64, 10000.0, 64), random_factors(0, 8)
    assert same_table(Rope.longrope(factors, 10000.0, 64, 8.0, n_hat, 1.0), plain, 512)
    assert not same_table(Rope.longrope(factors, 10000.0, 64, 8.0, 511, 1.0), plain, 512)


def test_the_first_n_hat_tokens_are_plain_and_the_others_as_without_n_hat():
    factors = random_factors(0, 8)
    for n_hat in (1, 4, 64):
        with_it = Rope.longrope(factors, 10000.0, 64, 8.0, n_hat, 1.0).table(512)
        without = Rope.longrope(factors, 10000.0, 64, 8.0, 0, 1.0).table(512)
        for ours, plain, rescaled in zip(with_it, Rope.none(64, 10000.0, 64).table(512), without):
            assert torch.equal(ours[:n_hat], plain[:n_hat])
            assert torch.equal(ours[n_hat:], rescaled[n_hat:])


def scores(rope, length, distance):
    """q . k of one query and one key vector for every pair of positions `distance` apart."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=generator).expand(1, length, 1, 64) for _ in range(2))
    cos, sin = rope.table(length)
    return (rotate(q, cos, sin)[0, distance:, 0] * rotate(k, cos, sin)[0, :length - distance, 0]).sum(-1)


def test_q_dot_k_depends_on_the_distance_only_when_n_hat_is_0():
    factors = random_factors(0, 8)
    for distance in (0, 1, 17, 100):
        without = scores(Rope.longrope(factors, 10000.0, 64, 8.0, 0), 512, distance)
        assert without.max() - without.min() < 1e-3
        all_plain = scores(Rope.longrope([1.0] * 32, 10000.0, 64, 8.0, 16), 512, distance)
        assert all_plain.max() - all_plain.min() < 1e-3
    across = scores(Rope.longrope(factors, 10000.0, 64, 8.0, 16), 512, 17)  # plain keys, rescaled queries at first
    assert across.max() - across.min() > 1
    assert across[16:].max() - across[16:].min() < 1e-3


def test_angles_at_2_million_positions_are_exact_to_float32_where_float32_angles_are_not():
    length, theta, factors, last = 2 * 1024 * 1024, 10000.0, (1.07, 1.15, 3.31, 8.0), 64
    cos, sin = Rope(factors, theta, 4096, 512.0).table(length)
    getcontext().prec = 50
    tau = 2 * Decimal("3.14159265358979323846264338327950288419716939937511")
    inv_freq = [1 / (Decimal(f) * Decimal(theta) ** (Decimal(i) / 4)) for i, f in enumerate(factors)]
    angles = np.array([[float(n * w % tau) for w in inv_freq] for n in range(length - last, length)])
    error = max(np.abs(cos[-last:].numpy() - np.cos(angles)).max(), np.abs(sin[-last:].numpy() - np.sin(angles)).max())
    assert error < 3.1e-8  # half of the last bit of a float32 just below 1 is 2.98e-8
    positions = torch.arange(length - last, length, dtype=torch.float32)
    in_float32 = (positions[:, None] * torch.tensor([float(w) for w in inv_freq], dtype=torch.float32)).cos()
    assert np.abs(in_float32.numpy() - np.cos(angles)).max() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The short or the long set, rope.json, names


def test_the_total_length_chooses_the_short_or_the_long_set():
    rope = Rope.longrope(random_factors(0, 4), 10000.0, 64, 4.0, n_hat=2)
    plain, long = Rope.none(64, 10000.0, 64), Rope(rope.rescale_factors, 10000.0, 64, 4.0, 2, rope.attention_factor)
    for length in (1, 63, 64):
        assert same_table(rope, plain, length)
    for length in (65, 256):
        assert same_table(rope, long, length) and not same_table(rope, plain, length)  # for the first positions too
    for name in ("pi", "ntk", "yarn"):
        assert not same_table(getattr(Rope, name)(64, 10000.0, 64, 4.0), plain, 63)  # these have one set only


def test_the_short_set_may_reach_beyond_the_original_window(tmp_path):
    short = Rope(random_factors(5, 2), 10000.0, 64, n_hat=1, attention_factor=1.1)
    rope = Rope(random_factors(0, 4), 10000.0, 64, 4.0, 3, 1.3, short, short_max_length=128)
    rope.save(tmp_path / "rope.json")
    loaded = Rope.load(tmp_path / "rope.json")
    assert loaded == rope
    assert loaded.at(128) == short and loaded.at(129) == loaded
    assert same_table(loaded, short, 128)


def test_the_attention_factor_is_that_of_the_released_code():
    assert su_factor(8, 1024) == pytest.approx(math.sqrt(1 + math.log(8) / math.log(1024)), rel=1e-12)
    assert su_factor(1, 1024) == su_factor(0.5, 1024) == 1.0
    assert Rope.longrope([1.0, 2.0], 10000.0, 1024, 8).attention_factor == su_factor(8, 1024)
    assert Rope.longrope([1.0, 2.0], 10000.0, 1024, 8, attention_factor=1.5).attention_factor == 1.5


def test_rope_json_gives_back_the_same_rope_to_the_last_bit(tmp_path):
    factors = tuple((np.random.default_rng(0).random(32) + 1).tolist())  # all digits of a float64
    for rope in (Rope.longrope(factors, 10000.0, 64, 8.0, n_hat=12), Rope.longrope(factors, 5e5, 4096, 7.3, 0, 1 / 3)):
        rope.save(tmp_path / "rope.json", search={"seed": 7})
        assert Rope.load(tmp_path / "rope.json") == rope
        assert json.loads((tmp_path / "rope.json").read_text())["search"] == {"seed": 7}
    for name in ("none", "pi", "ntk", "yarn"):  # one set for all lengths
        rope = getattr(Rope, name)(64, 10000.0, 64, 4.0)
        rope.save(tmp_path / "rope.json")
        assert all(same_table(Rope.load(tmp_path / "rope.json"), rope, length) for length in (10, 64, 65, 256))


def test_the_first_keys_of_rope_json_are_those_of_hugging_face(tmp_path):
    Rope.longrope(random_factors(0, 4), 10000.0, 64, 4.0, n_hat=8).save(tmp_path / "rope.json", search={})
    written = json.loads((tmp_path / "rope.json").read_text())
    assert list(written) == ["rope_type", "rope_theta", "factor", "original_max_position_embeddings", "long_factor",
                             "short_factor", "attention_factor", "long_n_hat", "short_n_hat", "short_attention_factor",
                             "short_max_length", "search"]
    parameters = dict(list(written.items())[:7])
    config = LlamaConfig(head_dim=64, max_position_embeddings=256, rope_parameters=parameters)
    config.validate_rope()
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=65)
    np.testing.assert_allclose(Rope.load(tmp_path / "rope.json").inv_freq(), inv_freq.double().numpy(), rtol=1e-6)
    assert attention_factor == su_factor(4.0, 64)


def test_a_plain_hugging_face_description_has_one_attention_factor_and_no_n_hat():
    d = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
         "long_factor": [2.0] * 4, "short_factor": [1.5] * 4}
    rope = Rope.from_dict(d)
    assert rope.attention_factor == rope.short.attention_factor == su_factor(4.0, 64)
    assert rope.n_hat == rope.short.n_hat == 0 and rope.short_max_length == 64
    assert Rope.from_dict(d | {"attention_factor": 1.25}).at(64).attention_factor == 1.25


GOOD = Rope.longrope(random_factors(0, 4), 10000.0, WINDOW, 4.0).to_dict()


@pytest.mark.parametrize("changes, said", [
    ({"long_factor": [math.nan] + [1.0] * 31}, "finite"),
    ({"short_factor": [math.inf] + [1.0] * 31}, "finite"),
    ({"long_factor": [0.0] + [1.0] * 31}, "above 0"),
    ({"short_factor": [-1.0] + [1.0] * 31}, "above 0"),
    ({"attention_factor": math.nan}, "finite"),
    ({"rope_theta": -1.0}, "above 0"),
    ({"long_factor": [1.0] * 31}, "31"),
    ({"long_factor": ["one"] + [1.0] * 31}, "one"),
    ({"long_factor": 2.0}, "rope.json"),
    ({"long_n_hat": -1}, "n_hat"),
    ({"short_n_hat": "few"}, "few"),
    ({"original_max_position_embeddings": None}, "rope.json"),
    ({"rope_theta": ...}, "rope_theta"),
    ({"original_max_position_embeddings": ...}, "original_max_position_embeddings"),
    ({"long_factor": ...}, "long_factor"),
    ({"short_factor": ...}, "short_factor"),
])
def test_a_malformed_rope_json_is_the_users_mistake(tmp_path, changes, said):
    """`...` takes a key away. The message names the file and what is wrong."""
    path = tmp_path / "rope.json"
    path.write_text(json.dumps(GOOD))
    assert Rope.load(path).to_dict() == GOOD
    path.write_text(json.dumps({k: v for k, v in (GOOD | changes).items() if v is not ...}))
    with pytest.raises(UserError, match=said) as e:
        Rope.load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_rope_json_that_is_no_json_object_is_the_users_mistake(tmp_path, text):
    (tmp_path / "rope.json").write_text(text)
    with pytest.raises(UserError, match=r"rope\.json"):
        Rope.load(tmp_path / "rope.json")
    with pytest.raises(UserError, match=r"nowhere\.json"):
        Rope.load(tmp_path / "nowhere.json")


def test_a_rope_that_is_no_file_is_the_users_mistake(tmp_path, tiny):
    names = "none, pi, ntk, yarn .yarn:16 fixes s. or config"
    for rope, said in (("yarm", f"rope yarm: not {names}, nor a rope.json file$"),
                       (str(tmp_path), "nor a rope.json file; a model's directory is for --model$")):
        with pytest.raises(UserError, match=said):
            load_model(tiny, rope, device="cpu")


def test_a_rope_for_another_head_dim_theta_or_window_is_the_users_mistake(tmp_path, tiny):
    other = Rope.longrope([2.0] * 16, 10000.0, WINDOW, 4.0)
    other.save(tmp_path / "rope.json")
    for rope in (other, tmp_path / "rope.json", str(tmp_path / "rope.json")):
        with pytest.raises(UserError, match=f"16 factors.*head_dim {HEAD_DIM}"):
            load_model(tiny, rope, device="cpu")
    Rope.longrope([2.0] * 32, 500000.0, WINDOW, 4.0).save(tmp_path / "rope.json")
    with pytest.raises(UserError, match="rope_theta"):
        load_model(tiny, tmp_path / "rope.json", device="cpu")
    Rope.longrope([2.0] * 32, 10000.0, WINDOW + 1, 4.0).save(tmp_path / "rope.json")
    with pytest.raises(UserError, match=f"window of {WINDOW + 1} tokens"):
        load_model(tiny, tmp_path / "rope.json", device="cpu")


def test_a_named_rope_needs_a_length_or_s(tiny):
    assert load_model(tiny, "yarn:4", device="cpu").rope == load_model(tiny, "yarn", 4 * WINDOW, device="cpu").rope
    for name in ("pi", "ntk", "yarn"):
        with pytest.raises(UserError, match=f"rope {name}: for how many tokens"):
            load_model(tiny, name, device="cpu")


def test_names_take_s_from_the_length_or_from_the_number_behind_the_colon():
    config = SimpleNamespace(head_dim=64, rope=Rope.none(64, 10000.0, 1024))
    for name in ("none", "pi", "ntk", "yarn"):
        assert Rope.named(name, config, 8192) == getattr(Rope, name)(64, 10000.0, 1024, 8.0)
        assert Rope.named(f"{name}:16", config, 8192) == getattr(Rope, name)(64, 10000.0, 1024, 16.0)
        assert Rope.named(name, config, 512).rescale_factors == (1.0,) * 32  # nothing to extend
    for bad in ("yarn:0.5", "yarn:x", "yarn:nan", "yarn:inf", "pi:-2"):
        with pytest.raises(UserError, match=bad):
            Rope.named(bad, config, 8192)

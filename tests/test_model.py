"""The Llama against transformers', checkpoints, windows, and the measure of all scripts."""
import json
import math
import re
import sys
import weakref
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BOS,
    HEAD_DIM,
    VOCAB,
    WINDOW,
    OurTable,
    hf_logits,
    prose,
    random_factors,
    random_tokens,
    save_tiny,
)
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import longrope
from longrope import (
    Rope,
    UserError,
    attention,
    compile_blocks,
    data_hash,
    generate,
    load_model,
    load_tokenizer,
    read_documents,
    save_model,
    standard_library,
    token_nll,
    use_attention,
    utilisation,
    window_nll,
    windows,
)


def assert_same_logits(ours, theirs):
    assert theirs.std() > 0.1  # there is something to compare
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def longrope_parameters(**changes):
    return {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW,
            "long_factor": list(random_factors(1, 4)), "short_factor": list(random_factors(2, 1.2)), **changes}


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize("shard", ["5GB", "200KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi-head", "grouped-query", "multi-query"])
def test_logits_equal_those_of_transformers(tmp_path, kv_heads, tied, shard):
    hf = save_tiny(tmp_path, shard, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "200KB")
    model = load_model(tmp_path, device="cpu")
    assert hasattr(model, "lm_head") != tied
    tokens = torch.cat((random_tokens(WINDOW, 0), random_tokens(WINDOW, 1)))
    ours = model(tokens)
    assert ours.shape == (2, WINDOW, VOCAB) and ours.dtype == torch.float32
    assert_same_logits(ours, hf_logits(hf, tokens))


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.3}], ids=["default attention factor", "1.3"])
def test_longrope_logits_equal_those_of_transformers_below_at_and_above_the_window(tmp_path, changes):
    hf = save_tiny(tmp_path, rope_parameters=longrope_parameters(**changes), max_position_embeddings=4 * WINDOW)
    model = load_model(tmp_path, device="cpu")
    assert model.window == WINDOW
    for length in (WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW):
        tokens = random_tokens(length)
        assert_same_logits(model(tokens), hf_logits(hf, tokens))
    plain = load_model(tmp_path, "none", device="cpu")
    assert (plain(tokens) - model(tokens)).abs().max() > 0.1  # the rope shows in the logits


def test_a_config_of_transformers_4_is_read_like_one_of_transformers_5(tmp_path):
    hf = save_tiny(tmp_path, rope_parameters=longrope_parameters(), max_position_embeddings=4 * WINDOW)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(2 * WINDOW)
    assert_same_logits(load_model(tmp_path, device="cpu")(tokens), hf_logits(hf, tokens))


def test_a_rope_theta_of_its_own_is_read(tmp_path):
    for parameters in ({"rope_type": "default", "rope_theta": 500.0}, longrope_parameters(rope_theta=500.0)):
        hf = save_tiny(tmp_path, rope_parameters=parameters)
        tokens = random_tokens(WINDOW)
        model = load_model(tmp_path, device="cpu")
        assert model.rope.rope_theta == 500.0
        assert_same_logits(model(tokens), hf_logits(hf, tokens))


@pytest.mark.parametrize("n_hat", [0, 5])
def test_logits_equal_those_of_transformers_with_our_table_put_in(tiny, n_hat):
    model = load_model(tiny, Rope.longrope(random_factors(1, 8), 10000.0, WINDOW, 8.0, n_hat), device="cpu")
    hf = LlamaForCausalLM.from_pretrained(tiny).eval()
    tokens = random_tokens(8 * WINDOW)
    hf.model.rotary_emb = OurTable(model.rope)
    assert_same_logits(model(tokens), hf_logits(hf, tokens))


def test_the_bundled_model_has_the_logits_of_transformers_with_our_table_put_in(bundled):
    """transformers' own angles are float32: at 1024 positions its cos and sin are off by about 5e-5, ours by 3e-8, and
    that alone moves a logit by 3e-4."""
    model = bundled.model
    assert model.config.head_dim == 64 and model.window == 1024
    hf = AutoModelForCausalLM.from_pretrained(bundled.path, dtype=torch.float32).eval()
    text = next(iter(read_documents([], 10_000)))[1]
    tokens = torch.tensor([load_tokenizer(bundled.path).encode(text).ids[:1024]])
    assert tokens.shape == (1, 1024)

    exact = torch.arange(1024, dtype=torch.float64)[:, None] * torch.from_numpy(model.rope.inv_freq())
    theirs = hf.model.rotary_emb(torch.zeros(1), torch.arange(1024)[None])
    ours = model.rope.table(1024)
    for their, our, true in zip(theirs, ours, (exact.cos(), exact.sin())):
        assert 1e-5 < (their[0, :, :32].double() - true).abs().max() < 1e-4
        assert (our.double() - true).abs().max() < 3.1e-8

    logits = model(tokens)
    assert 0 < (hf_logits(hf, tokens) - logits).abs().max() < 3e-3  # transformers as it is, with its own angles
    hf.model.rotary_emb = OurTable(model.rope)
    assert_same_logits(hf_logits(hf, tokens), logits)
    nll = window_nll(model, tokens[0])
    assert nll.mean() < 4  # a trained model: a uniform guess costs ln 4096 = 8.3


def test_the_committed_factors_are_for_the_bundled_model(bundled):
    model = load_model(bundled.path, bundled.path.parent / "rope.json", device="cpu")
    assert model.rope.scale == 8 and model.rope.n_hat == 0  # so that config.json can say them


def test_attention_is_causal_softmax_with_every_key_head_shared_by_a_group_of_query_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    out = attention(q, k, v)
    for b, t, h in ((0, 0, 0), (0, 6, 1), (1, 3, 2), (1, 6, 3)):
        weights = (k[b, :t + 1, h // 2] @ q[b, t, h] / 8 ** 0.5).softmax(0)
        assert_close(out[b, t, h], weights @ v[b, :t + 1, h // 2])


@pytest.mark.parametrize("queries", [7, 3])
def test_other_packages_kernels_get_what_they_need_and_their_gradients_arrive(monkeypatch, queries):
    """flash-attn-4 and flash-attn 2 run on GPUs only: stand-ins with their signatures, made of plain products."""
    def grouped(q, k):
        return k.repeat_interleave(q.shape[2] // k.shape[2], 2)

    def scores(q, k):
        hidden = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]) == 0
        return (torch.einsum("bthd,bshd->bhts", q, grouped(q, k)) / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)

    def forward(q, k, v, causal=False, return_lse=False):
        assert causal and return_lse
        out = torch.einsum("bhts,bshd->bthd", scores(q, k).softmax(-1), grouped(q, v))
        return out.contiguous(), scores(q, k).logsumexp(-1), None, None, None

    def backward(q, k, v, out, dout, lse, causal=False):
        assert causal
        p = (scores(q, k) - lse[..., None]).exp()
        ds = p * (torch.einsum("bthd,bshd->bhts", dout, grouped(q, v)) - (dout * out).sum(-1).mT[..., None])
        dq, dk = (torch.einsum(f"bhts,b{x}hd->b{y}hd", ds, z) / q.shape[-1] ** 0.5
                  for x, y, z in (("s", "t", grouped(q, k)), ("t", "s", q)))
        dv = torch.einsum("bhts,bthd->bshd", p, dout)
        return dq.contiguous(), *(x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))

    modules = {"flash_attn": SimpleNamespace(flash_attn_func=lambda q, k, v, causal: forward(q, k, v, causal, True)[0]),
               "flash_attn.cute": SimpleNamespace(),
               "flash_attn.cute.interface": SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(1)
    inputs = [torch.randn(2, t, heads, 8, requires_grad=True) for t, heads in ((queries, 4), (7, 2), (7, 2))]
    found = []
    for kernel in ("math", "flash-attn-4", "flash-attn-2"):
        monkeypatch.setattr(longrope, "attention_kernel", lambda *_, kernel=kernel: kernel)
        out = attention(*inputs)
        found.append([out, *torch.autograd.grad((out * torch.arange(8.0)).sum(), inputs)])
    for expected, *others in zip(*found):
        for other in others:
            assert_close(other, expected)
    torch.library.opcheck(longrope.flash_attn_4, tuple(x.detach() for x in inputs), test_utils=("test_schema",
                                                                                             "test_faketensor"))


HOPPER, BLACKWELL, AMPERE, TURING = (9, 0), (10, 0), (8, 0), (7, 5)
BOTH = ("flash-attn-4", "flash-attn")  # packages


@pytest.fixture
def gpu(monkeypatch):
    """kernel(capability, packages, ...) that a GPU would get, on which all of PyTorch's own kernels run that can."""
    def runs(backend, device, dtype, head_dim, grouped):
        half = device == "cuda" and dtype != torch.float32
        return {SDPBackend.MATH: True, SDPBackend.EFFICIENT_ATTENTION: device == "cuda" and not grouped,
                SDPBackend.FLASH_ATTENTION: half and head_dim <= 256 or device == "cpu",
                SDPBackend.CUDNN_ATTENTION: half and head_dim <= 256}[backend]

    def kernel(capability, packages=(), dtype=torch.bfloat16, head_dim=64, chunk=False, grouped=True, device="cuda"):
        monkeypatch.setattr(longrope, "sdpa_runs", runs)
        monkeypatch.setattr(longrope, "is_installed", lambda package: package in packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        longrope.attention_kernel.cache_clear()
        return longrope.attention_kernel(device, dtype, head_dim, grouped, chunk)
    use_attention(None)
    yield kernel
    use_attention(None)


@pytest.mark.parametrize("capability, packages, options, kernel", [
    (HOPPER, BOTH, {}, "flash-attn-4"),
    (HOPPER, BOTH, {"chunk": True}, "flash-attn-4"),
    (HOPPER, BOTH, {"head_dim": 80}, "flash-attn-4"),
    (HOPPER, BOTH, {"head_dim": 256}, "cudnn"),
    (HOPPER, BOTH, {"head_dim": 256, "chunk": True}, "flash-attn-2"),
    (HOPPER, BOTH, {"head_dim": 512}, "math"),
    (HOPPER, BOTH, {"head_dim": 512, "chunk": True}, "math"),
    (HOPPER, BOTH, {"dtype": torch.float32}, "math"),
    (HOPPER, BOTH, {"dtype": torch.float32, "chunk": True}, "math"),
    (HOPPER, BOTH, {"dtype": torch.float32, "grouped": False}, "efficient"),
    (HOPPER, (), {}, "cudnn"),
    (HOPPER, (), {"chunk": True}, "flash"),
    (BLACKWELL, ("flash-attn",), {}, "cudnn"),
    ((12, 0), ("flash-attn",), {}, "flash-attn-2"),
    (AMPERE, BOTH, {}, "flash-attn-2"),
    (AMPERE, BOTH, {"chunk": True}, "flash-attn-2"),
    (AMPERE, ("flash-attn-4",), {}, "flash"),
    (AMPERE, (), {}, "flash"),
    (AMPERE, (), {"chunk": True}, "flash"),
    (AMPERE, (), {"head_dim": 60, "chunk": True}, "math"),
    (TURING, (), {"chunk": True}, "math"),
    ((0, 0), BOTH, {"device": "cpu"}, "flash"),
    ((0, 0), BOTH, {"device": "cpu", "dtype": torch.float32}, "flash"),
])
def test_the_fastest_kernel_that_runs_is_taken(gpu, capability, packages, options, kernel):
    assert gpu(capability, packages, **options) == kernel


def test_a_kernel_can_be_forced_where_another_is_preferred_but_not_where_it_does_not_run(gpu):
    use_attention("cudnn")
    assert gpu(AMPERE, BOTH) == "cudnn"
    use_attention("flash-attn-4")
    with pytest.raises(UserError, match="attention flash-attn-4: not for cuda, bfloat16, head_dim 64, grouped heads"):
        gpu(AMPERE, BOTH)


def test_a_forced_kernel_is_the_one_that_is_used_and_one_that_cannot_run_is_one_line(bundled, monkeypatch):
    tokens, used = random_tokens(64), []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: [used.append(
        torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()), plain(*a, **k)][1])
    logits = bundled.model(tokens)
    assert len(used) == 6 and not any(used)  # the probe runs nothing
    try:
        use_attention("math")
        assert_close(bundled.model(tokens), logits, atol=1e-3, rtol=1e-3)
        assert len(used) == 12 and all(used[6:])
        use_attention("cudnn")
        with pytest.raises(UserError, match="attention cudnn: not for cpu, float32, head_dim 64, grouped heads here"):
            bundled.model(tokens)
    finally:
        use_attention(None)


def test_the_chunks_of_wide_and_narrow_models():
    """Whole multiples of 4096 tokens; the MLP's activations at most 1 GiB in bfloat16, but for the widest."""
    def chunk(intermediate_size):
        config = SimpleNamespace(hidden_size=8, head_dim=4, num_attention_heads=2, num_key_value_heads=1, biased=(),
                                 intermediate_size=intermediate_size, rms_norm_eps=1e-5)
        with torch.device("meta"):
            return longrope.Block(config).chunk
    assert [chunk(width) for width in (1536, 14336, 28672, 200_000)] == [348160, 36864, 16384, 4096]


def test_chunks_of_tokens_give_the_same_logits(bundled, monkeypatch):
    tokens = random_tokens(200)
    with torch.inference_mode():
        whole = bundled.model(tokens)
        for block in bundled.model.model.layers:
            monkeypatch.setattr(block, "chunk", 64)  # three and a rest
        made = []

        def hidden(self, x, plain=longrope.MLP.hidden):
            assert not any(earlier() is not None for earlier, _ in made)  # one chunk's at a time
            out = plain(self, x)
            made.append((weakref.ref(out), x.shape[1]))
            return out
        monkeypatch.setattr(longrope.MLP, "hidden", hidden)
        assert_close(bundled.model(tokens), whole, atol=1e-4, rtol=1e-4)
        assert [size for _, size in made] == [64, 64, 64, 8] * 6
        made.clear()
        assert_close(bundled.model(tokens.expand(3, -1)), whole.expand(3, -1, -1), atol=1e-4, rtol=1e-4)
    assert [size for _, size in made] == ([21] * 9 + [11]) * 6  # of three sequences, as much at a time


def test_gradients_of_any_parameter_keep_the_tokens_together(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    model = load_model(tmp_path, device="cpu").requires_grad_(False)
    monkeypatch.setattr(model.model.layers[1], "chunk", 16)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    model(random_tokens(40)).sum().backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad.any()


@pytest.mark.parametrize("kv_heads, at_once, calls", [(2, 100 * 128 + 1, [(2, 1), (2, 1)]),
                                                      (4, 100 * 3 * 64 + 1, [(3, 3), (1, 1)])])
def test_some_heads_at_a_time_give_the_same_logits(tmp_path, monkeypatch, kv_heads, at_once, calls):
    hf = save_tiny(tmp_path, num_key_value_heads=kv_heads, attention_bias=True)
    model, tokens, used = load_model(tmp_path, device="cpu"), random_tokens(100), []
    monkeypatch.setattr(longrope, "attention", lambda q, k, v: [used.append(
        (q.shape[2], k.shape[2])), attention(q, k, v)][1])
    for block in model.model.layers:
        block.chunk = 64
    whole = model(tokens)
    monkeypatch.setattr(longrope, "AT_ONCE", at_once)
    assert_close(model(tokens), whole, atol=1e-4, rtol=1e-4)
    assert used == [(4, kv_heads)] * 2 + calls * 2
    assert_same_logits(whole, hf_logits(hf, tokens))
    monkeypatch.setattr(longrope, "AT_ONCE", 100 * 64 * 4 // kv_heads)  # one key head's queries are as many
    with pytest.raises(UserError, match="1 x 100 tokens are too many for this model"):
        model(tokens)
    with pytest.raises(UserError, match="1 x 100 tokens are too many to generate"):
        generate(model, tokens[0], 1)
    model.model.layers[0].mlp.requires_grad_(True)  # any parameter will do
    with pytest.raises(UserError, match="1 x 100 tokens are too many to train"):
        model(tokens)
    with pytest.raises(UserError, match="1 x 100 tokens are too many to train"):  # a sequence shared by processes
        model.model.layers[0](torch.zeros(1, 100, 256), None, None, cache=object())


def test_decoding_stays_uncompiled(bundled):
    compiled = []
    model = load_model(bundled.path, device="cpu")
    expected = generate(model, random_tokens(40)[0], 4)
    torch._dynamo.reset()
    compile_blocks(model, backend=lambda graph, inputs: [compiled.append(graph), graph][1])
    assert generate(model, random_tokens(40)[0], 1) == expected[:1]
    prompt = len(compiled)
    assert prompt > 0 and generate(model, random_tokens(40)[0], 4) == expected and len(compiled) == prompt
    torch._dynamo.reset()


def test_a_package_is_looked_for_without_importing_it():
    assert longrope.is_installed("pytest") and not longrope.is_installed("no-such-package")


def test_layers_ropes_and_lengths_share_one_graph(bundled):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph
    torch._dynamo.reset()
    model = load_model(bundled.path, device="cpu")
    with torch.inference_mode():
        expected = {(rope, length): load_model(bundled.path, rope, 8192, device="cpu")(random_tokens(length))
                    for rope in ("none", "yarn") for length in (48, 130)}
        compile_blocks(model, backend=count)
        for (rope, length), logits in expected.items():
            model.rope = Rope.named(rope, model.config, 8192)
            assert_close(model(random_tokens(length)), logits, atol=1e-4, rtol=1e-4)
    products = [sum(node.target is torch.nn.functional.linear for node in g.graph.nodes) for g in graphs]
    assert products == [3, 3]  # before attention q, k, v; after it o, gate, up: with down, recomputing would cost more
    torch._dynamo.reset()


def test_utilisation_is_of_all_gpus_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(longrope, "world_size", lambda: 4)
    assert utilisation(989e12, 0.5, torch.device("cuda")) == 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    assert utilisation(1e12, 1, torch.device("cuda")) is None and utilisation(1e12, 1, torch.device("cpu")) is None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_on_the_meta_device_no_weights_are_read(tiny, monkeypatch):
    monkeypatch.setattr(longrope, "read_weights", None)
    model = load_model(tiny, device="meta")
    assert all(p.is_meta for p in model.parameters()) and model.window == WINDOW and model.path == tiny


def test_save_and_load_give_back_the_weights_and_the_rope(tiny, tmp_path):
    tokens = random_tokens(3 * WINDOW)
    for rope in (None, Rope.longrope(random_factors(1, 4), 10000.0, WINDOW, 4.0, n_hat=5)):
        model = load_model(tiny, rope, device="cpu")
        save_model(model, tmp_path / "out", dtype=torch.float32)
        again = load_model(tmp_path / "out", device="cpu")
        assert again.rope == model.rope and again.window == WINDOW
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
        assert torch.equal(again(tokens), model(tokens))
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
        assert all(file.stat().st_mode & 0o044 for file in (tmp_path / "out").iterdir())  # others may read them


def test_weights_are_saved_in_bfloat16_unless_said_otherwise(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(saved[k], v.bfloat16()) for k, v in tiny_model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_a_saved_directory_as_it_is(tmp_path, tiny, tied):
    save_tiny(tmp_path / "in", tie_word_embeddings=tied)
    (tmp_path / "in" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    rope = Rope.longrope(random_factors(1, 4), 10000.0, WINDOW, 4.0)
    model = load_model(tmp_path / "in", rope, device="cpu")
    save_model(model, tmp_path / "out", dtype=torch.float32)
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert hf.dtype == torch.float32 and hf.config.max_position_embeddings == 4 * WINDOW
    for length in (WINDOW + 1, 4 * WINDOW):
        tokens = random_tokens(length)
        assert_same_logits(hf_logits(hf.eval(), tokens), model(tokens))
    text = prose(9, 50)
    ids = load_tokenizer(tmp_path / "out").encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == ids and ids[0] == BOS


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_transformers_loads_a_model_saved_with_one_set_of_factors_for_all_lengths(tiny, tmp_path, name):
    model = load_model(tiny, name, 4 * WINDOW, device="cpu")
    save_model(model, tmp_path, dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for length in (WINDOW, WINDOW + 1):
        tokens = random_tokens(length)
        assert_same_logits(hf_logits(hf, tokens), model(tokens))
        assert torch.equal(load_model(tmp_path, device="cpu")(tokens), model(tokens))


def test_transformers_loads_a_model_saved_with_its_plain_rope(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path, dtype=torch.float32)
    assert not (tmp_path / "rope.json").exists()
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens(WINDOW)
    assert_same_logits(hf_logits(hf, tokens), tiny_model(tokens))


def test_load_model_takes_the_rope_from_where_it_is_told_to(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rope = Rope.longrope(random_factors(1, 4), 10000.0, WINDOW, 4.0, n_hat=5)
    rope.save(tmp_path / "rope.json")
    plain = Rope.none(HEAD_DIM, 10000.0, WINDOW)
    assert load_model(tmp_path, device="cpu").rope == rope
    assert load_model(tmp_path, "config", device="cpu").rope == plain
    assert load_model(tiny, device="cpu").rope == plain
    for given in (rope, tmp_path / "rope.json", str(tmp_path / "rope.json")):
        assert load_model(tiny, given, device="cpu").rope == rope
    for name in ("none", "pi", "ntk", "yarn"):
        expected = getattr(Rope, name)(HEAD_DIM, 10000.0, WINDOW, 3.0)
        assert load_model(tiny, name, 3 * WINDOW, device="cpu").rope == expected


def test_a_rope_can_be_swapped_without_touching_the_model(tiny_model):
    tokens = random_tokens(2 * WINDOW)
    before = tiny_model(tokens)
    plain, tiny_model.rope = tiny_model.rope, Rope.pi(HEAD_DIM, 10000.0, WINDOW, 2.0)
    assert (tiny_model(tokens) - before).abs().max() > 0.1
    tiny_model.rope = plain
    assert torch.equal(tiny_model(tokens), before)


def broken(tiny, path, **config):
    """A copy of the tiny directory with changes to config.json; `...` takes a key away."""
    path.mkdir(exist_ok=True)
    for file in tiny.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    changed = json.loads((tiny / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    return path


@pytest.mark.parametrize("config, said", [
    ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM is not supported"),
    ({"attention_bias": True}, "Missing key"),
    ({"hidden_act": "gelu"}, "SwiGLU"),
    ({"vocab_size": ...}, "vocab_size"),
    ({"num_attention_heads": ...}, "num_attention_heads"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "llama3"),
    ({"rope_parameters": longrope_parameters(long_factor=[1.0] * 5, short_factor=[1.0] * 5)}, "5 factors"),
    ({"num_hidden_layers": 3}, "Missing key"),
    ({"num_hidden_layers": 1}, "Unexpected key"),
    ({"intermediate_size": 64}, "size mismatch"),
])
def test_a_config_that_does_not_fit_is_the_users_mistake(tiny, tmp_path, config, said):
    with pytest.raises(UserError, match=said) as e:
        load_model(broken(tiny, tmp_path, **config), device="cpu")
    assert "\n" not in str(e.value)


def test_weights_that_do_not_fit_are_the_users_mistake(tiny, tmp_path):
    path = broken(tiny, tmp_path / "model")
    state = load_file(path / "model.safetensors")
    missing = state.pop("model.norm.weight")
    save_file(state, path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_model(path, device="cpu")
    save_file(state | {"model.norm.weight": missing, "lm_head.weight": missing.clone()}, path / "model.safetensors")
    load_model(path, device="cpu")  # a tied head that is stored as well is let pass
    (path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(path, device="cpu")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        load_model(path, device="cpu")


def test_a_device_that_is_not_there_is_the_users_mistake(tiny):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(UserError, match=f"device {device}"):
            load_model(tiny, device=device)


def test_a_path_that_is_not_there_is_the_users_mistake(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"nowhere: no such directory|config\.json: No such file or directory$"):
            load_model(path, device="cpu")
    with pytest.raises(UserError, match="nowhere: no such"):
        next(read_documents([tmp_path / "nowhere"]))
    with pytest.raises(UserError, match=r"no \.txt or \.jsonl"):
        next(read_documents([tmp_path]))


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def test_windows_are_the_first_tokens_of_each_document_that_is_long_enough(tiny, books, capsys):
    tokenizer = load_tokenizer(tiny)
    documents = dict(read_documents([books]))
    assert list(documents) == [f"book{i}.txt" for i in range(6)] + ["note.txt"]
    for length in (2, 64, 999):
        found = windows(documents.items(), tokenizer, length, 4)
        assert [w.document for w in found] == ["book0.txt", "book1.txt", "book2.txt", "book3.txt"]
        for w in found:
            assert w.tokens.shape == (length,) and w.tokens.dtype == torch.int64
            assert w.tokens.tolist() == tokenizer.encode(documents[w.document]).ids[:length] and w.tokens[0] == BOS
    assert capsys.readouterr().err == ""
    assert len(windows(documents.items(), tokenizer, 64, 100)) == 6
    assert "left out 1 document" in capsys.readouterr().err


def test_a_document_of_exactly_the_length_is_taken_and_one_token_less_is_refused(tiny):
    tokenizer = load_tokenizer(tiny)
    text = prose(3, 200)
    length = len(tokenizer.encode(text).ids)
    assert windows([("a", text)], tokenizer, length, 1)[0].tokens.tolist() == tokenizer.encode(text).ids
    with pytest.raises(UserError, match=f"no document of {length + 1} tokens.* {length}"):
        windows([("a", text)], tokenizer, length + 1, 1)


def test_windows_of_text_with_more_than_8_characters_a_token_are_whole(tiny):
    tokenizer = load_tokenizer(tiny)
    text = "remembered" * 2000  # about a token each ten characters
    ids = tokenizer.encode(text).ids
    assert len(text) > 8 * len(ids)
    found = windows([("a", text)], tokenizer, len(ids) - 5, 1)
    assert found[0].tokens.tolist() == ids[:-5]


def test_the_hash_of_the_data_is_of_the_tokens(tiny, books):
    found = windows(read_documents([books]), load_tokenizer(tiny), 64, 2)
    renamed = [type(w)("other name", w.tokens.clone()) for w in found]
    assert data_hash(found) == data_hash(renamed) and len(data_hash(found)) == 64
    renamed[1].tokens[63] += 1
    assert data_hash(found) != data_hash(renamed) != data_hash(found[::-1])


def test_jsonl_documents_are_read_line_by_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two", "more": 1}\n')
    (tmp_path / "b.txt").write_text("three")
    assert [text for _, text in read_documents([tmp_path])] == ["one", "two", "three"]
    assert [text for _, text in read_documents([tmp_path / "b.txt", file])] == ["three", "one", "two"]
    for line in ("{", '{"txt": "x"}', "3"):
        file.write_text('{"text": "one"}\n' + line + "\n")
        with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
            list(read_documents([file]))


def test_default_documents_are_the_standard_library_largest_first_each_long_enough_but_the_last():
    documents = list(read_documents([], 300_000))
    assert len(documents) >= 10 and documents == list(read_documents([], 300_000))
    *others, (_, last) = documents
    assert all(len(text) >= 300_000 for _, text in others) and last
    names, sizes = zip(*((name.removeprefix("stdlib:"), len(text)) for name, text in others))
    assert all(name.startswith("stdlib:") for name, _ in documents) and len(set(names)) == len(names)
    alone = [size for name, size in zip(names, sizes) if "+" not in name]
    assert len(alone) > 1 and alone == sorted(alone, reverse=True)  # whole packages, the largest first
    assert ["+" in name for name in names] == [False] * len(alone) + [True] * (len(names) - len(alone))
    assert any(re.fullmatch(r"\w+\+\w+\+\.\.\.", name) for name in names)  # the first two stand for all joined
    assert all(size < 600_000 for name, size in zip(names, sizes) if "+" in name)  # no more than it takes
    everything = "".join(text for _, text in documents)
    assert everything == "".join(text for _, text in read_documents([], 1)) and "def loads(" in everything  # json
    assert "class TestCase" not in documents[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# Measure


def test_default_documents_are_one_for_each_package_if_any_length_will_do():
    assert [name for name, _ in islice(read_documents([]), 3)] == [name for name, _ in islice(standard_library(1), 3)]


def test_token_nll_in_chunks_equals_the_unchunked_and_so_do_its_gradients():
    torch.manual_seed(0)
    hidden, unembedding, targets = torch.randn(50, 16), torch.randn(VOCAB, 16), torch.randint(VOCAB, (50,))
    weights = torch.rand(50)  # not all tokens alike, or a mix-up of their order would not show

    def measured(nll):
        h, u = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
        value = nll(h, u)
        (value * weights).sum().backward()
        return value.detach(), h.grad, u.grad

    expected = measured(lambda h, u: F.cross_entropy(h @ u.T, targets, reduction="none"))
    for chunk in (1, 7, 25, 50, 4096):
        for ours, reference in zip(measured(lambda h, u: token_nll(h, u, targets, chunk)), expected):  # noqa: B023
            assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert_close(token_nll(hidden, unembedding, targets, chunk), expected[0], atol=1e-5, rtol=1e-5)


def test_token_nll_keeps_no_logits_for_the_backward_pass():
    hidden, unembedding = torch.randn(64, 16, requires_grad=True), torch.randn(VOCAB, 16)
    targets, saved = torch.randint(VOCAB, (64,)), []

    def nothing_wide(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(nothing_wide, lambda t: t):
        F.cross_entropy(F.linear(hidden, unembedding), targets)
        assert any(shape[-1:] == (VOCAB,) for shape in saved)  # what is to be avoided would be seen here
        saved.clear()
        token_nll(hidden, unembedding, targets, 16).sum().backward()
    assert not any(shape[-1:] == (VOCAB,) for shape in saved), saved


def test_window_nll_is_the_loss_of_every_token_but_the_first(tiny, tiny_model, tiny_rope):
    tiny_model.rope = tiny_rope
    tokens = random_tokens(3 * WINDOW)[0]
    nll = window_nll(tiny_model, tokens)
    assert nll.shape == (3 * WINDOW - 1,) and nll.dtype == torch.float64 and nll.device.type == "cpu"
    log_p = tiny_model(tokens[None])[0].log_softmax(-1)
    by_hand = torch.stack([-log_p[t, tokens[t + 1]] for t in range(len(tokens) - 1)])
    assert_close(nll, by_hand.double(), atol=1e-4, rtol=0)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation under it puts out."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_window_nll_never_has_the_logits_of_the_whole_sequence(tmp_path):
    save_tiny(tmp_path, num_hidden_layers=1, vocab_size=1024, num_attention_heads=1, num_key_value_heads=1)
    model, length = load_model(tmp_path, device="cpu"), 2 * 4096 + 10
    tokens = random_tokens(length)
    with Largest() as whole:
        model(tokens)
    with Largest() as chunked:
        window_nll(model, tokens[0])
    assert whole.elements == length * 1024  # the logits are what is largest, so they would be seen
    assert chunked.elements <= 4096 * 1024

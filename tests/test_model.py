"""The Llama against transformers', attention and its kernels, checkpoints, and the measure of all scripts."""
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (BOS, HEAD_DIM, VOCAB, WINDOW, assert_same_logits, hf_logits, make_rope,
                      prose, random_factors, random_tokens, save_tiny)
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import finetune
import longrope
import search
from longrope import (FORMULAS, UserError, attention, generate, head_groups, inv_freq_of, join_processes, load_model,
                      load_rope, load_tokenizer, over_window, perplexity, plain, read_documents, read_json,
                      rope_to_dict, save_config, save_model, token_nll, window_nll, write_json)

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW,
            "long_factor": list(random_factors(1, 4)), "short_factor": list(random_factors(2, 1.2))}


class OurTable(torch.nn.Module):
    """Stands in for transformers' rotary embedding and gives out the table of one of our ropes."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, x, position_ids):
        cos, sin = self.rope.table(x.shape[1])
        return torch.cat((cos, cos), -1)[None].to(x.dtype), torch.cat((sin, sin), -1)[None].to(x.dtype)


def config_of(heads, kv_heads, head_dim=64):
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)


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
    assert_same_logits(model, hf, 1, WINDOW)
    tokens = torch.cat((random_tokens(WINDOW, 0), random_tokens(WINDOW, 1)))  # a batch
    assert_close(model(tokens), hf_logits(hf, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.3}, {"rope_theta": 500.0}])
def test_longrope_logits_equal_those_of_transformers_below_at_and_above_the_window(tmp_path, changes):
    hf = save_tiny(tmp_path, rope_parameters=LONGROPE | changes, max_position_embeddings=4 * WINDOW)
    model = load_model(tmp_path, device="cpu")
    assert model.window == WINDOW and model.rope.rope_theta == changes.get("rope_theta", 10000.0)
    assert_same_logits(model, hf, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)
    tokens, own = random_tokens(4 * WINDOW), model.rope
    extended = model(tokens)
    model.rope = load_model(tmp_path, "none", device="meta").rope  # a rope is swapped without touching the model
    assert (model(tokens) - extended).abs().max() > 0.1  # and shows in the logits
    model.rope = own
    assert torch.equal(model(tokens), extended)


@pytest.mark.parametrize("n_hat", [0, 5])
def test_logits_equal_those_of_transformers_with_our_table_put_in(tiny, n_hat):
    model = load_model(tiny, make_rope(random_factors(1, 8), 8.0, n_hat), device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(tiny).eval()
    hf.model.rotary_emb = OurTable(model.rope)
    assert_same_logits(model, hf, 8 * WINDOW)


def test_the_bundled_model_has_the_logits_of_transformers_with_our_table_put_in(bundled):
    """transformers' own angles are float32: at 1024 positions its cos and sin are off by about 5e-5, ours by 3e-8, and
    that alone moves a logit by 3e-4."""
    model = bundled.model
    assert model.config.head_dim == 64 and model.window == 1024
    hf = AutoModelForCausalLM.from_pretrained(bundled.path, dtype=torch.float32).eval()
    tokens = torch.tensor([load_tokenizer(bundled.path).encode(next(read_documents([]))[1][:10_000]).ids[:1024]])
    assert tokens.shape == (1, 1024)

    inv_freq = inv_freq_of(model.rope.long.rescale_factors, model.rope.rope_theta)
    exact = torch.arange(1024, dtype=torch.float64)[:, None] * torch.from_numpy(inv_freq)
    theirs = hf.model.rotary_emb(torch.zeros(1), torch.arange(1024)[None])
    for their, our, true in zip(theirs, model.rope.table(1024), (exact.cos(), exact.sin())):
        assert 1e-5 < (their[0, :, :32].double() - true).abs().max() < 1e-4
        assert (our.double() - true).abs().max() < 3.1e-8

    logits = model(tokens)
    assert 0 < (hf_logits(hf, tokens) - logits).abs().max() < 3e-3  # transformers as it is, with its own angles
    hf.model.rotary_emb = OurTable(model.rope)
    assert_close(hf_logits(hf, tokens), logits, atol=1e-4, rtol=0)
    assert window_nll(model, tokens[0]).mean() < 5  # a trained model: a uniform guess costs ln 4096 = 8.3
    rope = load_model(bundled.path, bundled.path.parent / "rope.json", device="meta").rope
    assert rope.scale == 8 and rope.long.n_hat == 0  # the factors beside it; config.json can say such


# ---------------------------------------------------------------------------------------------------------------------
# Attention and its kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [7, 4, 1])
def test_attention_is_causal_softmax_of_the_last_queries_over_the_keys_of_their_group(queries, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, t, heads, 8).to(dtype).float() for t, heads in ((queries, 4), (7, 2), (7, 2)))
    out = attention(*(x.to(dtype) for x in (q, k, v)))
    assert out.shape == q.shape and out.dtype == dtype
    for b, t, h in ((0, 0, 0), (0, queries - 1, 1), (1, queries // 2, 2), (1, queries - 1, 3)):
        seen = 7 - queries + t + 1
        weights = (k[b, :seen, h // 2] @ q[b, t, h] / 8 ** 0.5).softmax(0)
        assert_close(out[b, t, h].float(), weights @ v[b, :seen, h // 2], **(
            {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}))


@pytest.mark.parametrize("queries", [7, 3])
def test_flash_attn_4_gets_what_it_needs_and_its_gradients_arrive(monkeypatch, queries):
    """It runs on GPUs only: a stand-in with its signatures, made of plain products."""
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

    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface",
                        SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))
    torch.manual_seed(1)
    inputs = [torch.randn(2, t, heads, 8, requires_grad=True) for t, heads in ((queries, 4), (7, 2), (7, 2))]
    found = []
    for taken in (False, True):
        monkeypatch.setattr(longrope, "can_use_flash_attn_4", lambda q, taken=taken: taken)
        out = attention(*inputs)
        found.append([out, *torch.autograd.grad((out * torch.arange(8.0)).sum(), inputs)])
    for expected, other in zip(*found):
        assert_close(other, expected)
    torch.library.opcheck(longrope.flash_attn_4, tuple(x.detach() for x in inputs), test_utils="test_schema")


@pytest.mark.parametrize("can, changes", [
    (True, {}), (True, {"dtype": torch.float16}), (True, {"head_dim": 80}), (True, {"capability": (10, 0)}),
    (False, {"dtype": torch.float32}), (False, {"head_dim": 60}), (False, {"head_dim": 256}), (False, {"cuda": False}),
    (False, {"capability": (8, 0)}), (False, {"installed": False})])
def test_flash_attn_4_is_taken_where_it_is_installed_and_runs(monkeypatch, tiny_model, can, changes):
    case = {"dtype": torch.bfloat16, "head_dim": 64, "cuda": True, "capability": (9, 0), "installed": True} | changes
    monkeypatch.setattr(longrope, "has_flash_attn_4", case["installed"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    assert longrope.can_use_flash_attn_4(SimpleNamespace(
        is_cuda=case["cuda"], dtype=case["dtype"], device="cuda", shape=(1, 9, 4, case["head_dim"]))) == can
    assert longrope.attention_kernel(tiny_model) != "flash-attn-4"  # on a CPU
    monkeypatch.setattr(longrope, "can_use_flash_attn_4", lambda q: q.shape[-1] == HEAD_DIM)
    assert longrope.attention_kernel(tiny_model) == "flash-attn-4"


def test_some_heads_at_a_time_give_the_same_logits_and_gradients(tmp_path, monkeypatch):
    hf = save_tiny(tmp_path, num_key_value_heads=4, attention_bias=True)
    model, tokens, used = load_model(tmp_path, device="cpu").requires_grad_(True), random_tokens(100), []
    assert_same_logits(model, hf, 100)
    weights = torch.rand(1, 100, VOCAB)  # not all logits alike

    def measured():
        logits = model(tokens)
        return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]

    def counted(q, k, v, plain=longrope.attention):
        used.append((q.shape[2], k.shape[2]))
        return plain(q, k, v)
    whole = measured()
    for block in model.model.layers:
        block.chunk = 64
    monkeypatch.setattr(longrope, "attention", counted)
    for at_once, calls in ((100 * 64 * 4 + 1, [(4, 4)]), (100 * 64 * 3 + 1, [(3, 3), (1, 1)]),
                           (100 * 64 + 1, [(1, 1)] * 4)):
        monkeypatch.setattr(longrope, "AT_ONCE", at_once)
        used.clear()
        for ours, expected in zip(measured(), whole, strict=True):
            assert_close(ours, expected, atol=1e-3, rtol=1e-3)
        assert used == calls * 2  # layers
    monkeypatch.setattr(longrope, "AT_ONCE", 100 * 64)
    with pytest.raises(UserError, match=r"100 tokens are too many .* 6400 numbers, .* cannot count 6400"):
        model(tokens)


def test_groups_of_heads_count_the_queries_that_share_a_key_head_or_the_keys_of_all_processes():
    llama = config_of(32, 8, 128)  # Llama-3-8B
    for tokens, processes, each in ((2**18, 1, 8), (2**19, 1, 7), (2**21, 1, 1), (2**18, 8, 7), (2**19, 16, 1)):
        groups = [range(8)[heads or slice(None)] for heads in head_groups(llama, tokens, processes)]
        assert sum(map(list, groups), []) == [*range(8)] and max(map(len, groups)) == each
        assert tokens * 128 * each * max(4, processes) < 2**31
    for tokens, processes in ((2**22, 1), (2**20, 16)):
        with pytest.raises(UserError, match=f"{tokens} tokens are too many"):
            head_groups(llama, tokens, processes)


def test_generating_over_several_groups_is_refused(tiny_model, monkeypatch):
    assert len(generate(tiny_model, random_tokens(20)[0], 3)) == 3
    monkeypatch.setattr(longrope, "AT_ONCE", 20 * HEAD_DIM * 2 * 2)
    assert len(generate(tiny_model, random_tokens(19)[0], 3)) == 3
    with pytest.raises(UserError, match="generating"):
        generate(tiny_model, random_tokens(20)[0], 3)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that Dynamo would compile on a GPU. More of one function than its limit of 8 are an error."""
    made, is_compiled = [], longrope.is_compiled
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: [made.append(graph), graph][1])
    monkeypatch.setattr(longrope, "is_compiled", lambda x: is_compiled(SimpleNamespace(shape=x.shape, is_cuda=True)))
    torch._dynamo.reset()
    assert torch._dynamo.config.recompile_limit == 8
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield made
    torch._dynamo.reset()


def test_measuring_compiles_few_graphs_for_all_lengths_ropes_and_layers_and_none_for_groups_or_to_decode(
        bundled, graphs, monkeypatch):
    model = load_model(bundled.path, device="cpu")

    def measured():
        found = []
        for name in ("none", "yarn:8"):
            model.rope = load_model(bundled.path, name, device="meta").rope
            found += [window_nll(model, random_tokens(length)[0]) for length in (48, 130, 2, 300)]
        return torch.cat(found), generate(model, random_tokens(40)[0], 1)
    monkeypatch.setattr(longrope, "compiling", False)
    expected = measured()
    assert not graphs
    monkeypatch.setattr(longrope, "compiling", True)
    for chunk, made in ((4096, 2), (64, 3)):  # the second time some tokens and one head after another
        for block in model.model.layers:
            block.chunk = chunk
        assert_close(measured(), expected, atol=1e-3, rtol=1e-3)
        monkeypatch.setattr(longrope, "AT_ONCE", 300 * 64 * 2 + 1)
        assert len(graphs) == made  # before attention, behind it, and behind it of a part, which lies otherwise
    generate(model, random_tokens(40)[0], 9)
    assert len(graphs) == made


def test_training_compiles_few_graphs_for_all_batches_and_lengths(tiny, graphs):
    model = load_model(tiny, device="cpu").requires_grad_(True)
    finetune.recompute(model)
    for batch, length in ((1, 64), (2, 32), (4, 16), (3, 64), (1, 48)):
        finetune.loss_of(model, random_tokens(batch * length).view(batch, length), torch.bfloat16).backward()
    window_nll(model, random_tokens(48)[0])
    assert 0 < len(graphs) <= 8


def test_the_chunks_of_wide_and_narrow_models():
    """Whole multiples of 4096 tokens; the MLP's activations at most 1 GiB in bfloat16, but for the widest."""
    def chunk(intermediate_size):
        config = SimpleNamespace(hidden_size=8, biased=(), qk_norm=False, intermediate_size=intermediate_size,
                                 rms_norm_eps=1e-5, **vars(config_of(2, 1, 4)))
        with torch.device("meta"):
            return longrope.Block(config).chunk
    assert [chunk(width) for width in (1536, 14336, 28672, 200_000)] == [348160, 36864, 16384, 4096]


def test_chunks_of_tokens_give_the_same_logits(bundled):
    model, tokens, made = load_model(bundled.path, device="cpu"), random_tokens(200), []
    whole = model(tokens)

    def note(module, inputs):
        assert not any(earlier() is not None for earlier, _ in made)  # one chunk's activations at a time
        made.append((weakref.ref(inputs[0]), inputs[0].shape[1]))
    for block in model.model.layers:
        block.chunk = 64  # three and a rest
        block.mlp.down_proj.register_forward_pre_hook(note)
    assert_close(model(tokens), whole, atol=1e-4, rtol=1e-4)
    assert [size for _, size in made] == [64, 64, 64, 8] * 6
    made.clear()
    assert_close(model(tokens.expand(3, -1)), whole.expand(3, -1, -1), atol=1e-4, rtol=1e-4)
    assert [size for _, size in made] == ([21] * 9 + [11]) * 6  # of three sequences, as much at a time


@pytest.mark.parametrize("trained", ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "norm"])
def test_gradients_of_any_parameter_keep_the_tokens_together(tiny_model, trained):
    weight = tiny_model.get_parameter(f"model.{trained}.weight").requires_grad_(True)
    expected = torch.autograd.grad(tiny_model(random_tokens(40)).sum(), weight)
    for block in tiny_model.model.layers:
        block.chunk = 16
    assert_close(torch.autograd.grad(tiny_model(random_tokens(40)).sum(), weight), expected)


def test_utilisation_is_of_all_gpus_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(longrope, "world_size", lambda: 4)
    assert longrope.utilisation(989e12, 0.5, torch.device("cuda")) == 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    assert longrope.utilisation(1e12, 1, torch.device("cuda")) is None
    assert longrope.utilisation(1e12, 1, torch.device("cpu")) is None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_on_the_meta_device_no_weights_are_read(tiny, tmp_path):
    shutil.copy(tiny / "config.json", tmp_path)
    model = load_model(tmp_path, device="meta")
    assert all(p.is_meta for p in model.parameters()) and model.window == WINDOW and model.path == tmp_path


@pytest.mark.parametrize("rope", [None, make_rope(random_factors(1, 4), 4.0, n_hat=5)], ids=["plain", "long"])
def test_save_and_load_give_back_the_weights_and_the_rope(tiny, tmp_path, rope):
    model, tokens = load_model(tiny, rope, device="cpu"), random_tokens(3 * WINDOW)
    save_model(model, tmp_path, dtype=torch.float32)
    again = load_model(tmp_path, device="cpu")
    assert again.rope == model.rope and again.window == WINDOW
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert torch.equal(again(tokens), model(tokens))
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert all(file.stat().st_mode & 0o044 for file in tmp_path.iterdir())  # others may read them
    save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")  # in bfloat16 unless said otherwise
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(saved[k], v.bfloat16()) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rope", ["none", "pi", "ntk", "yarn"])
def test_transformers_loads_a_saved_directory_as_it_is(tiny, tmp_path, rope):
    model = load_model(tiny, rope, 4 * WINDOW, "cpu")
    save_model(model, tmp_path, dtype=torch.float32)
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and hf.dtype == torch.float32
    assert hf.config.max_position_embeddings == 4 * WINDOW
    assert_same_logits(model, hf.eval(), WINDOW, WINDOW + 1, 4 * WINDOW)
    text = prose(9, 50)
    ids = load_tokenizer(tmp_path).encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids and ids[0] == BOS


def test_a_rope_is_exported_alike_from_a_search_that_kept_it_and_from_its_file(tiny, tmp_path):
    model = load_model(tiny, device="meta")
    model.rope = search.first_stage(model.rope, 4 * WINDOW).put(plain(HEAD_DIM // 2), 4 * WINDOW)  # it kept "none"
    assert model.rope.short == model.rope.long
    save_config(model, tmp_path / "kept")
    model.rope = load_rope(tmp_path / "kept" / "rope.json")
    save_config(model, tmp_path / "read")
    kept, read = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "read"))
    assert kept == read and kept["max_position_embeddings"] == 4 * WINDOW


def test_limits_that_were_the_window_grow_with_it_and_others_stay(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "in")
    (source / "tokenizer_files").mkdir()
    for limit, expected in ((WINDOW, 4 * WINDOW), (WINDOW - 1, WINDOW - 1), (8 * WINDOW, 8 * WINDOW), (None, None)):
        write_json(source / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                      "model_max_length": limit})
        write_json(source / "generation_config.json", {"max_length": limit, "do_sample": False})
        save_model(load_model(source, "yarn:4", device="cpu"), tmp_path / "out")
        said = [read_json(tmp_path / f"out/{name}_config.json") for name in ("tokenizer", "generation")]
        assert said[0]["model_max_length"] == said[1]["max_length"] == expected
        if limit == WINDOW:
            tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(prose(9, 1000), truncation=True).input_ids
            assert len(tokens) == GenerationConfig.from_pretrained(tmp_path / "out").max_length == 4 * WINDOW


def test_load_model_takes_the_rope_from_where_it_is_told_to(tiny, tmp_path):
    rope = make_rope(random_factors(1, 4), 4.0, n_hat=5)
    path, unscaled = shutil.copytree(tiny, tmp_path / "copy"), load_model(tiny, device="meta").config.rope
    assert unscaled.long == unscaled.trained == plain(HEAD_DIM // 2)
    write_json(path / "rope.json", rope_to_dict(rope))
    for directory, given, expected in (
            (path, None, rope), (path, "config", unscaled), (tiny, None, unscaled), (tiny, rope, rope),
            (tiny, path / "rope.json", rope), (tiny, str(path / "rope.json"), rope)):
        assert load_model(directory, given, device="meta").rope == expected
    for name, formula in FORMULAS.items():
        expected = replace(unscaled, long=formula(HEAD_DIM // 2, 10000.0, WINDOW, 3.0), scale=3.0)
        assert load_model(path, name, 3 * WINDOW, "meta").rope == expected


def test_a_device_or_a_path_that_is_not_there_is_the_users_mistake(tiny, tmp_path, monkeypatch):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(UserError, match=f"device {device}"):
            load_model(tiny, device=device)
        monkeypatch.setenv("RANK", "0")  # as torchrun sets it
        with pytest.raises(UserError, match=f"device {device}"):
            join_processes(device)
        monkeypatch.delenv("RANK")
    assert load_model(tiny, device="cpu:0").unembedding.device.type == "cpu"
    for path in (tmp_path / "nowhere", "./nowhere", "./out/nowhere", "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"nowhere: no such directory|config\.json: .*No such file") as e:
            load_model(path, device="cpu")
        assert "Hub" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Measure


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
        for ours, reference in zip(measured(lambda h, u: token_nll(h, u, targets, chunk)), expected):
            assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert_close(token_nll(hidden, unembedding, targets, chunk), expected[0], atol=1e-5, rtol=1e-5)


def test_token_nll_keeps_no_logits_for_the_backward_pass():
    hidden, unembedding = torch.randn(64, 16, requires_grad=True), torch.randn(VOCAB, 16)
    targets, saved = torch.randint(VOCAB, (64,)), []

    def note(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        F.cross_entropy(F.linear(hidden, unembedding), targets)
        assert any(shape[-1:] == (VOCAB,) for shape in saved)  # what is to be avoided would be seen here
        saved.clear()
        token_nll(hidden, unembedding, targets, 16).sum().backward()
    assert not any(shape[-1:] == (VOCAB,) for shape in saved), saved


@pytest.mark.parametrize("first", [1, 2, 100, 3 * WINDOW - 1])
def test_a_window_is_measured_from_its_first_scored_token_on(tiny_model, tiny_rope, first):
    tiny_model.rope, tokens = tiny_rope, random_tokens(3 * WINDOW)[0]
    nll, log_p = window_nll(tiny_model, tokens, first), tiny_model(tokens[None])[0].log_softmax(-1)
    assert nll.shape == (3 * WINDOW - first,) and nll.dtype == torch.float64 and nll.device.type == "cpu"
    by_hand = torch.stack([-log_p[t - 1, tokens[t]] for t in range(first, len(tokens))])
    assert_close(nll, by_hand.double(), atol=1e-4, rtol=0)
    probable = over_window(tiny_model, tokens, first, lambda hidden, matrix, _: (hidden @ matrix.T).argmax(-1))
    assert probable.tolist() == log_p[first - 1:-1].argmax(-1).tolist()


def test_a_loss_that_is_not_finite_is_the_users_mistake_and_perplexity_is_of_tokens(tiny_model):
    tiny_model.model.norm.weight[3] = math.nan
    with pytest.raises(UserError, match="the loss of 9 of 9 tokens is not finite"):
        window_nll(tiny_model, random_tokens(10)[0])
    assert perplexity([3.0, 1.0], 8) == pytest.approx(math.exp(0.5)) and perplexity([], 0) is None
    assert math.isfinite(perplexity([1e6], 1))


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

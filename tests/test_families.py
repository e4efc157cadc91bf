"""Checkpoints of every supported family: against transformers', there and back again, and damaged ones."""
import json
import pickle
import re
import shutil
from fnmatch import fnmatch

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    BOS,
    EOS,
    VOCAB,
    WINDOW,
    complaint,
    hf_logits,
    random_factors,
    random_tokens,
    read_lines,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import eval_ppl
import search
from longrope import Rope, UserError, load_model, model_directory, save_model

HEAD_DIM, THETA = 32, 10000.0  # heads of hidden_size / heads, since Qwen2 and Phi3 have no head_dim of their own
LONGROPE = {"rope_type": "longrope", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": WINDOW,
            "long_factor": list(random_factors(1, 4, HEAD_DIM // 2)), "attention_factor": 1.2,
            "short_factor": list(random_factors(2, 1.2, HEAD_DIM // 2))}
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": WINDOW}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral, sliding": (transformers.MistralConfig, {"sliding_window": 4 * WINDOW}),
    "phi3": (transformers.Phi3Config, {"pad_token_id": EOS, "original_max_position_embeddings": WINDOW}),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": False}),
}


def save_family(path, family, shard="5GB", rope=None, dtype=torch.float32, **changes):
    """Write a random tiny model of the family as transformers does, and return transformers' own model of it."""
    kind, own = FAMILIES[family]
    config = kind(**{
        "vocab_size": VOCAB, "hidden_size": 4 * HEAD_DIM, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": THETA}), "bos_token_id": BOS,
        "eos_token_id": EOS, "initializer_range": 0.07, "tie_word_embeddings": False, **own, **changes})
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in hf.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # ones and zeros would hide what is forgotten
            weight.data.uniform_(0.5, 1.5)
    for weight in hf.parameters():  # not hf.to(dtype), which rounds the frequencies of its rope as well
        weight.data = weight.data.to(dtype)
    hf.save_pretrained(path, max_shard_size=shard)
    for weight in hf.parameters():
        weight.data = weight.data.float()
    return hf


def assert_same_logits(model, hf, *lengths):
    for length in lengths:
        tokens = random_tokens(length)
        theirs = hf_logits(hf, tokens)
        assert theirs.std() > 0.1  # there is something to compare
        assert_close(model(tokens), theirs, atol=1e-4, rtol=0)


def edit_config(path, **changes):
    """Change config.json; `...` takes a key away."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def to_old_config(path):
    """config.json as transformers 4 writes it, in which the type of a Phi-3's longrope was once "su"."""
    config = json.loads((path / "config.json").read_text())
    rope = {k: v for k, v in config["rope_parameters"].items() if k != "partial_rotary_factor"}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    kind = "su" if config["model_type"] == "phi3" and kind == "longrope" else kind
    edit_config(path, rope_parameters=..., rope_theta=theta, dtype=..., torch_dtype=config["dtype"],
                rope_scaling=None if kind == "default" else rope | {"type": kind})


def copy(source, path):
    shutil.copytree(source, path)
    return path


@pytest.fixture(scope="module")
def phi3(tmp_path_factory, tiny):
    """A sharded Phi3 in bfloat16 with a tokenizer and a generation config: as much as a checkpoint can have."""
    path = tmp_path_factory.mktemp("phi3")
    save_family(path, "phi3", shard="150KB", dtype=torch.bfloat16, auto_map={"AutoConfig": "some_code.Config"})
    shutil.copy(tiny / "tokenizer.json", path)
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    (path / "pytorch_model.bin").write_bytes(b"not to be read")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_logits_of_transformers(tmp_path, family, old):
    for name, rope in (("plain", None), ("long", LONGROPE)):
        window = 4 * WINDOW if rope else WINDOW
        hf = save_family(tmp_path / name, family, "150KB", rope, max_position_embeddings=window)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        if old:
            to_old_config(tmp_path / name)
        model = load_model(tmp_path / name, device="cpu")
        assert model.window == WINDOW
        assert_same_logits(model, hf, *((WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW) if rope else (WINDOW,)))


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", [
    LLAMA3, {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": WINDOW},
    {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": WINDOW,
     "beta_fast": 8.0, "beta_slow": 2.0},
], ids=["llama3", "linear", "yarn", "yarn with betas"])
def test_the_ropes_of_configs_are_those_of_transformers(tmp_path, rope, old):
    hf = save_family(tmp_path, "llama", rope=rope, max_position_embeddings=4 * WINDOW)
    if old:
        to_old_config(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert len(set(model.rope.rescale_factors)) > 1 or rope["rope_type"] == "linear"
    assert model.window == (WINDOW if rope["rope_type"] == "yarn" else 4 * WINDOW)  # the others were trained so
    assert_same_logits(model, hf, WINDOW, 4 * WINDOW)


def test_extensions_of_llama_3_1_are_on_top_of_the_rope_it_was_trained_with(tmp_path):
    save_family(tmp_path, "llama", rope=LLAMA3, max_position_embeddings=4 * WINDOW)
    trained = load_model(tmp_path, device="cpu").rope
    for name in ("none", "pi", "ntk", "yarn"):
        rope = load_model(tmp_path, name, 8 * WINDOW, device="cpu").rope
        alone = getattr(Rope, name)(HEAD_DIM, THETA, 4 * WINDOW, 2.0)
        assert_close(rope.rescale_factors, tuple(np.multiply(alone.rescale_factors, trained.rescale_factors)))
        assert rope.attention_factor == alone.attention_factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_the_dtype_asked_for(tmp_path, dtype):
    hf = save_family(tmp_path, "phi3", dtype=dtype)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == dtype
    assert_same_logits(load_model(tmp_path, device="cpu"), hf, WINDOW)
    assert {p.dtype for p in load_model(tmp_path, device="cpu", dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_frequencies_stored_in_old_llamas_are_passed_over(tmp_path):
    hf = save_family(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, file)
    assert_same_logits(load_model(tmp_path, device="cpu"), hf, WINDOW)


def test_a_length_beyond_the_sliding_window_is_refused_unless_it_is_switched_off(tmp_path, tiny, books, capsys):
    for family, changes in (("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})):
        path = tmp_path / family
        hf = save_family(path, family, sliding_window=WINDOW, max_position_embeddings=4 * WINDOW, **changes)
        shutil.copy(tiny / "tokenizer.json", path)
        model = load_model(path, device="cpu")
        assert_same_logits(model, hf, WINDOW)
        with pytest.raises(UserError, match="65 tokens: .* last 64 only; --no-sliding-window"):
            model(random_tokens(WINDOW + 1))
        whole = load_model(path, device="cpu", sliding_window=False)
        assert (whole(random_tokens(WINDOW + 9)) - hf_logits(hf, random_tokens(WINDOW + 9))).abs().max() > 0.01
        save_model(whole, tmp_path / "out", dtype=torch.float32)  # transformers too must then attend to all
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert_same_logits(whole, again, WINDOW + 9)
    common = ("--model", path, "--data", books, "--len", WINDOW + 1)
    assert "last 64 only" in complaint(eval_ppl.main, capsys, *common, "--out", tmp_path / "ppl")
    assert "last 64 only" in complaint(search.main, capsys, *common[:-1], 4 * WINDOW + 1, "--out", tmp_path / "search")
    eval_ppl.main([*map(str, common), "--rope", "none", "--samples", "1", "--device", "cpu", "--no-sliding-window",
                   "--out", str(tmp_path / "ppl")])


def test_a_mistral_config_that_is_silent_means_a_sliding_window_of_4096(tmp_path):
    save_family(tmp_path, "mistral")
    assert load_model(tmp_path, device="cpu").config.sliding_window is None
    edit_config(tmp_path, sliding_window=...)
    assert load_model(tmp_path, device="cpu").config.sliding_window == 4096


def test_a_sliding_window_that_qwen2_does_not_use_is_none(tmp_path):
    save_family(tmp_path, "qwen2")
    for use, window in ((True, 32), (False, None), (..., None)):
        edit_config(tmp_path, sliding_window=32, use_sliding_window=use)
        assert load_model(tmp_path, device="cpu").config.sliding_window == window


def test_of_a_hub_repository_only_the_needed_files_are_fetched(monkeypatch, tmp_path):
    def snapshot_download(name, allow_patterns):
        files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
                 "tokenizer.model", "generation_config.json", "README.md", "pytorch_model.bin", "modeling_code.py",
                 "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx"]
        fetched.extend(file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns))
        return tmp_path
    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_directory("some/model") == tmp_path
    assert fetched == ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                       "tokenizer.json", "tokenizer.model", "generation_config.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_that_of_transformers_by_its_config_alone_and_comes_back(tmp_path, family):
    save_family(tmp_path / "in", family, max_position_embeddings=WINDOW)
    edit_config(tmp_path / "in", original_max_position_embeddings=...)  # Phi3 looks here, and assumes 4096
    rope = Rope.longrope(random_factors(3, 4, HEAD_DIM // 2), THETA, WINDOW, 4.0)
    model = load_model(tmp_path / "in", rope, device="cpu")
    save_model(model, tmp_path / "out", dtype=torch.float32)
    stored, saved = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert stored.keys() == saved.keys() and all(torch.equal(stored[k], saved[k]) for k in saved)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    alone = load_model(tmp_path / "out", "config", device="cpu")
    assert_same_logits(alone, hf.eval(), WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)
    again = load_model(tmp_path / "out", device="cpu")
    tokens = random_tokens(WINDOW + 1)
    assert again.rope == rope and torch.equal(again(tokens), model(tokens))


def test_a_rope_that_the_config_has_already_stays_in_its_words(tmp_path):
    save_family(tmp_path / "in", "llama", rope=LLAMA3, max_position_embeddings=4 * WINDOW)
    model = load_model(tmp_path / "in", device="cpu")
    save_model(model, tmp_path / "out", dtype=torch.float32)
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out"))
    assert before == after and not (tmp_path / "out" / "rope.json").exists()


def test_saving_over_a_sharded_model_leaves_none_of_its_weights(tmp_path, phi3):
    out = copy(phi3, tmp_path / "out")
    model = load_model(phi3, device="cpu")
    model.lm_head.weight.zero_()
    save_model(model, out)
    assert [f.name for f in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not load_model(out, device="cpu").lm_head.weight.any()


def run_search(model, books, out, *more):
    search.main([*map(str, ("--model", model, "--data", books, "--len", 4 * WINDOW, "--samples", 1, "--out", out,
                            "--population-size", 4, "--iterations", 0, "--device", "cpu", *more))])


def test_an_export_links_the_weights_and_says_what_the_config_cannot(tmp_path, phi3, books, capsys):
    out = tmp_path / "export"
    out.mkdir()
    (out / "model-00009-of-00009.safetensors").write_bytes(b"of a model that was here")
    run_search(phi3, books, tmp_path / "search", "--n-hat", 0, "--export", out)
    said = capsys.readouterr().err
    assert "config.json has no place for short_attention_factor 1 (transformers will take 1.15" in said
    assert "n_hat" not in said and "short_max_length" not in said
    shards = sorted(f.name for f in phi3.glob("*.safetensors*"))
    assert len(shards) > 3 and sorted(f.name for f in out.glob("*.safetensors*")) == shards
    assert all((out / name).samefile(phi3 / name) for name in shards)
    assert {f.name for f in out.iterdir()} - {*shards} == {
        "config.json", "rope.json", "tokenizer.json", "generation_config.json"}
    assert not (out / "tokenizer.json").samefile(phi3 / "tokenizer.json")  # one may be edited without the other
    config = json.loads((out / "config.json").read_text())
    rope = Rope.load(tmp_path / "search" / "rope.json")
    assert Rope.load(out / "rope.json") == rope and "auto_map" not in config and config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 4 * WINDOW
    assert (config["rope_parameters"]["short_mscale"], config["rope_parameters"]["long_mscale"]) == (
        1.0, rope.attention_factor)
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert_same_logits(load_model(out, "config", device="cpu"), hf, WINDOW, WINDOW + 1, 4 * WINDOW)

    run_search(phi3, books, tmp_path / "search", "--n-hat", 0, "--resume", "--export", out)  # over the last one
    assert sorted(f.name for f in out.glob("*.safetensors*")) == shards and not list(out.glob("*.part"))


def test_an_export_refuses_n_hat_before_the_search_unless_allowed(tmp_path, phi3, books, capsys):
    common = ("--model", phi3, "--data", books, "--len", 4 * WINDOW, "--out", tmp_path / "s",
              "--export", tmp_path / "e")
    assert "--n-hat 0" in complaint(search.main, capsys, *common)
    assert "--allow-n-hat" in complaint(search.main, capsys, *common, "--n-hat", 8)
    Rope.longrope((1.5,) * (HEAD_DIM // 2), THETA, WINDOW, 2.0, n_hat=4).save(tmp_path / "rope.json")
    init = ("--init", tmp_path / "rope.json")
    short = ("--short", "--len", WINDOW)  # the long set stays as it is
    assert "--init is above 0" in complaint(search.main, capsys, *common, "--n-hat", 0, *init, *short)
    assert "own directory" in complaint(search.main, capsys, *common[:-1], phi3, "--n-hat", 0)
    assert not (tmp_path / "s").exists() and not (tmp_path / "e").exists()
    run_search(phi3, books, tmp_path / "second", "--n-hat", 0, *init, "--export", tmp_path / "second" / "e")
    assert Rope.load(tmp_path / "second" / "e" / "rope.json").n_hat == 0
    run_search(phi3, books, tmp_path / "s", "--n-hat", 8, "--allow-n-hat", "--export", tmp_path / "e")
    assert "long_n_hat" in capsys.readouterr().err or Rope.load(tmp_path / "e" / "rope.json").n_hat == 0
    assert read_lines(tmp_path / "s" / "history.jsonl")[1:]


@pytest.mark.parametrize("n_hats", [(0, 8), (4, 8)])
def test_factors_found_are_exported_if_their_n_hat_is_0(tmp_path, phi3, books, capsys, monkeypatch, n_hats):
    monkeypatch.setattr(search, "N_HAT", n_hats)
    common = (phi3, books, tmp_path / "s", "--max-evals", 3)  # the formulas, with the n_hat nearest to 0
    run_search(*common)
    export = ("--resume", "--export", tmp_path / "e")
    if n_hats[0]:
        with pytest.raises(UserError, match="config.json cannot say the n_hat that was found, 4: search with --n-hat"):
            run_search(*common, *export)
        assert Rope.load(tmp_path / "s" / "rope.json").n_hat == 4 and not (tmp_path / "e").exists()
        export += ("--allow-n-hat",)
    run_search(*common, *export)
    assert Rope.load(tmp_path / "e" / "rope.json").n_hat == n_hats[0]
    assert "the rest of the search (0 candidates)" in capsys.readouterr().out


def test_every_loss_of_the_config_is_named(tmp_path, capsys):
    save_family(tmp_path / "in", "llama")
    plain = Rope.none(HEAD_DIM, THETA, WINDOW)
    factors = (2.0,) * (HEAD_DIM // 2)
    for rope, said in ((Rope(factors, THETA, WINDOW, 2.0, 8),
                        "long_n_hat 8 (transformers will take 0), short_n_hat 8 (transformers will take 0)"),
                       (Rope(factors, THETA, WINDOW, 2.0, 0, 1.5, plain, WINDOW),
                        "short_attention_factor 1 (transformers will take 1.5)"),
                       (Rope(factors, THETA, WINDOW, 2.0, 0, 1.0, plain, 100),
                        "short_max_length 100 (transformers will take 64)"),
                       (Rope(factors, THETA, WINDOW, 2.0, 0, 1.0, plain, WINDOW), None)):
        model = load_model(tmp_path / "in", rope, device="cpu")
        capsys.readouterr()
        save_model(model, tmp_path / "out")
        assert capsys.readouterr().err == (f"{tmp_path / 'out'}: config.json has no place for {said}; rope.json beside "
                                           "it, which this program reads, has\n" if said else "")


def test_all_files_of_a_tokenizer_are_copied(tmp_path, tiny):
    source, names = copy(tiny, tmp_path / "in"), ("tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt")
    for name in (*names, "tokenizer_config.json", "pytorch_model.bin", "modeling_code.py"):
        (source / name).write_text("{}")
    save_model(load_model(source, device="cpu"), tmp_path / "out")
    copied = {f.name for f in (tmp_path / "out").iterdir()}
    assert copied >= {*names, "tokenizer_config.json", "tokenizer.json"}
    assert not copied & {"pytorch_model.bin", "modeling_code.py"}


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize("damage, said", [
    (lambda p: (p / "s2").write_bytes((p / "s2").read_bytes()[:-100]), "s2: "),
    (lambda p: (p / "s2").write_bytes(b""), "s2: "),
    (lambda p: (p / "s2").write_bytes(pickle.dumps({"a": 1})), "s2: "),
    (lambda p: (p / "s2").unlink(), "s2"),
    (lambda p: save_file(without(load_file(p / "s2"), QKV), p / "s2"), "Missing key.*q_proj"),
    (lambda p: save_file(without(load_file(p / "s2"), "model.norm.weight"), p / "s2"), "Missing key.*norm.weight"),
    (lambda p: save_file(load_file(p / "s2") | {QKV: torch.ones(250, 128)}, p / "s2"), r"qkv_proj.*\(250, 128\)"),
    (lambda p: save_file(load_file(p / "s2") | {QKV: torch.ones(256, 99)}, p / "s2"), "size mismatch.*q_proj"),
    (lambda p: save_file(load_file(p / "s2") | {"model.norm.weight": torch.ones(5)}, p / "s2"), "size mismatch.*norm"),
    (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "index.json: no weight_map"),
    (lambda p: (p / "model.safetensors.index.json").write_text("{"), "index.json"),
    (lambda p: [f.unlink() for f in p.glob("*s[12]*")] + [(p / "model.safetensors.index.json").unlink()],
     "no .safetensors file"),
    (lambda p: edit_config(p, architectures=["MambaForCausalLM"], model_type="mamba"),
     "MambaForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Phi3For"),
    (lambda p: edit_config(p, architectures=["Phi3ForSequenceClassification"]), "Phi3ForSequenceClassification is not"),
    (lambda p: edit_config(p, partial_rotary_factor=0.75, rope_parameters=...), "partial rotary"),
    (lambda p: edit_config(p, rope_parameters=LONGROPE | {"long_factor": [1.0] * 15 + [float("nan")]}), "finite"),
    (lambda p: edit_config(p, rope_parameters=LONGROPE | {"long_factor": [1.0] * 15}), "long_factor has 15"),
    (lambda p: edit_config(p, rope_parameters=LONGROPE | {"long_factor": [1.0], "short_factor": [1.0]}), "1 factors"),
    (lambda p: edit_config(p, rope_parameters=LONGROPE | {"rope_theta": None}), "not a longrope rope"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "llama3 rope.*'factor'"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic' is not supported"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}), "'yarn' is not"),
    (lambda p: (p / "config.json").unlink(), "config.json"),
])
def test_damage_is_told_in_one_line(tmp_path, damaged, tiny, damage, said, capsys):
    path = copy(damaged, tmp_path / "model")
    damage(path)
    line = complaint(eval_ppl.main, capsys, "--model", path, "--len", 64)
    assert re.search(said, line), line


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A Phi3 in two shards with short names, still whole."""
    path = tmp_path_factory.mktemp("whole")
    save_family(path, "phi3")
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    second = [k for k in state if ".1." in k or k == "model.norm.weight"]
    save_file({k: state[k] for k in second}, path / "s2")
    save_file({k: v for k, v in state.items() if k not in second}, path / "s1")
    (path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {k: "s2" if k in second else "s1" for k in state}}))
    load_model(path, device="cpu")
    return path


def test_the_factors_of_a_rope_json_are_checked_too(tmp_path, tiny, capsys):
    rope = Rope.longrope((2.0,) * 32, THETA, WINDOW, 4.0).to_dict()
    for change, said in (({"long_factor": [float("nan")] * 32}, "finite"), ({"long_factor": [2.0] * 31}, "31 factors"),
                         ({"long_factor": [2.0] * 16, "short_factor": [2.0] * 16}, "needs 32")):
        (tmp_path / "rope.json").write_text(json.dumps(rope | change))
        assert said in complaint(eval_ppl.main, capsys, "--model", tiny, "--len", 64, "--rope", tmp_path / "rope.json")


def test_a_tied_model_of_another_family_loads(tmp_path):
    hf = save_family(tmp_path, "qwen2", tie_word_embeddings=True)
    assert_same_logits(load_model(tmp_path, device="cpu"), hf, WINDOW)

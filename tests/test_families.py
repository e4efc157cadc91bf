"""Checkpoints of every supported family: against transformers', there and back again, exported, and damaged."""
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
import transformers
from conftest import (BOS, EOS, VOCAB, WINDOW, assert_same_logits, complaint, edit_config, hf_logits, make_rope,
                      random_factors, random_tokens)
from safetensors.torch import load_file, save_file

import eval_ppl
import search
from longrope import (Factors, Rope, UserError, load_model, load_rope, model_directory, plain, rope_to_dict,
                      save_model, weight_files, write_json)

HEAD_DIM, THETA = 32, 10000.0  # heads of hidden_size / heads, since Qwen2 and Phi3 have no head_dim of their own
PAIRS = HEAD_DIM // 2
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": WINDOW}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": WINDOW}
PAIRS_OF = {"qwen3": 32, "phi4-mini": 12}  # a head_dim of its own, a part that turns


def longrope_of(family, **changes):
    pairs = PAIRS_OF.get(family, PAIRS)
    return {"rope_type": "longrope", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": WINDOW,
            "long_factor": list(random_factors(1, 4, pairs)), "attention_factor": 1.2,
            "short_factor": list(random_factors(2, 1.2, pairs)), **changes}


LONGROPE = longrope_of("llama")
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),  # none
    "phi3": (transformers.Phi3Config, {"pad_token_id": EOS, "original_max_position_embeddings": WINDOW}),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (transformers.Qwen3Config, {"use_sliding_window": False, "head_dim": 64}),
    "phi4-mini": (transformers.Phi3Config, {"pad_token_id": EOS, "original_max_position_embeddings": WINDOW,
                                            "tie_word_embeddings": True, "partial_rotary_factor": 0.75}),
    "qwen2, tied": (transformers.Qwen2Config, {"use_sliding_window": False, "tie_word_embeddings": True}),
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


def transformers_model(path):
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return hf.eval()


def read_config(path):
    return json.loads((path / "config.json").read_text())


def to_old_config(path):
    """config.json as transformers 4 writes it, in which the type of a Phi-3's longrope was once "su"."""
    config = read_config(path)
    rope = config["rope_parameters"]
    theta, kind, part = rope.pop("rope_theta"), rope.pop("rope_type"), rope.pop("partial_rotary_factor", 1)
    kind = "su" if config["model_type"] == "phi3" and kind == "longrope" else kind
    edit_config(path, rope_parameters=..., rope_theta=theta, dtype=..., torch_dtype=config["dtype"],
                partial_rotary_factor=part if part != 1 else ...,
                rope_scaling=None if kind == "default" else rope | {"type": kind})


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
    for path, rope, lengths in ((tmp_path / "plain", None, (WINDOW,)),
                                (tmp_path / "long", longrope_of(family), (WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW))):
        hf = save_family(path, family, "150KB", rope, max_position_embeddings=lengths[-1])
        assert len(list(path.glob("*.safetensors"))) > 1
        if old:
            to_old_config(path)
        model = load_model(path, device="cpu")
        assert model.window == WINDOW
        assert_same_logits(model, hf, *lengths)


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", [
    LLAMA3, {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}, YARN,
    YARN | {"beta_fast": 8.0, "beta_slow": 2.0}, YARN | {"attention_factor": 1.4, "mscale": 2.0},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": None}, YARN | {"mscale": 0.7},
    *[YARN | {"truncate": truncate} for truncate in (None, False, True, 0, 2)]],
    ids=["llama3", "linear", "yarn", "betas", "attention factor", "mscale and all", "mscale",
         *(f"truncate {truncate}" for truncate in (None, False, True, 0, 2))])
def test_the_ropes_of_configs_are_those_of_transformers(tmp_path, rope, old, capsys):
    hf = save_family(tmp_path, "llama", rope=rope, max_position_embeddings=4 * WINDOW)
    if old:
        to_old_config(tmp_path)
    capsys.readouterr()
    model, yarn = load_model(tmp_path, device="cpu"), rope["rope_type"] == "yarn"
    assert len(set(model.rope.long.rescale_factors)) > 1 or rope["rope_type"] == "linear"
    assert model.window == (WINDOW if yarn else 4 * WINDOW)  # the others were trained so
    assert model.rope.trained == (plain(PAIRS) if yarn else model.rope.long)
    assert len(capsys.readouterr().err.splitlines()) == yarn  # what is taken for granted is said
    assert_same_logits(model, hf, WINDOW, 4 * WINDOW)


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_parameters": YARN, "beta_fast": 2},
    {"rope_parameters": LONGROPE | {"factor": None, "attention_factor": None}}, {"rope_parameters": None},
    {"rope_parameters": LONGROPE | {"original_max_position_embeddings": float(WINDOW)}}])
def test_what_is_null_or_said_twice_is_read_as_transformers_reads_it(tmp_path, changes):
    save_family(tmp_path, "llama", rope=YARN | {"factor": 2.0}, max_position_embeddings=4 * WINDOW)
    edit_config(tmp_path, **changes)
    assert_same_logits(load_model(tmp_path, device="cpu"), transformers_model(tmp_path), WINDOW, 4 * WINDOW)


def test_frequencies_and_a_tied_matrix_may_be_stored_too_but_not_another_matrix(tmp_path, capsys):
    hf = save_family(tmp_path, "qwen2, tied")
    state = load_file(file := tmp_path / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": head}, file)
    assert_same_logits(load_model(tmp_path, device="cpu"), hf, WINDOW)
    head[7, 7] += 1
    save_file(state | {"lm_head.weight": head}, file)
    assert "lm_head is not the embedding" in complaint(eval_ppl.main, capsys, "--model", tmp_path, "--len", 64)
    edit_config(tmp_path, tie_word_embeddings=False)  # what to do
    assert_same_logits(load_model(tmp_path, device="cpu"), transformers_model(tmp_path), WINDOW)


def test_weights_are_read_from_the_file_that_transformers_reads(tmp_path):
    save_family(tmp_path, "llama", "150KB")
    state = {name: 1.1 * w for file in tmp_path.glob("*.safetensors") for name, w in load_file(file).items()}
    save_file(state, tmp_path / "model.safetensors")  # the index beside it is stale
    assert_same_logits(load_model(tmp_path, device="cpu"), transformers_model(tmp_path), WINDOW)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]  # what an export copies


@pytest.mark.parametrize("family, changes", [
    ("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}), ("phi3", {})])
def test_a_sliding_window_is_said_not_used_and_not_written(tmp_path, capsys, family, changes):
    hf = save_family(tmp_path / "in", family, sliding_window=WINDOW, max_position_embeddings=4 * WINDOW, **changes)
    edit_config(tmp_path / "in", original_max_position_embeddings=...)
    capsys.readouterr()
    model = load_model(tmp_path / "in", device="cpu")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"slides over the last {WINDOW} tokens" in said[0]
    assert_same_logits(model, hf, WINDOW)
    tokens = random_tokens(WINDOW + 9)
    assert (model(tokens) - hf_logits(hf, tokens)).abs().max() > 0.01
    save_model(model, tmp_path / "out", dtype=torch.float32)
    written = read_config(tmp_path / "out")
    assert written["sliding_window"] is None and not {"use_sliding_window", "layer_types"} & written.keys()
    assert_same_logits(model, transformers_model(tmp_path / "out"), WINDOW + 9)  # it too now attends to all
    capsys.readouterr()
    load_model(tmp_path / "out", device="cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family, changes, window", [
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, 4096), ("mistral", {}, None),
    ("mistral", {"sliding_window": 64}, None), ("llama", {"sliding_window": 32}, None),
    ("phi3", {"sliding_window": 32, "use_sliding_window": False}, 32),  # Qwen's alone
    *[("qwen2", {"sliding_window": 32, "use_sliding_window": use}, window)
      for use, window in ((True, 32), (False, None), (..., None))]])
def test_a_silent_config_means_what_transformers_takes_it_for(tmp_path, capsys, family, changes, window):
    save_family(tmp_path, family)
    edit_config(tmp_path, **changes)
    capsys.readouterr()
    load_model(tmp_path, device="meta")
    said = capsys.readouterr().err
    assert f"last {window} tokens" in said if window else said == ""


def test_a_bias_that_the_config_names_and_the_checkpoint_lacks_is_missed(tmp_path):
    save_family(tmp_path, "llama")
    edit_config(tmp_path, attention_bias=True)
    with pytest.raises(UserError, match="Missing key.*bias"):
        load_model(tmp_path, device="cpu")


def test_of_a_hub_repository_only_the_needed_files_are_fetched(monkeypatch, tmp_path):
    needed = ["config.json", "rope.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
              "tokenizer.json", "tokenizer.model", "generation_config.json"]

    def snapshot_download(name, allow_patterns):
        files = [*needed, "README.md", "pytorch_model.bin", "modeling_code.py", "consolidated.safetensors",
                 "original/consolidated.00.pth", "onnx/model.onnx"]
        fetched.extend(file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns))
        return tmp_path
    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_directory("some/model") == tmp_path and fetched == needed


# ---------------------------------------------------------------------------------------------------------------------
# Out


@pytest.mark.parametrize("kind", ["long", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_that_of_transformers_by_either_spelling_of_its_config_alone(tmp_path, family, kind):
    source, out = tmp_path / "in", tmp_path / "out"
    save_family(source, family, rope=longrope_of(family) if kind == "none" else None, max_position_embeddings=WINDOW)
    rope = "none" if kind == "none" else make_rope(random_factors(3, 4, PAIRS_OF.get(family, PAIRS)), 4.0)
    if kind == "long":
        edit_config(source, original_max_position_embeddings=...)  # Phi3 looks here, and assumes 4096
    model = load_model(source, rope, device="cpu")
    save_model(model, out, dtype=torch.float32)
    stored, saved = (load_file(d / "model.safetensors") for d in (source, out))
    assert stored.keys() == saved.keys() and all(torch.equal(stored[k], saved[k]) for k in saved)
    config = read_config(out)
    parameters, scaling = config["rope_parameters"], config["rope_scaling"]
    part = {"partial_rotary_factor": 0.75} if family == "phi4-mini" else {}
    if family.startswith("phi") and kind == "long":  # all that transformers 4 allows there
        scaling = parameters if scaling == {"type": "longrope", "short_factor": parameters["short_factor"],
                                            "long_factor": parameters["long_factor"]} else None
    assert parameters == (scaling or {"rope_type": "default", "rope_theta": config["rope_theta"]} | part)
    lengths = (WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)[:2 if kind == "none" else 4]
    alone = load_model(out, "config", device="cpu")
    for dropped in ({}, {"rope_parameters": ...}, {"rope_scaling": ..., "rope_theta": ...}):
        edit_config(shutil.copytree(out, tmp_path / "copy", dirs_exist_ok=True), **dropped)
        assert load_model(tmp_path / "copy", "config", device="meta").rope == alone.rope
        assert_same_logits(alone, transformers_model(tmp_path / "copy"), *lengths)
    again, tokens = load_model(out, device="cpu"), random_tokens(WINDOW + 1)
    assert again.rope == model.rope and torch.equal(again(tokens), model(tokens))


def test_a_rope_that_the_config_has_already_stays_in_its_words(tmp_path):
    save_family(tmp_path / "in", "llama", rope=LLAMA3, max_position_embeddings=4 * WINDOW)
    model = load_model(tmp_path / "in", device="cpu")
    save_model(model, tmp_path / "out", dtype=torch.float32)
    before = read_config(tmp_path / "in")
    assert read_config(tmp_path / "out") == before | {  # and in transformers 4's
        "sliding_window": None, "rope_theta": THETA, "rope_scaling": before["rope_parameters"]}
    assert load_rope(tmp_path / "out" / "rope.json") == model.rope


@pytest.mark.parametrize("key, name", [("type", "su"), ("type", "yarn"), ("rope_type", "su")])
def test_a_former_name_of_longrope_is_exported_by_todays(tmp_path, key, name):
    rope = longrope_of("phi3")
    save_family(tmp_path / "in", "phi3", rope=rope, max_position_embeddings=4 * WINDOW)
    edit_config(tmp_path / "in", rope_parameters=..., rope_theta=THETA, original_max_position_embeddings=WINDOW,
                rope_scaling={key: name, "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]})
    model = load_model(tmp_path / "in", device="cpu")
    save_model(model, tmp_path / "out", dtype=torch.float32)
    assert_same_logits(model, transformers_model(tmp_path / "out"), WINDOW, 4 * WINDOW)


def test_a_rope_for_a_model_trained_with_other_factors_is_refused(tmp_path):
    for factor in (8.0, 32.0):
        save_family(tmp_path / f"{factor}", "llama", rope=LLAMA3 | {"factor": factor},
                    max_position_embeddings=4 * WINDOW)
    write_json(tmp_path / "rope.json", rope_to_dict(load_model(tmp_path / "8.0", "yarn:2", device="meta").rope))
    assert load_model(tmp_path / "8.0", tmp_path / "rope.json", device="meta").rope.scale == 2
    save_model(load_model(tmp_path / "32.0", "yarn:4", device="cpu"), tmp_path / "extended")
    for name in ("32.0", "extended"):
        with pytest.raises(UserError, match="trained with other factors"):
            load_model(tmp_path / name, tmp_path / "rope.json", device="meta")


def test_an_export_copies_the_weights_and_says_what_the_config_cannot(tmp_path, phi3, books, capsys):
    out, command = tmp_path / "export", [*map(str, (
        "--model", phi3, "--data", books, "--len", 4 * WINDOW, "--samples", 1, "--out", tmp_path / "search",
        "--population-size", 4, "--iterations", 0, "--attention-factor", "su", "--device", "cpu", "--export",
        tmp_path / "export"))]
    search.main(command)
    said = capsys.readouterr().err
    assert "config.json has no place for short_attention_factor 1 (transformers will take 1.15" in said
    assert "n_hat" not in said and "short_max_length" not in said
    shards = sorted(f.name for f in phi3.glob("*.safetensors*"))
    assert len(shards) > 3 and {f.name for f in out.iterdir()} == {
        *shards, "config.json", "rope.json", "tokenizer.json", "generation_config.json"}
    assert all((out / name).read_bytes() == (phi3 / name).read_bytes() and not (out / name).samefile(phi3 / name)
               for name in shards)  # one may be changed without the other
    config, rope = read_config(out), load_rope(tmp_path / "search" / "rope.json")
    assert load_rope(out / "rope.json") == rope and "auto_map" not in config and config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 4 * WINDOW
    assert [config["rope_parameters"][f"{k}_mscale"] for k in ("short", "long")] == [1.0, rope.long.attention_factor]
    assert_same_logits(load_model(out, "config", device="cpu"), transformers_model(out), WINDOW, WINDOW + 1, 4 * WINDOW)

    write_json(tmp_path / "rope.json", rope_to_dict(make_rope((1.5,) * PAIRS, 2.0, n_hat=4)))
    for more, line in (((), "export: it is --out or has files"), (("--export", phi3), "give a new directory"),
                       (("--export", phi3 / "config.json"), "give a new directory"),
                       (("--export", tmp_path / "e", "--n-hat", "search"), "n_hat"),
                       (("--export", tmp_path / "e", "--n-hat", "8"), "n_hat"),
                       (("--export", tmp_path / "e", "--init", tmp_path / "rope.json"), "n_hat")):
        assert line in complaint(search.main, capsys, *command, "--out", tmp_path / "s", *more)
    assert not (tmp_path / "s").exists() and not (tmp_path / "e").exists()


@pytest.mark.parametrize("long, short, reach, said", [
    (Factors((2.0,) * PAIRS, 8), None, 0,
     "long_n_hat 8 (transformers will take 0), short_n_hat 8 (transformers will take 0)"),
    (Factors((2.0,) * PAIRS, 0, 1.5), plain(PAIRS), WINDOW, "short_attention_factor 1 (transformers will take 1.5)"),
    (Factors((2.0,) * PAIRS), plain(PAIRS), 100, "short_max_length 100 (transformers will take 64)"),
    (Factors((2.0,) * PAIRS), plain(PAIRS), WINDOW, None), (Factors((2.0,) * PAIRS), plain(PAIRS), 0, None)])
def test_every_loss_of_the_config_is_named(tmp_path, capsys, long, short, reach, said):
    save_family(tmp_path / "in", "llama")
    rope = Rope(THETA, WINDOW, plain(PAIRS), long, 2.0, short, reach)
    model = load_model(tmp_path / "in", rope, device="cpu")
    capsys.readouterr()
    save_model(model, tmp_path / "out", dtype=torch.float32)
    err = capsys.readouterr().err
    if not said:
        assert_same_logits(model, transformers_model(tmp_path / "out"), WINDOW, WINDOW + 9)
    assert err.count("\n") == bool(said) and (not said or f"out: config.json has no place for {said}; rope.json" in err)
    assert load_rope(tmp_path / "out" / "rope.json") == (rope if reach else replace(rope, short=None))


def test_what_is_written_is_readable_as_any_new_file_and_links_to_elsewhere_are_not_copied(tmp_path, tiny, capsys):
    source, secret = shutil.copytree(tiny, tmp_path / "in"), tmp_path / "secret"
    secret.write_text("of mine")
    (source / "tokenizer_config.json").symlink_to(secret)
    (source / "vocab.json").symlink_to("tokenizer.json")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("")
    mask = os.umask(0o077)
    save_model(load_model(source, device="cpu"), tmp_path / "out")
    os.umask(mask)
    assert capsys.readouterr().err == f"{source / 'tokenizer_config.json'}: a link out of its directory, not copied\n"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"vocab.json", "config.json", "model.safetensors"} and "tokenizer_config.json" not in names
    copied = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in copied} == {0o600}
    assert "tool_use.jinja" in {file.name for file in copied}
    save_model(load_model(source, device="cpu"), tmp_path / "open")
    assert (tmp_path / "open" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_all_files_of_a_tokenizer_are_copied(tmp_path, tiny):
    source, names = shutil.copytree(tiny, tmp_path / "in"), {
        "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer_config.json"}
    for name in (*names, "pytorch_model.bin", "modeling_code.py"):
        (source / name).write_text("{}")
    save_model(load_model(source, device="cpu"), tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        *names, "tokenizer.json", "generation_config.json", "config.json", "rope.json", "model.safetensors"}


# ---------------------------------------------------------------------------------------------------------------------
# Damage

QKV, NORM, INDEX = "model.layers.1.self_attn.qkv_proj.weight", "model.norm.weight", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Phi3 in two shards with short names."""
    path = tmp_path_factory.mktemp("whole")
    save_family(path, "phi3")
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    second = [k for k in state if ".1." in k or k == NORM]
    save_file({k: state[k] for k in second}, path / "s2")
    save_file({k: v for k, v in state.items() if k not in second}, path / "s1")
    (path / INDEX).write_text(json.dumps({"weight_map": {k: "s2" if k in second else "s1" for k in state}}))
    load_model(path, device="cpu")
    return path


def shard(name, tensor=None):
    """Change a tensor of the second shard; None takes it away."""
    return lambda path: save_file({k: v for k, v in (load_file(path / "s2") | {name: tensor}).items() if v is not None},
                                  path / "s2")


@pytest.mark.parametrize("damage, said", [
    (lambda p: (p / "s2").write_bytes((p / "s2").read_bytes()[:-100]), "s2: "),
    (lambda p: (p / "s2").write_bytes(b""), "s2: "),
    (lambda p: (p / "s2").write_bytes(pickle.dumps({"a": 1})), "s2: "),
    (lambda p: (p / "s2").unlink(), "s2: "),
    (shard(QKV), "Missing key.*q_proj"), (shard(NORM), "Missing key.*norm.weight"),
    (shard(QKV, torch.ones(250, 128)), "(s2|qkv_proj).* 250"), (shard(QKV, torch.ones(256, 99)), "mismatch.*q_proj"),
    (shard(NORM, torch.ones(5)), "size mismatch.*norm"),
    (lambda p: (p / INDEX).write_text("{}"), "index.json: 'weight_map' is missing"),
    (lambda p: (p / INDEX).write_text("{"), "index.json"),
    (lambda p: [(p / name).unlink() for name in ("s1", "s2", INDEX)], "no model.safetensors "),
    (lambda p: (p / "config.json").unlink(), "config.json: .*No such file"),
    *[(lambda p, changes=changes: edit_config(p, **changes), said) for changes, said in (
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
         "MambaForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3"),
        ({"architectures": ["Phi3ForSequenceClassification"]}, "Phi3ForSequenceClassification is not"),
        ({"quantization_config": {"bits": 4}}, "quantised"), ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"architectures": []}, "None is not supported"),
        ({"vocab_size": ...}, "'vocab_size' is missing"), ({"num_attention_heads": ...}, "'num_attention_heads' is"),
        ({"num_hidden_layers": 3}, "Missing key"), ({"num_hidden_layers": 1}, "Unexpected key"),
        ({"intermediate_size": 64}, "128 rows|(s1|gate_up).* 192"), ({"num_attention_heads": "four"}, "'four' is not"),
        ({"architectures": ["LlamaForCausalLM"], "partial_rotary_factor": 0.75, "rope_parameters": ...},
         "a partial_rotary_factor, 0.75, is supported in Phi3"), ({"rms_norm_eps": "1e-5"}, "'1e-5' is not a number"),
        *(({name: size}, f"{name} {re.escape(repr(size))} is not a size")
          for name in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "hidden_size")
          for size in ("4", [4], 128.0, -4, 0, 10**12, True)),
        ({"num_key_value_heads": 3}, "3 key heads for 4"), ({"num_attention_heads": 128}, "heads of 1 dimensions"))],
    *[(lambda p, rope=rope: edit_config(p, rope_parameters=rope), said) for rope, said in (
        (LONGROPE | {"long_factor": [1.0] * 15 + [float("nan")]}, "'NaN' is not a number"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor must be above 0 and below"),
        ({"rope_type": "linear", "rope_theta": THETA}, "'factor' is missing"),
        (LONGROPE | {"long_factor": [1.0] * 15}, "long_factor has 15"),
        (LONGROPE | {"long_factor": [1.0], "short_factor": [1.0]}, "has 1 factors, needs 16"),
        (LONGROPE | {"short_factor": None}, "'short_factor' is missing"),
        ({"rope_type": "llama3", "rope_theta": 1e4}, "'low_freq_factor' is missing"),
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported"),
        (LONGROPE | {"attention_factor": "1"}, "'1' is not a number"), (3, "config.json"))],
    (lambda p: (p / INDEX).write_text(json.dumps({"weight_map": {NORM: "../s1"}})), "s1 is not in its directory"),
    (lambda p: [(p / name).unlink() for name in ("s1", INDEX)] + [os.mkfifo(p / "model.safetensors")],
     "model.safetensors: a pipe or a device"),
])
def test_damage_is_told_in_one_line(tmp_path, whole, damage, said, capsys):
    path = shutil.copytree(whole, tmp_path / "model")
    damage(path)
    line = complaint(eval_ppl.main, capsys, "--model", path, "--len", 64)
    assert str(path) in line and re.search(said, line), line

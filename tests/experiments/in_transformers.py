"""Perplexity of Hugging Face directories in transformers, not in this project, at several lengths.

    $ python tests/experiments/in_transformers.py --models ORIGINAL EXPORTED --yarn 8 --len 65536 262144 --greedy 32 \\
          --data books/test --out out/in-transformers.json

Of the windows that eval_ppl.py takes. --yarn 8: the first model with static YaRN too, as the 7B's card says. All else
is left to transformers: of `longrope` it takes the long factors in sequences longer than the original window, else the
short ones, with one attention factor for both; its cos and sin are in the model's dtype. --greedy 32: what its
generate and this project's say after the shortest windows, with no penalty and no EOS. Where that leads from within
the original window out of it, transformers changes factors on the way with the old keys cached, this project does not.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, __version__

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import longrope  # noqa: E402


def load(path, yarn, window, dtype):
    config = AutoConfig.from_pretrained(path)
    if yarn:
        config.rope_parameters = {"rope_type": "yarn", "rope_theta": config.rope_parameters["rope_theta"],
                                  "factor": yarn, "original_max_position_embeddings": window}
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.inference_mode()
def window_nll(model, tokens):
    """-log p of tokens 1 .. T-1 of one window, (T-1,) float64 on the CPU. Logits exist for 4096 tokens at a time."""
    tokens = tokens.to(model.device)
    hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
    return torch.cat([F.cross_entropy(model.lm_head(h).float(), t, reduction="none")
                      for h, t in zip(hidden.split(4096), tokens[1:].split(4096))]).double().cpu()


def measure(model, windows):
    begun, n = time.perf_counter(), len(windows[0])
    try:
        nll = torch.stack([window_nll(model, tokens) for tokens in windows])  # (documents, T-1)
    except torch.OutOfMemoryError as e:  # a result, too: other models and lengths may fit
        return {"error": str(e)[:200]}
    parts = {"ppl": nll, "ppl_first_quarter": nll[:, :n // 4 - 1], "ppl_last_quarter": nll[:, n * 3 // 4 - 1:]}
    found = {name: longrope.perplexity(part.flatten().tolist(), part.numel()) for name, part in parts.items()}
    return found | {"nll": nll.sum().item(), "tokens": nll.numel(), "seconds": round(time.perf_counter() - begun, 3)}


@torch.inference_mode()
def greedy(model, tokens, ours):
    model.generation_config = GenerationConfig()  # the directory's can have a penalty, and ends at EOS
    out = model.generate(tokens[None].to(model.device), do_sample=False, max_new_tokens=len(ours), output_logits=True,
                         return_dict_in_generate=True)
    theirs = out.sequences[0, len(tokens):].tolist()
    found = {"equal": theirs == ours, "transformers": theirs, "this_project": ours}
    if theirs != ours:
        at = next(i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
        first, second = (logits := out.logits[at][0].float()).topk(2).values.tolist()
        found |= {"first_difference": at, "two_best_differ_by": first - second,
                  "over_this_projects": first - logits[ours[at]].item()}  # the same if this project's is the second
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", required=True, metavar="DIR", help="Hugging Face directories")
    p.add_argument("--yarn", type=float, metavar="F", help="the first model with YaRN of this factor, too")
    p.add_argument("--len", type=int, nargs="+", required=True)
    p.add_argument("--data", nargs="+", default=[], metavar="PATH", help="as eval_ppl.py's")
    p.add_argument("--samples", type=int, default=10, help="documents (default: 10)")
    p.add_argument("--greedy", type=int, metavar="N", help="generate N tokens, too")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    longrope.compiling, lengths = False, sorted(set(args.len))  # generate is as transformers' then
    texts = {path: longrope.windows(longrope.read_documents(args.data, 5 * lengths[-1]), longrope.load_tokenizer(path),
                                    lengths[-1], args.samples) for path in args.models}  # mistakes show now
    found = {"run": longrope.recorded(args) | {"in": f"transformers {__version__}, {dtype}"}, "rows": [], "greedy": []}

    def keep(kind, row):
        found[kind].append(row)
        print(json.dumps(row), flush=True)
        longrope.write_json(args.out, found)
    ropes = [None] * len(args.models) + [f"yarn:{args.yarn}"] * bool(args.yarn)
    for path, rope in zip(args.models + args.models[:1], ropes):
        model = longrope.load_model(path, rope, None, args.device if args.greedy else "meta", dtype)
        names, tokens = zip(*texts[path])
        ours = [longrope.generate(model, t[:lengths[0]], args.greedy) for t in tokens if args.greedy]
        about = {"model": path, "rope": rope or "its own", "window": model.window}
        del model  # two may not fit
        model = load(path, args.yarn if rope else None, about["window"], dtype).to(args.device)
        about["attention_factor"] = model.model.rotary_emb.attention_scaling
        window_nll(model, tokens[0][:64])  # libraries start
        for n in lengths:
            sha256 = longrope.data_hash(x for t in tokens for x in (t[:n], torch.tensor([1])))  # as eval_ppl.py's
            keep("rows", {**about, "length": n, "data_sha256": sha256, **measure(model, [t[:n] for t in tokens])})
        for name, t, own in zip(names, tokens, ours):
            keep("greedy", {**about, "length": lengths[0], "document": name, **greedy(model, t[:lengths[0]], own)})
        del model


if __name__ == "__main__":
    longrope.run(main)

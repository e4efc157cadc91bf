"""Time and memory of the forward pass and of a training step, beside transformers' on the same weights and inputs.

    $ python tests/bench_peers.py                                          # one H100, two minutes
    $ python tests/bench_peers.py --model SMOLLM2_DIR
    $ python tests/bench_peers.py --two-million

One layer of Llama-3-8B's shape and a small model (random weights of SmolLM2-135M's shape, or --model), in bfloat16. In
one run: the rate of a large matrix product, the ceiling; transformers, uncompiled as it is delivered, with PyTorch's
attention; this repository with flash-attn-4, where it is installed, and with the kernel that PyTorch chooses. They take
turns, so that a clock that sinks as the GPU warms is the same for all. Each row: seconds (median of the turns),
tokens/s, TFLOP/s, its share of the ceiling, peak memory above weights and input, how much the result differs from
transformers' (root mean square, relative), and in the JSON the fastest and slowest turn and the longest kernels.
"""
import argparse
import json
import math
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune  # noqa: E402
import longrope  # noqa: E402
from longrope import Llama, attention_kernel, forward_flops, load_model, read_config, recorded  # noqa: E402

LLAMA3 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": True}
SMOLLM2 = LLAMA3 | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0}
FLASH = longrope.has_flash_attn_4


def ours_of(config):
    """Our model with random weights, the same every time."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(read_config(config)).to(torch.bfloat16).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    return model


def with_kernels(model, step):
    """{name: step} with each attention kernel of ours."""
    def forced(flash):
        longrope.has_flash_attn_4 = flash
        return step()
    found = {}
    for flash in [True] * FLASH + [False]:
        longrope.has_flash_attn_4 = flash
        found[attention_kernel(model).removesuffix("_attention")] = partial(forced, flash)
    return found


def timed(step):
    """Seconds of one step, and its result."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    result = step()
    torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def gib_of(step):
    """What a step has at most above what there is before it, in GiB, its result and its seconds."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds, result = timed(step)
    return (torch.cuda.max_memory_allocated() - before) / 2**30, result, seconds


def kernels_of(step, most=15):
    """[[milliseconds, calls, name], ...] of the kernels that take longest in one step, and of all together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        timed(step)
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    rows = [[round(event.self_device_time_total / 1000, 2), event.count, event.key[:160]] for event in found]
    return [[round(sum(row[0] for row in rows), 2), sum(row[1] for row in rows), "all"], *rows[:most]]


class Table:
    def __init__(self, args):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        took = statistics.median(timed(lambda: [a @ b for _ in range(20)])[0] for _ in range(4))
        self.out, self.ceiling, self.rows, ran = args.out, 20 * 2 * 8192**3 / took, [], recorded(args)
        self.about = {"model": args.model or "random weights", "ceiling_tflops": self.ceiling / 1e12,
                      **{key: ran[key] for key in ("python", "torch", "device")},
                      **{name: version(name) for name in ["transformers"] + ["flash-attn-4"] * FLASH}}
        print(f"matrix product 8192^3: {self.ceiling / 1e12:.0f} TFLOP/s\n{'work':36} {'program':14} {'seconds':>8} "
              f"{'ratio':>6} {'tokens/s':>9} {'TFLOP/s':>8} {'share':>6} {'GiB':>7} {'ratio':>6} {'difference':>10}",
              flush=True)

    def compare(self, work, tokens, flops, programs, turns=5):
        """Measure programs {name: step}; the first is what the others are compared with, if it can run."""
        results, gib, took, first = {}, {}, {name: [] for name in programs}, next(iter(programs))
        for name, step in list(programs.items()):
            try:
                step()  # compiles, and warms up
                gib[name], result, _ = gib_of(step)
                results[name] = result.cpu().float()
                del result
            except torch.OutOfMemoryError:
                print(f"{work:36} {name:14} out of memory", flush=True)
                self.rows.append({"work": work, "program": name, "error": "out of memory"})
                del programs[name]
            torch.cuda.empty_cache()
        for _ in range(turns):
            for name, step in programs.items():
                took[name].append(timed(step)[0])
        for name, step in programs.items():
            more, reference = {"fastest": min(took[name]), "slowest": max(took[name])}, results.get(first)
            if reference is not None:
                more |= {"time_ratio": statistics.median(took[name]) / statistics.median(took[first]),
                         "memory_ratio": gib[name] / gib[first],
                         "difference": ((results[name] - reference).norm() / reference.norm()).item()}
            self.add(work, name, tokens, flops, statistics.median(took[name]), gib[name], **more, turns=turns,
                     kernels=kernels_of(step))

    def add(self, work, program, tokens, flops, seconds, gib, **more):
        row = {"work": work, "program": program, "seconds": seconds, "tokens_per_s": tokens / seconds,
               "tflops": flops / seconds / 1e12, "share_of_ceiling": flops / seconds / self.ceiling, "gib": gib, **more}
        self.rows.append(row)
        print(f"{work:36} {program:14} {seconds:8.3f} {row.get('time_ratio', math.nan):6.2f} "
              f"{row['tokens_per_s']:9.3g} {row['tflops']:8.0f} {row['share_of_ceiling']:6.1%} {gib:7.2f} "
              f"{row.get('memory_ratio', math.nan):6.2f} {row.get('difference', math.nan):10.2g}", flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n")


def layer(table, tokens, training):
    """One layer of Llama-3-8B."""
    torch._dynamo.reset()  # graphs of the work before
    model = ours_of(LLAMA3)
    block = model.model.layers[0]
    hf = LlamaDecoderLayer(HFConfig(**LLAMA3, attn_implementation="sdpa"), 0).to("cuda", torch.bfloat16)
    hf.load_state_dict(block.state_dict())
    hf.train(training)
    x = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x) if training else None
    cos, sin = model.rope.table(tokens, x.device)
    both = tuple(torch.cat((t, t), -1)[None].to(x.dtype) for t in (cos, sin))
    flops = 2 * sum(p.numel() for p in block.parameters()) * tokens + 2 * tokens**2 * 32 * 128

    def step(forward, module):
        if not training:
            with torch.no_grad():
                return forward(x)
        module.requires_grad_(True)
        leaf = x.detach().requires_grad_()
        forward(leaf).backward(grad)
        module.zero_grad(set_to_none=True)
        return leaf.grad
    positions = torch.arange(tokens, device="cuda")[None]

    def theirs(x):
        out = hf(x, attention_mask=None, position_ids=positions, position_embeddings=both)
        return out[0] if isinstance(out, tuple) else out
    # transformers' own checkpointing computes all of a layer again, ours all but attention's output
    checkpointed = theirs if not training else lambda x: checkpoint(theirs, x, use_reentrant=False)
    if training:
        finetune.recompute(model)
    flops *= 3 if training else 1  # backward takes twice forward; what is computed again is not counted
    work = f"Llama-3-8B layer, {'training step' if training else 'forward'}, {tokens}"
    table.compare(work, tokens, flops, {"transformers": lambda: step(checkpointed, hf)} | with_kernels(
        model, lambda: step(lambda x: block(x, cos, sin), block)))


def whole_model(table, path, tokens):
    """All layers of the small model; the logits of the last 1024 tokens of its window, beyond which all is noise."""
    torch._dynamo.reset()
    if path:
        model, hf = load_model(path), LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
    else:
        model, hf = ours_of(SMOLLM2), LlamaForCausalLM(HFConfig(**SMOLLM2)).to("cuda", torch.bfloat16)
        hf.load_state_dict(model.state_dict() | {"lm_head.weight": model.unembedding})
    hf.requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device="cuda",
                        generator=torch.Generator("cuda").manual_seed(0))
    flops = forward_flops(model, tokens) - 2 * model.unembedding.numel() * (tokens - 1024)

    def logits(hidden):
        return hidden[0, 7168:8192] @ model.unembedding.T
    with torch.inference_mode():
        table.compare(f"SmolLM2-135M, forward, {tokens}", tokens, flops, {
            "transformers": lambda: logits(hf.model(ids, use_cache=False)[0])} | with_kernels(
            model, lambda: logits(model.hidden(ids))))


@torch.inference_mode()
def two_million(table, layers=2, tokens=2**21):
    """2,097,152 tokens through some layers of Llama-3-8B, some heads at a time, once."""
    model = ours_of(LLAMA3 | {"num_hidden_layers": layers})
    ids = torch.randint(256, (1, tokens), device="cuda")
    model.hidden(ids[:, :tokens // 4])  # warms up
    gib, _, seconds = gib_of(lambda: model.hidden(ids))
    table.add(f"Llama-3-8B, {layers} layers, {tokens}", attention_kernel(model), tokens, forward_flops(model, tokens),
              seconds, gib)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="directory of SmolLM2-135M (default: random weights of its shape)")
    p.add_argument("--two-million", action="store_true", help="2,097,152 tokens through 2 layers of the 8B, alone")
    p.add_argument("--out", type=Path, help="(default: out/peers.json, out/two-million.json)")
    args = p.parse_args()
    args.out = args.out or Path("out/two-million.json" if args.two_million else "out/peers.json")
    table = Table(args)
    if args.two_million:
        return two_million(table)
    layer(table, 131072, training=False)
    layer(table, 65536, training=True)
    for tokens in (65536, 131072):
        whole_model(table, args.model, tokens)


if __name__ == "__main__":
    main()

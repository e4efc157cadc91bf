"""One causal attention over several GPUs, forward and backward: our exchange (Context) beside PyTorch's own.

    $ torchrun --nproc-per-node 2 tests/experiments/context_parallel.py --out out/context.json

Llama-3-8B's heads over --len tokens. PyTorch's `context_parallel`, a prototype, wants as many key heads as query heads,
so they are repeated for it. Also the same attention on one GPU.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import Context, attention, join_processes, recorded, run, say, write_json  # noqa: E402

H, K, D = 32, 8, 128


def seconds(step):
    """Of the slowest process, in the mean of three."""
    for repeats in (1, 3):
        torch.cuda.synchronize()
        dist.barrier()
        begun = time.perf_counter()
        [step() for _ in range(repeats)]
        torch.cuda.synchronize()
    took = torch.tensor((time.perf_counter() - begun) / 3, device="cuda")
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--len", type=int, default=131072)
    p.add_argument("--out", type=Path, default=Path("out/context.json"))
    args = p.parse_args()
    join_processes()
    N, T, rows = dist.get_world_size(), args.len, {}
    torch.manual_seed(0)
    whole = [torch.randn(1, T, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K)]  # as everywhere
    mesh, context = init_device_mesh("cuda", (N,)), Context(dist.group.WORLD)

    def leaves(tensors):
        return [x.detach().requires_grad_() for x in tensors]

    def pytorchs(method, kernel):
        set_rotate_method(method)
        qkv = [x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2).contiguous() for x in whole]
        with (context_parallel(mesh, buffers=qkv, buffer_seq_dims=[2, 2, 2], no_restore_buffers={*qkv}),
              sdpa_kernel(kernel)):
            F.scaled_dot_product_attention(*leaves(qkv), is_causal=True).sum().backward()
    ours = {"one GPU": lambda: attention(*leaves(whole)).sum().backward(),
            "Context": lambda: context.attend(*leaves(context.mine(x, 1) for x in whole)).sum().backward()}
    theirs = {f"PyTorch, {name}, {kernel}": lambda method=method, backend=backend: pytorchs(method, backend)
              for name, method in (("all-gather", "allgather"), ("ring", "alltoall"))
              for kernel, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION))}
    for name, step in {**ours, **theirs}.items():
        torch.cuda.reset_peak_memory_stats()
        flops = 3.5 * 2 * T**2 * H * D / (1 if name == "one GPU" else N)  # forward two products, backward five
        try:
            rows[name] = {"seconds": (took := seconds(step)), "tflops_per_gpu": flops / took / 1e12,
                          "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        except Exception as e:  # whatever the prototype raises is its result here
            rows[name] = {"error": f"{type(e).__name__}: {str(e).splitlines()[0]}"}
        say(f"{name:28}" + " ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[name].items()))
    if dist.get_rank() == 0:
        write_json(args.out, {"tokens": T, "heads": [H, K, D], "gpus": N, **recorded(args), "rows": rows})


if __name__ == "__main__":
    run(main)

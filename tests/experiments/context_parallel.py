"""One causal attention over several GPUs, forward and backward: finetune.py's exchange beside PyTorch's own.

    $ torchrun --nproc-per-node 2 tests/experiments/context_parallel.py --out out/context.json

Llama-3-8B's heads (32 query, 8 key/value, dimension 128) over --len tokens. PyTorch's `context_parallel` is a
prototype; it wants as many key heads as query heads, so they are repeated for it. Also the same attention on one GPU.
"""
import argparse
import json
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
from finetune import Context  # noqa: E402
from longrope import attention, versions  # noqa: E402

H, K, D = 32, 8, 128


def seconds(step, repeats=3):
    """Of the slowest process."""
    step()
    torch.cuda.synchronize()
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    took = torch.tensor((time.perf_counter() - begun) / repeats, device="cuda")
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--len", type=int, default=131072)
    p.add_argument("--out", type=Path, default=Path("out/context.json"))
    args = p.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    N, T = dist.get_world_size(), args.len
    flops = 3.5 * 2 * T**2 * H * D  # forward two products, backward five
    torch.manual_seed(0)
    whole = [torch.randn(1, T, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K)]  # as everywhere
    mesh, context, rows = init_device_mesh("cuda", (N,)), Context(dist.group.WORLD), {}

    def one_gpu():
        q, k, v = (x.detach().requires_grad_() for x in whole)
        attention(q, k, v).sum().backward()

    def ours():
        q, k, v = (context.mine(x, 1).detach().requires_grad_() for x in whole)
        context.attend(q, k, v).sum().backward()

    def pytorchs(method, kernel):
        set_rotate_method(method)
        q, k, v = (x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2).contiguous() for x in whole)
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2], no_restore_buffers={q, k, v}):
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    for name, step in {
            "one GPU": one_gpu, "finetune.py": ours,
            "PyTorch, all-gather, flash": lambda: pytorchs("allgather", SDPBackend.FLASH_ATTENTION),
            "PyTorch, all-gather, cuDNN": lambda: pytorchs("allgather", SDPBackend.CUDNN_ATTENTION),
            "PyTorch, ring, flash": lambda: pytorchs("alltoall", SDPBackend.FLASH_ATTENTION),
            "PyTorch, ring, cuDNN": lambda: pytorchs("alltoall", SDPBackend.CUDNN_ATTENTION)}.items():
        torch.cuda.reset_peak_memory_stats()
        try:
            took = seconds(step)
            rows[name] = {"seconds": took, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                          "tflops_per_gpu": flops / took / (1 if name == "one GPU" else N) / 1e12}
            said = f"{took:8.3f} s {rows[name]['tflops_per_gpu']:6.0f} TFLOP/s {rows[name]['peak_gib']:6.1f} GiB"
        except Exception as e:  # whatever the prototype raises is its result here
            rows[name] = {"error": f"{type(e).__name__}: {str(e).splitlines()[0]}"}
            said = rows[name]["error"][:100]
        if dist.get_rank() == 0:
            print(f"{name:28}{said}", flush=True)
    if dist.get_rank() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"tokens": T, "heads": [H, K, D], "gpus": N, **versions(), "rows": rows},
                                       indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Does a GPU wait between the kernels of a forward pass? Eight passes one after another, then one more, profiled.

    $ python tests/experiments/idle.py SmolLM2-135M 65536 131072

Prints, in milliseconds: of each pass, when its kernels had all been issued and when they were done; of the profiled one
the wall time, the time from the first kernel to the last, in which a kernel ran and in which none did, and the longest
gaps with the kernels before and after.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import load_model  # noqa: E402


def timed(model, ids):
    begun = time.perf_counter()
    model.hidden(ids)
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (issued - begun), 1e3 * (time.perf_counter() - begun)


@torch.inference_mode()
def main(path, *lengths):
    model = load_model(path)
    for tokens in map(int, lengths):
        ids = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
        timed(model, ids)  # compiles
        for _ in range(8):
            print(tokens, "issued {:.1f}, done {:.1f}".format(*timed(model, ids)), flush=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            wall = timed(model, ids)[1]
        kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in profile.events()
                         if e.device_type == torch.autograd.DeviceType.CUDA)
        ran, end, before, gaps = 0, kernels[0][0], "", []
        for start, stop, name in kernels:
            if start > end:
                gaps.append(((start - end) / 1e3, before, name))
            ran += max(0, stop - max(start, end)) / 1e3
            end, before = max(end, stop), name
        print(f"{tokens} wall {wall:.1f}, from first to last {(end - kernels[0][0]) / 1e3:.1f}, ran {ran:.1f}, idle "
              f"{sum(gap for gap, *_ in gaps):.1f}")
        for gap, before, after in sorted(gaps, reverse=True)[:12]:
            print(f"   {gap:.2f} between {before[:60]} and {after[:60]}")


if __name__ == "__main__":
    main(*sys.argv[1:])

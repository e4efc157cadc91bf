"""Is there a faster way to call flash-attn-4 for a model with few, narrow heads (SmolLM2-135M's)? Its options in turns.

    $ python tests/experiments/tiles.py

Prints medians of 4 turns of 4 calls each, in milliseconds, and TFLOP/s. Options that it refuses are said.
"""
import statistics
import time

import torch
from flash_attn.cute.interface import _flash_attn_fwd

TOKENS, HEADS, KEY_HEADS, HEAD_DIM = 65536, 9, 3, 64
OPTIONS = [{}, *({"tile_mn": tile} for tile in ((192, 160), (192, 144), (192, 112), (128, 128), (256, 80))),
           {"tile_mn": (192, 128), "intra_wg_overlap": False}, {"tile_mn": (192, 128), "mma_pv_is_rs": False},
           {"pack_gqa": False}]


def main():
    q, k, v = (torch.randn(1, TOKENS, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
               for heads in (HEADS, KEY_HEADS, KEY_HEADS))

    def attend(options, calls):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            _flash_attn_fwd(q, k, v, causal=True, return_lse=True, **options)
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / calls

    taken = []
    for options in OPTIONS:
        try:
            attend(options, 1)  # compiles
            taken.append((options, []))
        except AssertionError:
            print(options, "refused")
    for _ in range(4):
        for options, seconds in taken:
            seconds.append(attend(options, 4))
    for options, seconds in taken:
        median = statistics.median(seconds)
        print(f"{1e3 * median:7.2f} {2 * TOKENS**2 * HEADS * HEAD_DIM / median / 1e12:5.0f}  {options or '(none)'}")


if __name__ == "__main__":
    main()

"""A model of Llama-3-8B's shape with random weights, to measure time and memory with: they don't depend on the weights.

    $ python tests/experiments/random_model.py --layers 32 --out out/llama3-8b-shape
    $ torchrun --nproc-per-node 2 finetune.py --model out/llama3-8b-shape --rope yarn --len 131072 --batch-size 1
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import BUNDLED_MODEL, Llama, read_config, save_model  # noqa: E402

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
         "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 1}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=32, help="default: 32, 8.0 billion parameters in all")
    p.add_argument("--out", type=Path, default=Path("out/llama3-8b-shape"))
    args = p.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Llama(read_config(SHAPE | {"num_hidden_layers": args.layers})).requires_grad_(False)
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.02) if x.ndim > 1 else torch.nn.init.ones_(x)
    model.path = BUNDLED_MODEL  # whose tokenizer is copied: only the first 4096 tokens occur
    save_model(model, args.out)
    print(f"{sum(x.numel() for x in model.parameters()) / 1e9:.2f} billion parameters in {args.out}")

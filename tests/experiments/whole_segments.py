"""Of each text the part that fills whole segments, so that trainings with segments of other lengths see the same text.

    $ python tests/experiments/whole_segments.py --model DIR --data books/train --len 131072 --out out/whole
"""
import argparse
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from finetune import segments  # noqa: E402
from longrope import UserError, load_tokenizer, read_documents  # noqa: E402

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="whose tokenizer")
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--len", type=int, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    tokenizer = load_tokenizer(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in read_documents(args.data, 5 * args.len):
        with suppress(UserError):  # too short for one
            found = np.concatenate(list(segments([(name, text)], tokenizer, args.len, 0, 0)))
            (args.out / f"{Path(name).stem}.txt").write_text(tokenizer.decode(found[:, 1:-1].reshape(-1).tolist()))
            print(f"{name}: {len(found)} segments")

#!/usr/bin/env bash
# Progressive extension of the bundled model at the paper's ratios: 1024 -> 32x (400 steps) -> 64x (600 steps) -> 512x.
#
#     BOOKS=books OUT=out/progressive bash tests/experiments/progressive.sh search train32 train64 second evaluate
#
# BOOKS/train, BOOKS/search and BOOKS/test are three separate lists of long texts. All processes are torchrun's, one for
# each GPU; the stages named are run one after another, each from the directories that those before it left in OUT.
set -euo pipefail
BOOKS=${BOOKS:?} OUT=${OUT:?}
GPUS=${GPUS:-$(python3 -c "import torch; print(torch.cuda.device_count())")}
all() { torchrun --nproc-per-node "$GPUS" "$@"; }
few=(--num-parents 8 --num-mutations 5 --num-crossovers 3 --iterations 40)  # needs the fewest evaluations, see README

for stage in "$@"; do
  case $stage in
    search)
      all search.py --len 32768 --data "$BOOKS/search" "${few[@]}" --out "$OUT/search-32x"
      all search.py --len 65536 --data "$BOOKS/search" "${few[@]}" --out "$OUT/search-64x" ;;
    train32)
      all finetune.py --rope "$OUT/search-32x/rope.json" --len 32768 --data "$BOOKS/train" --steps 400 \
        --batch-size 8 --lr 5e-4 --out "$OUT/model-32x" ;;
    train64)
      all finetune.py --model "$OUT/model-32x" --rope "$OUT/search-64x/rope.json" --len 65536 --data "$BOOKS/train" \
        --steps 600 --batch-size 8 --lr 5e-4 --out "$OUT/model-64x" ;;
    second)
      all search.py --model "$OUT/model-64x" --init "$OUT/model-64x/rope.json" --len 524288 --samples 3 \
        --population-size 24 --num-parents 6 --num-mutations 5 --num-crossovers 3 --iterations 12 \
        --data "$BOOKS/search" "$BOOKS/test" --out "$OUT/search-512x"
      all search.py --model "$OUT/model-64x" --init "$OUT/search-512x/rope.json" --short --len 1024 --samples 11 \
        "${few[@]}" --data "$BOOKS/search" --out "$OUT/recovered" ;;
    evaluate)
      lengths=(--len 1024 8192 32768 65536 524288)
      texts=(--samples 4 --data "$BOOKS/test")
      all eval_ppl.py --rope none "$OUT/search-32x/rope.json" "$OUT/search-64x/rope.json" "${lengths[@]}" "${texts[@]}" \
        --out "$OUT/ppl-0"
      all eval_ppl.py --model "$OUT/model-32x" --rope model "${lengths[@]}" "${texts[@]}" --out "$OUT/ppl-32x"
      all eval_ppl.py --model "$OUT/model-64x" --rope model "$OUT/search-512x/rope.json" "$OUT/recovered/rope.json" \
        "${lengths[@]}" "${texts[@]}" --out "$OUT/ppl-64x"
      all eval_passkey.py --rope none "$OUT/search-32x/rope.json" "$OUT/search-64x/rope.json" "${lengths[@]}" \
        --out "$OUT/passkey-0"
      all eval_passkey.py --model "$OUT/model-32x" --rope model "${lengths[@]}" --out "$OUT/passkey-32x"
      all eval_passkey.py --model "$OUT/model-64x" --rope model "$OUT/search-512x/rope.json" \
        "$OUT/recovered/rope.json" "${lengths[@]}" --out "$OUT/passkey-64x" ;;
    *) echo "progressive.sh: no stage $stage" >&2; exit 2 ;;
  esac
done

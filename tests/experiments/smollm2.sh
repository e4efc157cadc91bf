#!/usr/bin/env bash
# A real model, SmolLM2-135M-Instruct: 8192 -> 65536 tokens without fine-tuning, -> 131072 with it, and what it costs.
#
#     export MODEL=SmolLM2-135M BOOKS=books OUT=out/smollm2
#     bash tests/experiments/smollm2.sh search64 needle64 lambda64 ppl64 passkey64 search128 needle128 original
#     bash tests/experiments/smollm2.sh train train-long control recover tuned ppl-control quarter passkey128 words
#
# results/smollm2/DATA.md says where the model and the books are from. BOOKS/train, BOOKS/search and BOOKS/test are
# three separate lists of long texts. The stages named are run one after another, each from the directories that those
# before it left in OUT; a stage that was stopped goes on. GPUS: how many a command takes (default: all).
set -euo pipefail
MODEL=${MODEL:?} BOOKS=${BOOKS:?} OUT=${OUT:?}
GPUS=${GPUS:-$(python3 -c "import torch; print(torch.cuda.device_count())")}
all() { if ((GPUS == 1)); then python3 "$@"; else torchrun --nproc-per-node "$GPUS" "$@"; fi; }
few=(--population-size 32 --num-parents 8 --num-mutations 5 --num-crossovers 3)  # fewest evaluations, see README
search() { all search.py --resume "${few[@]}" "$@"; }
tune() { all finetune.py --data "$BOOKS/train" --lr "${LR:-2e-5}" --save-every 100 --resume "$@"; }
texts=(--doc-tokens 524288 --data "$BOOKS/test")  # each length in windows one after another: the same tokens
to64=(--len 8192 16384 32768 65536) to128=(--len 2048 4096 8192 16384 32768 65536 131072)

for stage in "$@"; do
  case $stage in
    search64) search --model "$MODEL" --len 65536 --data "$BOOKS/search" --out "$OUT/search-64k" ;;
    needle64) search --model "$MODEL" --len 65536 --fitness needle --out "$OUT/needle-64k" ;;
    lambda64)  # the paper's ablation: searched without n_hat and attention factor, then with n_hat
      search --model "$MODEL" --len 65536 --data "$BOOKS/search" --n-hat 0 --attention-factor none \
        --out "$OUT/lambda-64k"
      search --model "$MODEL" --len 65536 --data "$BOOKS/search" --attention-factor none \
        --out "$OUT/lambda-n_hat-64k" ;;
    ppl64 | passkey64)
      python3 tests/experiments/variants.py --model "$MODEL" --rope "$OUT/search-64k/rope.json" --out "$OUT/variants"
      ropes=(none pi ntk yarn "$OUT"/variants/{pi,ntk,yarn}-su.json "$OUT"/{search,needle}-64k/rope.json)
      for without in "$OUT"/lambda{,-n_hat}-64k/rope.json; do
        [ ! -e "$without" ] || ropes+=("$without")
      done
      if [ "$stage" = ppl64 ]; then
        all eval_ppl.py --model "$MODEL" --rope "${ropes[@]}" "${to64[@]}" "${texts[@]}" --out "$OUT/ppl-64k"
      else
        all eval_passkey.py --model "$MODEL" --rope "${ropes[@]}" "${to64[@]}" --trials 3 --out "$OUT/passkey-64k"
      fi ;;
    search128)
      search --model "$MODEL" --len 131072 --n-hat 0 --samples 3 --data "$BOOKS/search" --out "$OUT/search-128k" ;;
    needle128) search --model "$MODEL" --len 131072 --n-hat 0 --fitness needle --out "$OUT/needle-128k" ;;
    original)
      all eval_ppl.py --model "$MODEL" --rope none "$OUT"/{search,needle}-128k/rope.json "${to128[@]}" "${texts[@]}" \
        --out "$OUT/ppl-original"
      all eval_passkey.py --model "$MODEL" --rope none "$OUT"/{search,needle}-128k/rope.json "${to128[@]}" \
        --trials 3 --out "$OUT/passkey-original" ;;
    train)
      tune --model "$MODEL" --rope "$OUT/search-128k/rope.json" --len 32768 --batch-size 4 --micro-batch-size 2 \
        --steps 300 --out "$OUT/model-32k-segments" ;;
    train-long)
      tune --model "$OUT/model-32k-segments" --rope "$OUT/search-128k/rope.json" --len 131072 --batch-size 1 \
        --steps 100 --out "$OUT/model-128k" ;;
    control)  # the same steps, with as many tokens, within the window
      tune --model "$MODEL" --rope none --len 8192 --batch-size 16 --micro-batch-size 16 --steps 300 \
        --out "$OUT/control-300"
      tune --model "$OUT/control-300" --rope none --len 8192 --batch-size 16 --micro-batch-size 16 --steps 100 \
        --out "$OUT/control" ;;
    recover)  # once for this program, once for Hugging Face, which has one attention factor for both sets
      short=(--model "$OUT/model-128k" --init "$OUT/model-128k/rope.json" --short --len 8192 --n-hat 0 --samples 8
             --data "$BOOKS/search")
      search "${short[@]}" --out "$OUT/recovered"
      search "${short[@]}" --out "$OUT/recovered-su" --export "$OUT/model-final" ;;
    tuned)
      python3 tests/experiments/variants.py --model "$OUT/model-128k" --rope "$OUT/model-128k/rope.json" \
        --out "$OUT/variants-128k"
      all eval_ppl.py --model "$OUT/model-128k" --rope model "$OUT/variants-128k/long.json" \
        "$OUT"/recovered{,-su}/rope.json "${to128[@]}" "${texts[@]}" --out "$OUT/ppl-128k" ;;
    ppl-control)
      all eval_ppl.py --model "$OUT/control" --rope none --len 2048 4096 8192 "${texts[@]}" --out "$OUT/ppl-control" ;;
    quarter)
      python3 tests/experiments/last_quarter.py --model "$OUT/model-128k" --rope model "$OUT/recovered/rope.json" \
        "${texts[@]}" --out "$OUT/last-quarter.json" ;;
    passkey128)
      all eval_passkey.py --model "$OUT/model-128k" --rope "$OUT/recovered/rope.json" "${to128[@]}" --trials 3 \
        --out "$OUT/passkey-128k" ;;
    words)  # short texts, so the short set: of model-128k that is plain RoPE
      python3 tests/experiments/last_word.py --data "$BOOKS/test" --out "$OUT/last-word"
      for model in "$MODEL" "$OUT"/{model-128k,model-final,control}; do
        lm_eval --model hf --model_args "pretrained=$model,dtype=bfloat16" --tasks last_word --batch_size 32 \
          --include_path "$OUT/last-word" --output_path "$OUT/words/$(basename "$model")"
      done ;;
    *) echo "smollm2.sh: no stage $stage" >&2; exit 2 ;;
  esac
done

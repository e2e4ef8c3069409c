#!/usr/bin/env bash
# pisces-tiny from nothing: scenes, stage 0, the three stages, the finished folder, its score. See docs/tiny.md.
# The commands are those that finetune.from_scratch runs on anybody's pictures; here two of them run at a time, the
# towers and the decoder see more shades than the stages, and the understanding tower learns from the scenes' truth.
#
#   bash finetune/tiny/tiny.sh [WORK]      WORK defaults to runs/tiny; about 4.5 hours on two processor cores
#
# EDITS=true trains on with scene edits after the review, which the shipped folder is not: docs/edit.md says why.
# Each step is skipped when its result is there, and resumes from its last checkpoint when it was stopped: run it again.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:-runs/tiny}
python=${PYTHON:-.venv/bin/python}
with_edits=${EDITS:-false}
bf16=${BF16:-true} # bf16 products: twice as fast with avx512_bf16 or a GPU; set BF16=false on other processors
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
mkdir -p "$work"
trap 'jobs -p | xargs -r kill' EXIT # a step that fails takes the one beside it along

data="--data $work/pictures/stage0 --heldout $work/pictures/heldout --bf16 $bf16"
stage="--data $work/pictures/stages --bf16 $bf16 --batch_size 32 --learning_rate 1e-3 --log_steps 25 --save_steps 250"

# step NAME RESULT COMMAND...: run COMMAND unless RESULT exists
step() {
    local name=$1 result=$2
    shift 2
    if [ -e "$result" ]; then echo "== $name: done"; return; fi
    echo "== $name"
    "$@"
}

scenes() { # NAME ARGUMENTS...
    step "scenes: $1" "$work/$1/.done" $python -m finetune.scenes --output "$work/$1" "${@:2}"
    touch "$work/$1/.done"
}

pictures() { # NAME DATA...: read once, for every step that trains
    step "pictures: $1" "$work/pictures/$1/prepared.json" \
        $python -m finetune.parts prepare --data "${@:2}" --output "$work/pictures/$1"
}

vision_tower_and_autoencoder() {
    step "understanding tower" "$work/vision_tower/model.safetensors" \
        $python -m finetune.parts.vision $data --output "$work/vision_tower" --max_steps 5000 --labels scenes
    step "autoencoder" "$work/decoder/vae/config.json" \
        $python -m finetune.parts.decoder --part vae $data --output "$work/decoder/vae" \
        --max_steps 1500 --batch_size 32 --learning_rate 2e-3 --warmup_steps 100 --ema_decay 0.99 --eval_steps 250 --log_steps 25
}

generation_tower() {
    step "generation tower" "$work/gen_encoder/model.safetensors" \
        $python -m finetune.parts.gen_encoder $data --output "$work/gen_encoder" --max_steps 10000
}

decoder() {
    step "U-Net" "$work/decoder/unet/.done" \
        $python -m finetune.parts.decoder --part unet $data --output "$work/decoder/unet" \
        --gen_encoder "$work/gen_encoder" --vae "$work/decoder/vae" \
        --max_steps 10000 --batch_size 32 --learning_rate 1e-3 --warmup_steps 300 --ema_decay 0.999 --eval_steps 1000
    touch "$work/decoder/unet/.done"
}

three_stages() {
    step "assembly" "$work/start/config.json" \
        $python -m finetune.parts assemble --data "$work/pictures/stages" --vision_tower "$work/vision_tower" \
        --gen_vision_tower "$work/gen_encoder" --output "$work/start"
    step "stage 1, short captions" "$work/stage1/results.json" \
        $python -m finetune.train_stages --stage pretrain --checkpoint "$work/start" --output "$work/stage1" $stage \
        --max_steps 350 --warmup_steps 100 --schedule constant_with_warmup --ema_decay 0.98
    step "stage 2, detailed captions" "$work/stage2/results.json" \
        $python -m finetune.train_stages --stage detail --checkpoint "$work/stage1" --output "$work/stage2" $stage \
        --max_steps 350 --warmup_steps 50 --schedule constant_with_warmup --ema_decay 0.98
    step "stage 3, instructions" "$work/stage3/results.json" \
        $python -m finetune.train_stages --stage instruct --checkpoint "$work/stage2" --output "$work/stage3" $stage \
        --pattern ugggd --max_steps 2000 --warmup_steps 50 --schedule cosine --ema_decay 0.995
}

review() { # nothing is left to do beside it, so it takes both processes
    step "review, both sides and talking about drawings" "$work/review/results.json" \
        $python -m torch.distributed.run --standalone --nproc_per_node 2 -m finetune.train_stages --stage review \
        --checkpoint "$work/stage3" --output "$work/review" $stage --batch_size 24 --seed 2 --pattern ugd --num_questions 8 \
        --max_steps 3600 --warmup_steps 50 --schedule cosine --ema_decay 0.997
}

edits() { # on from the review, beside everything it knows
    step "scene edits" "$work/edits/edits.jsonl" \
        $python -m finetune.scenes.edits --output "$work/edits" --num_edits 48000 --seed 0 --split train
    pictures edits "$work/scenes" "$work/edits/rows.jsonl"
    step "edits" "$work/edited/results.json" \
        $python -m finetune.train_stages --stage review --checkpoint "$work/review" --output "$work/edited" \
        --data "$work/pictures/edits" --bf16 $bf16 --batch_size 16 --learning_rate 7e-4 --log_steps 20 --save_steps 100 \
        --seed 4 --pattern uegede --num_questions 8 --max_steps 1400 --warmup_steps 30 --schedule cosine --ema_decay 0.995
}

scenes scenes --num_scenes 60000 --seed 0 --split train
scenes broad --num_scenes 30000 --seed 2 --split train --broad_colors
scenes heldout --num_scenes 1500 --seed 1 --split heldout
scenes shown --num_scenes 500 --seed 3 --split train # new pictures of shown combinations, to choose settings with

pictures stage0 "$work/scenes" "$work/broad"
pictures stages "$work/scenes"
pictures heldout "$work/heldout"

# Two processes at a time; what the second one prints goes to a log.
vision_tower_and_autoencoder >"$work/second.log" 2>&1 &
second=$!
generation_tower
wait $second
decoder >>"$work/second.log" 2>&1 &
second=$!
three_stages
wait $second
review
last="--checkpoint $work/review --data $work/scenes"
if [ "$with_edits" = true ]; then
    edits
    last="--checkpoint $work/edited --data $work/pictures/edits"
fi

step "finished folder" "$work/pisces-tiny/model_index.json" \
    $python -m finetune.parts finish $last --decoder "$work/decoder" --output "$work/pisces-tiny"
for split in shown heldout; do
    step "score: $split" "$work/pisces-tiny-$split.json" \
        $python -m evaluation.scenes --model "$work/pisces-tiny" --data "$work/$split" --output "$work/pisces-tiny-$split.json"
done

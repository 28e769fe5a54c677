#!/usr/bin/env bash
# Both tables end to end on phantoms in one command, some ten minutes on two CPU cores: two folds, three generators,
# which train for seconds. It shows that everything works together; its numbers say nothing about the models.
#   scripts/tables_demo.sh [OUTPUT]     (default: runs/tables-demo); the same command goes on where it stopped
source "$(dirname "${BASH_SOURCE[0]}")/tables.sh"
OUTPUT=${1:-$HERE/runs/tables-demo}
case "$OUTPUT" in /*) ;; *) OUTPUT=$FROM/$OUTPUT ;; esac
STARTED=$SECONDS
[ -f "$OUTPUT/phantom/test.csv" ] || python "$HERE/prepare_data.py" --source phantom --count 120 --folds 2 \
    --image-size 64 --output "$OUTPUT/phantom"
SIZES=(--data "$OUTPUT/phantom" --output "$OUTPUT" --models "GeCA-XS DiT-S LDM-B" --image-size 64 --vae retina
    --epochs 6 --batch 16 --validate-every 6 --steps 5 --sampler dpmpp --expand 3 --features retina --lpips none
    --backbone test_resnet.r160_in1k --classify-size 64 --classify-epochs 4
    --extra-train "--lr 5e-4 --ema-decay 0.99 --val-samples 8 --num-sampling-steps 8 --log-every 8"
    --extra-classify "--no-pretrained --optimizer adamw --lr 1e-3 --global-batch-size 16")
python "$HERE/scripts/plan.py" 1 "${SIZES[@]}"
python "$HERE/scripts/plan.py" 2 "${SIZES[@]}"
echo
cat "$OUTPUT/tables/table1.md" "$OUTPUT/tables/table2.md"
echo "$OUTPUT: both tables in $((SECONDS - STARTED)) seconds"

# What the shell wrappers share: `run SCRIPT ARGUMENTS...` after their defaults. Sourced, not run.
#
# Variables that they read besides their own: MODEL (needed), DATA, OUT, NPROC (processes, one per GPU; left out: as many
# as there are GPUs), SEQ_PARALLEL (processes that share a row, by DeepSpeed; left out: 1), TOKENS (length of a row),
# SAVE_STEPS, PYTHON, DRY_RUN=1 (print the command, run nothing).
# Options of the script may follow on the command line; they win.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
: "${MODEL:?set MODEL to a folder, a .gguf file or a name on the hub}"
: "${SEQ_PARALLEL:=1}" "${DATA:=}" "${TOKENS:=32768}" "${SINK:=128}" "${WINDOW:=1024}" "${SAVE_STEPS:=100}" "${DRY_RUN:=}"
if [ -z "${NPROC:-}" ]; then
    NPROC="$( (nvidia-smi -L 2>/dev/null || true) | wc -l)"
    [ "$NPROC" -gt 0 ] || NPROC=1
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON="$ROOT/.venv/bin/python"
fi

run() {
    local script="$1"
    shift
    local groups=$((NPROC / SEQ_PARALLEL)) # each has a row of its own
    if [ $((NPROC % SEQ_PARALLEL)) -ne 0 ] || [ $((BATCH % groups)) -ne 0 ]; then
        echo "error: BATCH=$BATCH rows of a step do not divide among NPROC=$NPROC processes, $SEQ_PARALLEL to a row" >&2
        exit 2
    fi
    local command=("$PYTHON")
    [ "$NPROC" -eq 1 ] || command+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
    command+=("$ROOT/evaluate/$script" --model_name "$MODEL" --output_dir "$OUT"
        --max_steps "$STEPS" --per_device_train_batch_size 1 --gradient_accumulation_steps $((BATCH / groups))
        --max_tokens_per_device "$TOKENS" --sink_size "$SINK" --window "$WINDOW"
        --learning_rate "$LR" --warmup_steps "$LR_WARMUP" --min_lr_ratio "$MIN_LR_RATIO"
        --adam_beta1 0.9 --adam_beta2 0.95 --weight_decay 0.1 --max_grad_norm 1.0
        --bf16 --gradient_checkpointing --save_steps "$SAVE_STEPS" --save_total_limit 2)
    [ -z "$DATA" ] || command+=(--data "$DATA")
    if [ "$SEQ_PARALLEL" -gt 1 ]; then
        command+=(--seq_parallel_size "$SEQ_PARALLEL")
    elif [ "$NPROC" -gt 1 ]; then
        command+=(--fsdp --fsdp_config '{"fsdp_version": 2}')
    fi
    command+=("$@")
    echo "$TRAINS"
    echo "steps $STEPS, batch $BATCH rows of $TOKENS tokens on $NPROC process(es), sink $SINK, window $WINDOW, lr $LR"
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}

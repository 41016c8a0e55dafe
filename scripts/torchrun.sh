#!/usr/bin/env bash
# Start a recipe with torchrun's agents (toolkit.launch), on the cards of one node or of several.
#
#   scripts/torchrun.sh recipes/LibriSpeech/wav2vec2/train.py hparams.yaml --key value ...
#
#    1 card:   CARDS=1 scripts/torchrun.sh ...
#    8 cards:  CARDS=8 scripts/torchrun.sh ...
#   16 cards:  CARDS=16 MASTER_ADDR=node1 scripts/torchrun.sh ...   the same on each of 2 nodes
#   32 cards:  CARDS=32 MASTER_ADDR=node1 scripts/torchrun.sh ...   the same on each of 4 nodes
#
# The effective batch stays what the YAML says: more cards accumulate fewer micro-batches.
#
# After one worker died, all start again from the last checkpoint, each time with a store of their own; plain torchrun
# would hand workers on several nodes the addresses of the dead. SIGTERM or SIGUSR1 to this script (on every node) goes
# through to the workers: they save, and the code is 75; the same command goes on from there.
#
# Environment:
#   CARDS           processes in all, one a card; default 1
#   CARDS_PER_NODE  default 8
#   MASTER_ADDR     more than one node: the name of one of them, which all can reach
#   MASTER_PORT     a port that is free there; default 29500
#   RUN_ID          more than one node: tells runs on one port apart; default "run"
#   RESTARTS        how many times all workers start again, from the last checkpoint, after one died; default 3
#   PYTHON          the interpreter, with the toolkit installed; default python
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[ "$#" -ge 1 ] || fail "no script was given: scripts/torchrun.sh train.py hparams.yaml [--key value ...]"

cards=${CARDS:-1}
per_node=${CARDS_PER_NODE:-8}
case "$cards$per_node" in
    *[!0-9]*) fail "CARDS is '$cards' and CARDS_PER_NODE '$per_node'; both must be whole numbers." ;;
esac
cards=$((10#$cards)) per_node=$((10#$per_node)) # 08 is 8: the shell itself would take it for octal
[ "$cards" -ge 1 ] && [ "$per_node" -ge 1 ] || fail "CARDS is $cards and CARDS_PER_NODE $per_node; both start at 1."

restarts=${RESTARTS:-3}
case "$restarts" in
    *[!0-9]*) fail "RESTARTS is '$restarts'; it must be a whole number, 0 for none." ;;
esac

options=(--max-restarts $((10#$restarts)))
if [ "$cards" -le "$per_node" ]; then
    options+=(--standalone --nproc-per-node "$cards")
else
    [ $((cards % per_node)) -eq 0 ] || fail "CARDS is $cards, expected a multiple of the $per_node of a node."
    [ -n "${MASTER_ADDR:-}" ] || fail "$cards cards are more than one node's: set MASTER_ADDR to one node's name."
    # The nodes find each other at the endpoint; whichever has that name hosts it.
    options+=(
        --nnodes $((cards / per_node)) --nproc-per-node "$per_node"
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-run}"
    )
fi

exec "${PYTHON:-python}" -m toolkit.launch "${options[@]}" "$@"

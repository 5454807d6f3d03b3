#!/usr/bin/env bash
# A test cluster of an ordinary user: munge, the controller and one daemon a node, all on this machine.
#   ports.sh FOLDER NODE ...
set -euo pipefail
folder=$1
shift

munged --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" --force
slurmctld -c
for node; do
    slurmd -N "$node"
done
touch "$folder/up"
exec sleep infinity

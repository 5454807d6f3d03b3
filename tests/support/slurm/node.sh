#!/usr/bin/env bash
# PID 1 of a node.
#   node.sh FOLDER NODE LAST_OCTET
set -euo pipefail
folder=$1 node=$2 address=10.77.0.$3

mount --make-rprivate /
mount -t tmpfs -o size=1g node-shm /dev/shm
hostname "$node"
ip link set lo up
plug=plug$(($3 - 1))
until ip link show "$plug" >/dev/null 2>&1; do sleep 0.01; done
ip link set "$plug" name eth0
ip addr add "$address/24" dev eth0
ip link set eth0 up

munged --key-file="$folder/munge.key" --socket="$folder/$node.munge.sock" --pid-file="$folder/$node.munged.pid" \
    --log-file="$folder/$node.munged.log" --seed-file="$folder/$node.munge.seed" --force
mount --bind "$folder/$node.munge.sock" "$folder/munge.sock"
slurmd -N "$node"
while true; do
    sleep 1000 &
    wait $! || true
done

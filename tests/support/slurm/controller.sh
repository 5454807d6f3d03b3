#!/usr/bin/env bash
# PID 1 of a test cluster: the switch, munge, the controller and one child a node. Runs in namespaces of its own, so that its end
# is the end of everything below it.
#   controller.sh FOLDER NODE ...
set -euo pipefail
folder=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

mount --make-rprivate /
hostname controller
ip link set lo up
ip link add switch type bridge
ip addr add 10.77.0.1/24 dev switch
ip link set switch up
mount --bind "$folder/hosts" /etc/hosts
# Job steps are tracked by the freezer; each cluster gets a subtree of it as its whole hierarchy.
if [ -d "$folder/freezer" ]; then
    mount --bind "$(readlink -f "$folder/freezer")" /sys/fs/cgroup/freezer
fi

munged --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" --force
slurmctld -c
number=0
for node; do
    number=$((number + 1))
    bash "$here/power_on.sh" "$folder" "$node" "$number"
done
touch "$folder/up"
# Orphans of the daemons are adopted and buried here; bash does that while it waits.
while true; do
    sleep 1000 &
    wait $! || true
done

#!/usr/bin/env bash
# Start one node: processes, host name, address, mounts and shared memory of its own. Killing its PID 1 is a power cut.
#   power_on.sh FOLDER NODE NUMBER
set -euo pipefail
folder=$1 node=$2 number=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

rm -f "$folder/$node.pid"
setsid unshare --mount --uts --ipc --net --pid --fork --kill-child --mount-proc \
    bash "$here/node.sh" "$folder" "$node" "$((number + 1))" >>"$folder/$node.console" 2>&1 </dev/null &
outside=$!
while ! inside=$(pgrep -P "$outside"); do
    kill -0 "$outside"
    sleep 0.01
done
# Both ends are made here and one is handed over: the node cannot reach beyond its cable.
ip link del "cable$number" 2>/dev/null || true
ip link add "cable$number" type veth peer name "plug$number"
ip link set "plug$number" netns "$inside"
ip link set "cable$number" master switch up
echo "$inside" >"$folder/$node.pid"

#!/bin/bash
# Every crash point, fail point and allocation of the simulator's script and of the image layer's (tests/sim/points.c,
# sim_image.c), not the slices that ctest runs.
# timeout: 14400
set -u
bin=${REPFS_BIN:-$(cd "$(dirname "$0")/../.." && pwd)/build/dev}
[ -x "$bin/sim" ] || { echo "$bin/sim is not built"; exit 77; }
"$bin/sim" --crash-points &
crash=$!
bad=0
"$bin/sim" --fail-points --alloc-points || bad=1
"$bin/sim_image" --long || bad=1
wait $crash || bad=1
exit $bad

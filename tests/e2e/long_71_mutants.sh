#!/bin/bash
# The simulator finds every planted bug.
# timeout: 14400
exec "$(dirname "$0")/../sim/mutants.sh"

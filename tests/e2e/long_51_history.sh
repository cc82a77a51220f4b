#!/bin/bash
# Checkpoints read beside writes, merges, resyncs and a failover (test_51_history.py), for five minutes.
# timeout: 1800
exec env REPFS_HISTORY_SECONDS=300 "$(dirname "$0")/test_51_history.py" right_beside

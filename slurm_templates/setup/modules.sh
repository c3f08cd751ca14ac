# Sourced by the job's script before the tasks start (cluster.setup: setup/modules.sh).
# A copy is kept with the launch, so later edits do not reach queued jobs.
# A line that fails ends the job, and stands in its log; `|| true` behind what may fail.
# The interpreter is the one that submitted; it needs no activation, only what its libraries need.
if command -v module >/dev/null; then
    module purge
    module load cuda
    # Old versions of `module` only print their errors.
    [[ ":$LOADEDMODULES" == *:cuda* ]]
fi
ulimit -n 65536 2>/dev/null || true

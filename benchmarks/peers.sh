#!/bin/sh
# The peers that torch does not bring along, in an environment of their own: benchmarks/peers.sh [PYTHON of the project's environment].
# .venv-peers sees the project's packages through a .pth file, so that both sides run on the same torch, and adds its own.
# What cannot be installed is left out; the benchmarks then say so with the reason, which stands in .venv-peers/NAME.log.
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
rm -rf .venv-peers
"$python" -m venv .venv-peers
here=$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$here/project.pth"
for peer in nncf==3.4.0 mergekit==0.1.5 trl==1.16.0; do
    log=.venv-peers/${peer%%=*}.log
    .venv-peers/bin/python -m pip install --quiet -c constraints.txt "$peer" > "$log" 2>&1 || echo "$peer: not installable here, see $log"
done

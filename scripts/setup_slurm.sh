#!/usr/bin/env bash
# Installs what a SLURM of two nodes on this machine needs (tests/slurm, scripts/slurm_cluster.py), where apt allows.
# Never fails: what is skipped, and why, is said in one line, and the tests that need it skip themselves.
set -uo pipefail
skip() { echo "slurm: $*; tests/slurm will be skipped"; exit 0; }
have() { command -v "$1" >/dev/null 2>&1; }

export PATH="$PATH:/usr/sbin:/sbin"
if have slurmctld && have slurmd && have srun && have munged; then exit 0; fi
[ "$(uname -s)" = Linux ] || skip "not Linux"
have apt-get || skip "no apt-get here (install slurmctld, slurmd, slurm-client and munge by hand)"
[ "$(id -u)" = 0 ] || skip "not root (as root: apt-get install slurmctld slurmd slurm-client munge)"
export DEBIAN_FRONTEND=noninteractive
echo "slurm: installing slurmctld, slurmd, slurm-client, munge"
apt-get update -qq >/dev/null 2>&1 || skip "apt-get update failed (no network?)"
# A private cluster is started by the tests themselves: the packages' own services must not run.
POLICY=/usr/sbin/policy-rc.d
MADE=""
if [ ! -e "$POLICY" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$POLICY" && chmod +x "$POLICY" && MADE=1
fi
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null 2>&1
STATUS=$?
[ -z "$MADE" ] || rm -f "$POLICY"
[ "$STATUS" = 0 ] || skip "apt-get install failed with status $STATUS"

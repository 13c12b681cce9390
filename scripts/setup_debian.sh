#!/usr/bin/env bash
# Installs what tests need beyond Python, if apt-get may: SLURM for a cluster of two nodes on this machine (tests/slurm,
# scripts/slurm_cluster.py), and a browser that opens the page of `ov2 compare`.
# Never fails: it prints one line for what it cannot install, with the reason, and the tests that need it are skipped.
set -uo pipefail
have() { command -v "$1" >/dev/null 2>&1; }
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive
UPDATED=""

install() { # install WHAT TESTS PACKAGE...
  local what="$1" tests="$2"
  shift 2
  skip() { echo "$what: $*; $tests will be skipped"; }
  [ "$(uname -s)" = Linux ] || { skip "not Linux"; return; }
  have apt-get || { skip "no apt-get here (install by hand: $*)"; return; }
  [ "$(id -u)" = 0 ] || { skip "not root (as root: apt-get install $*)"; return; }
  echo "$what: installing $*"
  [ -n "$UPDATED" ] || apt-get update -qq >/dev/null 2>&1 || { skip "apt-get update failed (no network?)"; return; }
  UPDATED=1
  # The tests start a cluster of their own, so the services of the packages must not start.
  local policy=/usr/sbin/policy-rc.d made="" status=0
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && made=1
  fi
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 || status=$?
  [ -z "$made" ] || rm -f "$policy"
  [ "$status" = 0 ] || skip "apt-get install failed with status $status"
}

have slurmctld && have slurmd && have srun && have munged || install slurm tests/slurm slurmctld slurmd slurm-client munge
have chromium-headless-shell || have chromium || have google-chrome ||
  install browser tests/compare/test_page_in_browser.py chromium-headless-shell
exit 0

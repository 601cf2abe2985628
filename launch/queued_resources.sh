#!/usr/bin/env bash
# A training run on a spot TPU slice: waits for the slice, trains on all of its hosts, and asks for
# another slice when it is preempted, until the run is done.
#
#   PROJECT=… ZONE=… launch/queued_resources.sh --config=gemma_rrt:paper --workdir=/mnt/run …
#
# Arguments go to `python -m recursive_jax.train`. The workdir must be on storage that outlives the
# slice and that all hosts see. SETUP is run on every host first, e.g. to mount that storage.
set -euo pipefail

: "${PROJECT:?set PROJECT}" "${ZONE:?set ZONE}"
name=${NAME:-recursive-jax}
type=${TYPE:-v5litepod-16}
version=${VERSION:-v2-alpha-tpuv5-lite}
package=${PACKAGE:-recursive_jax[tpu,train]}
where=(--project="$PROJECT" --zone="$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

request() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet 2>/dev/null || true
  gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" --spot
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED | NONE) return 1 ;;
    esac
    sleep 30
  done
  on_all_hosts "${SETUP:-true} && pip install --quiet '$package'"
}

# JAX's own default port is closed by the firewall of some networks; 8476 is open in all.
train="JAX_COORDINATOR_PORT=8476 python3 -m recursive_jax.train$(printf ' %q' "$@")"

while true; do
  if [ "$(state)" = ACTIVE ] || request; then
    code=0
    on_all_hosts "$train" || code=$?
    [ "$code" = 0 ] && break
    if [ "$code" = 2 ]; then  # a mistake in the command
      echo "error: the run cannot start; the slice $name is still there" >&2
      exit 2
    fi
  fi
  echo "not done (state $(state)); the run goes on from its last saved step"
  sleep 30
done
gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet

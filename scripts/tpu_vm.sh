#!/usr/bin/env bash
# Run jaxllm on every host of a TPU slice. Untested: written from the documentation of gcloud.
# scripts/tpu_vm.sh NAME ZONE serve --model ... --mesh tp=16
set -euo pipefail
name=$1 zone=$2
shift 2
printf -v command '%q ' jaxllm "$@" --distributed
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$command"

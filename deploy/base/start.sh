#!/bin/sh
# Starts tritonserver with the flags that every deployment shares: compose, Kubernetes and tests/deploy all run this file.
#
#   TLS          off (default) | server (encrypted, certificate of the server) | mutual (certificates of both sides)
#   CERTS        folder with tls.crt and tls.key, for mutual also ca.crt (default /certs); not read while TLS is off
#   MODELS       the model repository (default /models)
#   MODEL_CONFIG onnxruntime (default) | tensorrt (the engines of `make engines`)
#   ADMIN_TOKEN  opens the restricted calls to clients that send it as the header triton-grpc-protocol-admin (over HTTP:
#                admin); without one a random value closes them to everybody
#   GPU          required: probe.py takes a server that runs on the CPU for one that does not serve
#   BIND         the address that gRPC is published on (compose says it; default loopback): a release before 26.04, which
#                the CPU image has, refuses any but loopback; publish a front instead (docs/server.md)
#
# Further flags are passed on to tritonserver and win over those below.
set -eu

models=${MODELS:-/models} config=${MODEL_CONFIG:-onnxruntime} certs=${CERTS:-/certs}
# Where a model lacks the named config, Triton would take another one and say nothing.
for model in "$models"/*/; do
    [ -r "$model/configs/$config.pbtxt" ] ||
        { echo "start.sh: $model has no configs/$config.pbtxt: run make export, for tensorrt make engines" >&2; exit 2; }
done
case "${TLS:-off}" in
off) files= ;;
server) files="tls.crt tls.key" ;;
mutual) files="tls.crt tls.key ca.crt" ;;
*) echo "start.sh: TLS is '$TLS': use off, server or mutual" >&2; exit 2 ;;
esac
for file in $files; do
    [ -r "$certs/$file" ] || { echo "start.sh: TLS is '$TLS' but $certs/$file can't be read" >&2; exit 2; }
done
[ -z "$files" ] ||
    set -- --grpc-use-ssl=true --grpc-server-cert="$certs/tls.crt" --grpc-server-key="$certs/tls.key" "$@"
[ "${TLS:-off}" != mutual ] || set -- --grpc-use-ssl-mutual=true --grpc-root-cert="$certs/ca.crt" "$@"

# What only some releases know: an unknown flag is fatal.
known=$(tritonserver --help 2>&1 || :)
for flag in --allow-sagemaker=false --allow-vertex-ai=false --allow-client-shm=false --grpc-max-response-pool-size=64; do
    case "$known" in *"${flag%%=*} "*) set -- "$flag" "$@" ;; esac
done
case "$known" in *--allow-client-shm*) ;; *)
    case "${BIND:-127.0.0.1}" in 127.*|localhost|::1|"[::1]") ;; *)
        echo "start.sh: this Triton is older than 26.04 and ends over malformed requests: publish it on loopback, not on" \
            "$BIND, and the service front on $BIND (BIND_FRONT)" >&2; exit 2 ;;
    esac ;;
esac

# HTTP serves only the probe, which runs in the same container; all others use gRPC. Metrics hold no data of patients.
# Inference, health, metadata, model-config (the contract) and statistics stay open: a client needs them.
admin="shared-memory,model-repository,trace,logging:admin=${ADMIN_TOKEN:-$(cat /proc/sys/kernel/random/uuid)}"
exec tritonserver \
    --model-repository="$models" \
    --model-config-name="$config" \
    --model-control-mode=none \
    --disable-auto-complete-config \
    --exit-on-error=true \
    --strict-readiness=true \
    --exit-timeout-secs=60 \
    --http-address=127.0.0.1 \
    --grpc-address=0.0.0.0 \
    --metrics-address=0.0.0.0 \
    --metrics-config=summary_latencies=true \
    --grpc-restricted-protocol="$admin" \
    --http-restricted-api="$admin" \
    "$@"

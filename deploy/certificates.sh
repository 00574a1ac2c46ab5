#!/bin/sh
# Certificates to TRY TLS with: a root of its own, a server and a client certificate, valid for 30 days.
# In production take them from your own authority (in Kubernetes: cert-manager), under the same file names.
#
#   deploy/certificates.sh [FOLDER] [SERVER_NAME...]     default: deploy/certs, localhost and triton
#
# FOLDER/ca.crt             for both sides
# FOLDER/tls.crt, tls.key   the server's; the folder that CERTS names
# FOLDER/client.crt, .key   the client's (TLS=mutual)
set -eu
umask 077
folder=${1:-$(dirname "$0")/certs}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- localhost triton
names=IP:127.0.0.1
for name in "$@"; do names="$names,DNS:$name"; done
mkdir -p "$folder"
cd "$folder"
new="openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"

$new -x509 -subj "/CN=gigapath test root" -keyout ca.key -out ca.crt
$new -x509 -CA ca.crt -CAkey ca.key -subj "/CN=triton" -keyout tls.key -out tls.crt \
    -addext "subjectAltName=$names" -addext basicConstraints=CA:false -addext extendedKeyUsage=serverAuth
$new -x509 -CA ca.crt -CAkey ca.key -subj "/CN=gigapath client" -keyout client.key -out client.crt \
    -addext basicConstraints=CA:false -addext extendedKeyUsage=clientAuth
rm ca.key  # nobody can sign with it again
echo "$folder: ca.crt, tls.crt, tls.key, client.crt, client.key, for $names"

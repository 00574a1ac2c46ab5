#!/bin/sh
# Certificates to TRY TLS with: a root of its own, a server and a client certificate, valid for 30 days.
# In production take them from your own authority (in Kubernetes: cert-manager), under the same file names.
#
#   deploy/certificates.sh [FOLDER] [SERVER_NAME...]     default: deploy/certs, localhost and triton
#
#   FOLDER/server    tls.crt, tls.key and ca.crt: what CERTS names
#   FOLDER/client    tls.crt, tls.key and ca.crt: what CLIENT_CERTS names
#
# Neither side sees the other's key.
set -eu
umask 077
folder=${1:-$(dirname "$0")/certs}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- localhost triton
names=IP:127.0.0.1
for name in "$@"; do names="$names,DNS:$name"; done
mkdir -p "$folder"
cd "$folder"
mkdir -p server client
new="openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"

$new -x509 -subj "/CN=gigapath test root" -keyout ca.key -out ca.crt
$new -x509 -CA ca.crt -CAkey ca.key -subj "/CN=triton" -keyout server/tls.key -out server/tls.crt \
    -addext "subjectAltName=$names" -addext basicConstraints=CA:false -addext extendedKeyUsage=serverAuth
$new -x509 -CA ca.crt -CAkey ca.key -subj "/CN=gigapath client" -keyout client/tls.key -out client/tls.crt \
    -addext basicConstraints=CA:false -addext extendedKeyUsage=clientAuth
rm ca.key  # nobody can sign with it again
cp ca.crt server
mv ca.crt client
echo "$folder: server and client, each with ca.crt, tls.crt and tls.key, for $names"

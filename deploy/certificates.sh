#!/bin/sh
# Make the certificates that deploy/tls.yml mounts: one authority, and one key pair per service that
# listens, so that a node's key cannot pass for the SuperLink.
#
#   deploy/certificates.sh [FOLDER [NAME ...]]
#
# FOLDER  where they go; deploy/certificates by default. An existing authority is never replaced.
# NAME    further DNS names or IP addresses under which the SuperLink is reached.
set -eu

folder=${1:-$(dirname "$0")/certificates}
[ $# -eq 0 ] || shift
days=365

if [ -e "$folder/authority.key" ]; then
    echo "$folder already holds an authority: remove the folder to make new certificates" >&2
    exit 1
fi
# Only the owner can enter, so the keys below may be readable: the user of a container, who is
# somebody else, reads them through the folder that is mounted.
mkdir -p "$folder/public"
chmod 700 "$folder"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days "$days" \
    -subj "/CN=fedsim authority" -keyout "$folder/authority.key" -out "$folder/public/ca.crt" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null

# certificate SERVICE NAME ...: a key pair for SERVICE, valid for these names.
certificate() {
    service=$1
    names="DNS:$service,DNS:localhost,IP:127.0.0.1"
    shift
    for name in "$@"; do
        case $name in
            *:* | *[0-9].*[0-9].*[0-9].*[0-9]) names="$names,IP:$name" ;;
            *) names="$names,DNS:$name" ;;
        esac
    done
    mkdir -p "$folder/$service"
    cp "$folder/public/ca.crt" "$folder/$service/ca.crt"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 \
        -subj "/CN=$service" -keyout "$folder/$service/server.key" \
        -out "$folder/$service/request.csr" 2>/dev/null
    # Python 3.13 refuses a certificate that lacks the key identifiers.
    cat > "$folder/$service/extensions.cnf" <<EXTENSIONS
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
EXTENSIONS
    openssl x509 -req -sha256 -days "$days" -in "$folder/$service/request.csr" \
        -CA "$folder/public/ca.crt" -CAkey "$folder/authority.key" -CAcreateserial \
        -extfile "$folder/$service/extensions.cnf" -out "$folder/$service/server.pem" 2>/dev/null
    rm "$folder/$service/request.csr" "$folder/$service/extensions.cnf"
    chmod 755 "$folder/$service"
    chmod 644 "$folder/$service/server.key" "$folder/$service/server.pem"
}

certificate superlink "$@"
certificate supernode-1
certificate supernode-2
echo "certificates for superlink, supernode-1 and supernode-2 are in $folder, valid $days days"

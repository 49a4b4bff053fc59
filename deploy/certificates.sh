#!/bin/sh
# Make the certificates that deploy/tls.yml mounts: one authority, and one key pair per service that
# listens, so that a node's key cannot pass for the SuperLink; and a secret that each of them shares
# with its SuperExec, so that nobody else is given its tasks.
#
#   deploy/certificates.sh [OPTION ...] [FOLDER [NAME ...]]
#
# FOLDER  where they go; deploy/certificates by default. What is there stays.
# NAME    further DNS names or IP addresses under which the SuperLink is reached.
#
# --nodes N           SuperNodes: supernode-1 to supernode-N; 2 by default.
# --days D            how long a service's certificate is valid; 365 by default.
# --renew SERVICE     a new key and certificate for this service, in place of those it has.
# --gateway           for deploy/hospital too: the gateway's certificate, and those that it asks for: of
#                     relay-1 to relay-N, which speak for a node, and of the operator's relay.
# --revoke RELAY      the gateway is to refuse the certificate that this relay has (FOLDER/gateway); copy
#                     its revoked.crl to the gateway and restart it.
# --authority FOLDER  where the authority's key lies, apart from all that is copied to nodes or built
#                     into an image; $XDG_DATA_HOME/fedsim/authority, or that of ~/.local/share.
#
# An authority that is there is used, never replaced. With FEDSIM_AUTHORITY_PASSPHRASE its key is
# encrypted with that passphrase.
set -eu

refuse() {
    echo "$1" >&2
    exit 2
}

# quietly COMMAND ...: what it says is shown only if it fails.
quietly() {
    said=$("$@" 2>&1) || {
        echo "$said" >&2
        exit 1
    }
}

positive() {
    case $2 in
        '' | *[!0-9]* | 0*) refuse "$1 $2: must be a whole number above 0" ;;
    esac
}

nodes=2 days=365 renewed='' revoked='' gateway='' authority=''
while [ $# -gt 0 ]; do
    case $1 in
        --gateway)
            gateway=yes
            shift
            ;;
        --nodes | --days | --renew | --revoke | --authority)
            [ $# -gt 1 ] || refuse "$1: needs a value"
            case $1 in
                --nodes) positive "$1" "$2" && nodes=$2 ;;
                --days) positive "$1" "$2" && days=$2 ;;
                --renew) renewed=$2 ;;
                --revoke) revoked=$2 gateway=yes ;;
                --authority) authority=$2 ;;
            esac
            shift 2
            ;;
        -*) refuse "$1: is no option; choose from --nodes, --days, --renew, --gateway, \
--revoke, --authority" ;;
        *) break ;;
    esac
done
folder=${1:-$(dirname "$0")/certificates}
[ $# -eq 0 ] || shift

services=superlink relays='' node=1
while [ "$node" -le "$nodes" ]; do
    services="$services supernode-$node"
    relays="${relays}relay-$node "
    node=$((node + 1))
done
relays="${relays}operator"
all=$services
[ -z "$gateway" ] || all="$services gateway $relays"
case " $all " in
    *" ${renewed:-superlink} "*) ;;
    *) refuse "--renew $renewed: is none of $all" ;;
esac
case " $relays " in
    *" ${revoked:-operator} "*) ;;
    *) refuse "--revoke $revoked: is none of $relays" ;;
esac
if [ -z "$authority" ]; then
    [ -n "${XDG_DATA_HOME:-}${HOME:-}" ] || refuse "there is no HOME: say --authority FOLDER"
    authority=${XDG_DATA_HOME:-$HOME/.local/share}/fedsim/authority
fi

# Only the owner can enter, so the keys below may be readable: the user of a container, who is
# somebody else, reads them through the folder that is mounted.
mkdir -p "$folder/public" "$authority"
chmod 700 "$folder" "$authority"
inside=$(cd "$authority" && pwd -P)/
case $inside in
    "$(cd "$folder" && pwd -P)"/*) refuse "--authority $authority: lies in $folder, which is copied" ;;
esac

FEDSIM_AUTHORITY_PASSPHRASE=${FEDSIM_AUTHORITY_PASSPHRASE:-}
export FEDSIM_AUTHORITY_PASSPHRASE
if [ -n "$FEDSIM_AUTHORITY_PASSPHRASE" ]; then
    encrypted='-aes256 -pass env:FEDSIM_AUTHORITY_PASSPHRASE'
else
    encrypted=''
fi
if [ ! -e "$authority/authority.key" ]; then
    # shellcheck disable=SC2086  # words of an option
    (umask 077 && quietly openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 \
        $encrypted -out "$authority/new.key")
    quietly openssl req -x509 -new -sha256 -days 3650 -subj "/CN=fedsim authority" \
        -key "$authority/new.key" -passin env:FEDSIM_AUTHORITY_PASSPHRASE \
        -out "$authority/ca.crt" -addext "keyUsage=critical,keyCertSign,cRLSign"
    mv "$authority/new.key" "$authority/authority.key"
fi
if [ -e "$folder/public/ca.crt" ] && ! cmp -s "$authority/ca.crt" "$folder/public/ca.crt"; then
    refuse "$folder holds certificates of another authority than $authority: say --authority, with \
its key as authority.key and its certificate as ca.crt, or another FOLDER"
fi
cp "$authority/ca.crt" "$folder/public/ca.crt"

trap 'rm -rf "$folder"/.making-*' EXIT

# certificate SERVICE ROLE NAME ...: a key pair for SERVICE, valid for these names. What has a role
# (node, operator) shows it to the gateway; what has none ("") listens alone.
certificate() {
    service=$1 role=$2
    if [ -e "$folder/$service/server.pem" ] && [ "$service" != "$renewed" ]; then
        return
    fi
    names="DNS:$service,DNS:localhost,IP:127.0.0.1"
    shift 2
    for name in "$@"; do
        case $name in
            *:* | *[0-9].*[0-9].*[0-9].*[0-9]) names="$names,IP:$name" ;;
            *) names="$names,DNS:$name" ;;
        esac
    done
    # made beside, so that a service has both of a pair or keeps both of the former one
    making=$folder/.making-$service
    rm -rf "$making"
    mkdir -p "$making" "$folder/$service"
    quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 \
        -subj "${role:+/OU=$role}/CN=$service" -keyout "$making/server.key" -out "$making/request.csr"
    # Python 3.13 refuses a certificate that lacks the key identifiers.
    cat > "$making/extensions.cnf" <<EXTENSIONS
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth${role:+, clientAuth}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
EXTENSIONS
    quietly openssl x509 -req -sha256 -days "$days" -in "$making/request.csr" \
        -CA "$authority/ca.crt" -CAkey "$authority/authority.key" \
        -passin env:FEDSIM_AUTHORITY_PASSPHRASE -CAcreateserial \
        -extfile "$making/extensions.cnf" -out "$making/server.pem"
    chmod 755 "$folder/$service"
    chmod 644 "$making/server.key" "$making/server.pem"
    mv "$making/server.key" "$making/server.pem" "$folder/$service"
    cp "$authority/ca.crt" "$folder/$service/ca.crt"
    rm -r "$making"
    echo "$service: a new key and certificate in $folder/$service, valid $days days"
}

# secret SERVICE: what it and its SuperExec alone have.
secret() {
    if [ ! -e "$folder/$1-secret/superexec.secret" ]; then
        mkdir -p "$folder/$1-secret"
        quietly openssl rand -out "$folder/$1-secret/new" 48
        chmod 755 "$folder/$1-secret"
        chmod 644 "$folder/$1-secret/new"
        mv "$folder/$1-secret/new" "$folder/$1-secret/superexec.secret"
    fi
}

for each in $services; do
    secret "$each"
    if [ "$each" = superlink ]; then certificate superlink '' "$@"; else certificate "$each" ''; fi
done

# listing COMMAND ...: openssl's list of what was called back, which lies beside the authority's key.
listing() {
    quietly openssl ca -config "$authority/revoked.cnf" -keyfile "$authority/authority.key" \
        -cert "$authority/ca.crt" -passin env:FEDSIM_AUTHORITY_PASSPHRASE "$@"
}

if [ -n "$gateway" ]; then
    if [ -n "$revoked" ] && [ ! -e "$folder/$revoked/server.pem" ]; then
        refuse "--revoke $revoked: $folder/$revoked has no certificate"
    fi
    cat > "$authority/revoked.cnf" <<LISTING
[ca]
default_ca = fedsim
[fedsim]
database = $authority/revoked.txt
unique_subject = no
default_md = sha256
default_crl_days = 3650
LISTING
    touch "$authority/revoked.txt"
    [ -z "$revoked" ] || listing -revoke "$folder/$revoked/server.pem"
    certificate gateway '' "$@"
    for each in $relays; do
        if [ "$each" = operator ]; then certificate operator operator; else certificate "$each" node; fi
    done
    listing -gencrl -out "$folder/.making-list"
    chmod 644 "$folder/.making-list"
    mv "$folder/.making-list" "$folder/gateway/revoked.crl"
    [ -z "$revoked" ] || echo "$revoked: called back; --renew $revoked makes another certificate"
fi
echo "the authority's key is $authority/authority.key: keep it off the nodes"

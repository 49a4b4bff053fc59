#!/bin/sh
# Make the keys by which the SuperLink knows its SuperNodes (deploy/auth.yml): a private one for each
# node, and a public one that is registered with `flwr supernode register`.
#
#   deploy/keys.sh [--nodes N] [FOLDER]
#
# --nodes N  SuperNodes: supernode-1 to supernode-N; 2 by default. What is there stays.
# FOLDER     where they go; deploy/certificates by default: supernode-1-key, which belongs on that
#            node alone, and public/supernode-1.pub.
set -eu

refuse() {
    echo "$1" >&2
    exit 2
}

nodes=2
while [ $# -gt 0 ]; do
    case $1 in
        --nodes)
            [ $# -gt 1 ] || refuse "$1: needs a value"
            case $2 in
                '' | *[!0-9]* | 0*) refuse "$1 $2: must be a whole number above 0" ;;
            esac
            nodes=$2
            shift 2
            ;;
        -*) refuse "$1: is no option; there is --nodes" ;;
        *) break ;;
    esac
done
folder=${1:-$(dirname "$0")/certificates}
command -v ssh-keygen > /dev/null || refuse "ssh-keygen is not here: install the OpenSSH client"

# Only the owner can enter, so the keys below may be readable: the user of a container, who is
# somebody else, reads them through the folder that is mounted.
mkdir -p "$folder/public"
chmod 700 "$folder"
node=1
while [ "$node" -le "$nodes" ]; do
    name=supernode-$node key=$folder/supernode-$node-key
    if [ ! -e "$key/supernode.key" ]; then
        rm -rf "$key.new"
        mkdir "$key.new"
        ssh-keygen -q -t ecdsa -b 384 -N '' -C "$name" -f "$key.new/supernode.key"
        chmod 755 "$key.new"
        chmod 644 "$key.new/supernode.key"
        mv "$key.new/supernode.key.pub" "$folder/public/$name.pub"
        rm -rf "$key"
        mv "$key.new" "$key"
        echo "$name: a new key in $key; register $folder/public/$name.pub"
    fi
    node=$((node + 1))
done

#!/bin/bash
# The compose files in real containers: `make deploy-containers`.
#
#   tests/deployment/containers.sh [FOLDER]
#
# Where a Docker engine answers, it is used: images are built and pulled as docs/deployment.md says.
# Where none does, and this is root on Debian, one is started that needs no image from anywhere:
# Debian by debootstrap stands in for the images' bases, with Flower's user and packages as its own
# Dockerfiles lay them on it, and with Debian's nginx. The project's Dockerfile and compose files are
# used as they are. What is fetched for that stays in FOLDER (~/.cache/fedsim-containers).
#
# It brings up the plain stack, the one with TLS and that of hospitals, runs a scenario on each, compares
# the bits with those of `fedsim run`, and looks at what the containers may do and reach. It ends
# all that it has started. Where no engine can run, the files' commands are run as processes, and what
# that does not show is said. Exit code 1: a check failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${1:-$HOME/.cache/fedsim-containers}"
place=$(cd "${1:-$HOME/.cache/fedsim-containers}" && pwd)
python=$root/.venv/bin/python flwr=$root/.venv/bin/flwr
flower=$(sed -n 's/^ARG FLOWER_VERSION=//p' "$root/Dockerfile" | head -1)
failed=0 t0=$(date +%s)

say() { printf '[%4ds] %s\n' $(($(date +%s) - t0)) "$*"; }
check() { # check WHAT COMMAND: whether the command, in one string, succeeds
    if eval "$2"; then say "ok      $1"; else say "FAILED  $1"; failed=1; fi
}

# what is committed or would be, by itself: no key, no data and no environment
project=$place/project
rm -rf "$project" && mkdir -p "$project"
git -C "$root" ls-files -z --cached --others --exclude-standard \
    | tar -C "$root" --ignore-failed-read --exclude .venv --null --no-recursion -T - -c \
    | tar -x -C "$project"

# --- an engine -----------------------------------------------------------------------------------------
export COMPOSE_INTERACTIVE_NO_CLI=1
started=()
stacks=()
at=() # how a command is run where the published ports are
cleanup() {
    for stack in "${stacks[@]}"; do down "$stack"; done
    for each in "${started[@]}"; do
        kill "$each" 2>/dev/null || true
        wait "$each" 2>/dev/null || true
    done
    [ ${#at[@]} -eq 0 ] || { ip netns del fedsim-engine; ip netns del fedsim-world; } 2>/dev/null || true
}
trap cleanup EXIT

as_processes() {
    say "NOT SHOWN: $1. No container was started: no image, no network of its own, no read-only file"
    say "NOT SHOWN: system and no limit of the files was tried. Their commands run as processes instead."
    exec "$root/.venv/bin/pytest" -q -m deploy "$root/tests/deployment/test_loopback.py" \
        "$root/tests/deployment/test_hospital.py" -k 'finishes_three or tls_overlay or hospital'
}

packages() { # packages COMMAND:PACKAGE ...: what is missing is installed, and no service started
    local missing=() each
    for each in "$@"; do
        command -v "${each%%:*}" >/dev/null || missing+=("${each##*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "apt-get install ${missing[*]}"
    apt-get update -qq
    printf '#!/bin/sh\nexit 101\n' > "$place/policy-rc.d" && chmod +x "$place/policy-rc.d"
    local made=''
    [ -e /usr/sbin/policy-rc.d ] || { cp "$place/policy-rc.d" /usr/sbin/policy-rc.d && made=yes; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >"$place/apt.log" 2>&1 || { [ -z "$made" ] || rm /usr/sbin/policy-rc.d; return 1; }
    [ -z "$made" ] || rm /usr/sbin/policy-rc.d
}

started_daemon() {
    # A network namespace is the machine that the engine is on, with rules and forwarding of its own, and
    # another one is the world that it is connected to, where something listens.
    for each in engine world; do
        ip netns del "fedsim-$each" 2>/dev/null || true
        ip netns add "fedsim-$each" || return 1
        ip -n "fedsim-$each" link set lo up
    done
    ip -n fedsim-engine link add world type veth peer name engine netns fedsim-world || return 1
    ip -n fedsim-engine addr add 192.0.2.2/24 dev world && ip -n fedsim-engine link set world up
    ip -n fedsim-world addr add 192.0.2.1/24 dev engine && ip -n fedsim-world link set engine up
    ip -n fedsim-engine route add default via 192.0.2.1
    nsenter --net=/run/netns/fedsim-world "$python" -m http.server 443 --bind 192.0.2.1 \
        --directory "$place/context" >/dev/null 2>&1 &
    started+=($!)
    at=(nsenter --net=/run/netns/fedsim-engine)
    export DOCKER_HOST=unix://$place/docker.sock DOCKER_BUILDKIT=0 COMPOSE_DOCKER_CLI_BUILD=0
    "${at[@]}" setsid dockerd --data-root "$place/docker" --exec-root "$place/exec" \
        --pidfile "$place/dockerd.pid" -H "$DOCKER_HOST" --bip 198.18.255.1/24 \
        --default-address-pool base=198.18.0.0/17,size=24 >"$place/dockerd.log" 2>&1 &
    started+=($!)
    for _ in $(seq 60); do docker version >/dev/null 2>&1 && return 0; sleep 0.5; done
    return 1
}

wheels() { # everything that the images install, fetched once by this machine's own pip
    local folder=$place/context/wheels mark
    mkdir -p "$folder"
    "$python" - "$project/pyproject.toml" > "$place/requirements.txt" <<'PY'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
extras = project["project"]["optional-dependencies"]["metrics"]
for each in (*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]):
    print(each.replace("flwr[simulation]", "flwr"))
PY
    held=$(cat "$place/requirements.txt" "$project/constraints.txt" | sha256sum | cut -c1-12)
    mark=$place/wheels-$held.done
    if [ ! -e "$mark" ]; then
        "$python" -m pip download --quiet --dest "$folder" --constraint "$project/constraints.txt" \
            "flwr==$flower" -r "$place/requirements.txt" pip setuptools wheel editables \
            2>"$place/wheels.log" || { tail -20 "$place/wheels.log"; exit 1; }
        touch "$mark"
    fi
    say "wheels: $(du -sh "$folder" | cut -f1)"
}

stand_ins() { # images of Flower and nginx under the names that the files want
    local nginx=nginxinc/nginx-unprivileged:1.28 base=fedsim-check/debian:2 source
    if ! docker image inspect "$base" >/dev/null 2>&1; then
        say "debootstrap"
        source=$(sed -n 's/^URIs: *//p;s/^deb [^h]*\(http[^ ]*\).*/\1/p' \
            /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -1) || true
        rm -rf "$place/rootfs"
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,nginx-light \
            bookworm "$place/rootfs" "$source" >"$place/debootstrap.log" 2>&1
        rm -rf "$place/rootfs/var/cache/apt"/* "$place/rootfs/var/lib/apt/lists"/*
        tar -C "$place/rootfs" -c . | docker import - "$base" >/dev/null
        rm -rf "$place/rootfs"
    fi
    docker tag "$base" "$nginx"
    # A user without rights in /app and a virtual environment of its own, as Flower's images have it,
    # and no package index at all: what is installed comes from /wheels.
    cat > "$place/context/Dockerfile" <<DOCKERFILE
FROM $base
COPY wheels /wheels
RUN adduser --no-create-home --disabled-password --gecos "" --uid 49999 app \\
    && mkdir -p /app /python && chown app:app /app /python
USER app
WORKDIR /app
ENV HOME=/app PATH=/python/venv/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \\
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
RUN python3 -m venv /python/venv && python -m pip install --no-cache-dir "flwr==$flower"
DOCKERFILE
    if ! docker image inspect "fedsim-check/flwr:$flower-$held" >/dev/null 2>&1; then
        say "base image with flwr $flower"
        docker build --network none -t "fedsim-check/flwr:$flower-$held" "$place/context" \
            >"$place/base.log" 2>&1 || { tail -20 "$place/base.log"; exit 1; }
    fi
    for name in superlink supernode superexec; do
        docker tag "fedsim-check/flwr:$flower-$held" "flwr/$name:$flower"
    done
}

build=()
if docker info >/dev/null 2>&1; then
    say "the engine that is here: $(docker version --format '{{.Server.Version}}')"
    host=${FEDSIM_DOCKER_BRIDGE:-172.17.0.1} # where containers find published ports of this machine
    world=${FEDSIM_WORLD:-1.1.1.1} # what a container with a way out reaches on port 443
else
    [ "$(id -u)" = 0 ] || as_processes "no Docker engine answers, and starting one takes root"
    command -v apt-get >/dev/null || as_processes "no Docker engine answers, and this is not Debian"
    mkdir -p "$place/context"
    packages dockerd:docker.io docker-compose:docker-compose debootstrap:debootstrap ip:iproute2 \
        iptables:iptables \
        || as_processes "the packages of an engine cannot be installed ($place/apt.log)"
    started_daemon || as_processes "an engine does not start here ($place/dockerd.log)"
    say "an engine of our own: $(docker version --format '{{.Server.Version}}'), images that stand in"
    build=(--network none) host=198.18.255.1 world=192.0.2.1
    wheels
    stand_ins
fi
compose=(docker-compose)
command -v docker-compose >/dev/null || compose=(docker compose)
say "building the Dockerfile"
docker build "${build[@]}" --build-arg FLOWER_VERSION="$flower" -t fedsim-superexec:0.1.0 "$project" \
    >"$place/build.log" 2>&1 || { tail -30 "$place/build.log"; exit 1; }

# --- stacks --------------------------------------------------------------------------------------------
of() { # of STACK ...: the compose client at one stack (what a variable says is exported before)
    local stack=$1
    shift
    case $stack in
        plain) "${compose[@]}" -p fedsim-plain -f "$project/docker-compose.yml" "$@" ;;
        watched) "${compose[@]}" -p fedsim-plain -f "$project/docker-compose.yml" \
            -f "$project/deploy/metrics.yml" "$@" ;;
        tls) "${compose[@]}" -p fedsim-tls -f "$project/docker-compose.yml" \
            -f "$project/deploy/tls.yml" "$@" ;;
        server | operator) "${compose[@]}" -p "fedsim-$stack" -f "$project/deploy/hospital/$stack.yml" "$@" ;;
        site-*) (
            number=${stack#site-}
            export FEDSIM_NODE=$number FEDSIM_PARTITION=$((number - 1)) FEDSIM_PARTITIONS=2
            export FEDSIM_SITE_FOLDER=$place/sites/site_$((number - 1))
            "${compose[@]}" -p "fedsim-$stack" -f "$project/deploy/hospital/site.yml" "$@"
        ) ;;
    esac
}
down() { of "$1" down -v --timeout 3 >/dev/null 2>&1 || true; }
container() { of "$1" ps -q "$2"; }
inside() { # inside STACK SERVICE COMMAND ...
    local stack=$1 service=$2
    shift 2
    docker exec "$(container "$stack" "$service")" "$@"
}
# python_in STACK SERVICE TEXT: what the text prints in a container of Flower's
python_in() { inside "$1" "$2" timeout 20 python -c "$3" 2>/dev/null; }
reaches() { python_in "$1" "$2" "import socket; socket.create_connection(('$3', $4), 2)" >/dev/null; }
address() { # address STACK SERVICE: one in any of its networks
    docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}' \
        "$(container "$1" "$2")"
}

up() { # up STACK SERVICES: it is up once so many services are healthy
    local stack=$1 wanted=$2 until states
    stacks+=("$stack")
    of "$stack" up -d --no-build >"$place/up-$stack.log" 2>&1 || { tail -20 "$place/up-$stack.log"; failed=1; }
    until=$(($(date +%s) + 120))
    while [ "$(date +%s)" -lt "$until" ]; do
        states=$(of "$stack" ps -q | xargs -r docker inspect --format '{{.State.Health.Status}}' \
            | sort | uniq -c | tr -s ' ' | tr '\n' ';')
        if [ "$states" = " $wanted healthy;" ]; then say "ok      $stack: $wanted services healthy"; return; fi
        sleep 1
    done
    say "FAILED  $stack: $wanted services healthy, found$states"
    failed=1
}

connection() { # connection NAME TRUST: where flwr finds the SuperLink
    export FLWR_HOME=$place/home-$1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
    mkdir -p "$FLWR_HOME"
    printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:8000"\n%s\n' "$2" \
        > "$FLWR_HOME/config.toml"
}
hash_of() { "$python" -c "import json,sys; print(json.load(open(sys.argv[1]))['params_sha256'])" "$1/summary.json" 2>/dev/null || echo none; }
simulated() { # simulated SCENARIO: the bits that the run must have
    rm -rf "$place/simulated"
    (cd "$project" && OMP_NUM_THREADS=1 PYTHONPATH=$project "$python" -m fedsim run "$1" \
        --set engine.kind=inline --out "$place/simulated" >"$place/simulated.log" 2>&1)
    hash_of "$place/simulated"
}
compared() { # compared NAME STACK SCENARIO: a run has the bits of a simulation
    local expected found
    expected=$(simulated "$3")
    timeout 300 "${at[@]}" "$flwr" run "$project" here --stream --run-config "scenario='$3'" \
        --run-config "out='/app/runs/$1'" >"$place/run-$1.log" 2>&1 || true
    rm -rf "$place/out-$1"
    docker cp "$(container "$2" superexec-server)":"/app/runs/$1" "$place/out-$1" >/dev/null 2>&1 || true
    found=$(hash_of "$place/out-$1")
    check "$1: the run has the bits of fedsim run ($found)" "[ '$found' = '$expected' ] && [ '$found' != none ]"
}

confined() { # confined STACK SERVICE: nobody is root there and nothing is left to gain
    check "$1 $2: not root, no capability" \
        "[ \"\$(inside $1 $2 id -u)\" != 0 ] && inside $1 $2 grep -q 'CapEff:.0000000000000000' /proc/1/status"
}

scenario=scenarios/deploy_two_clients.toml
acquire="from flwr.supercore.runtime import RuntimeHttpClient as C
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor as V
from flwr.supercore.retry import make_simple_http_retry_invoker as r
from flwr.proto.runtime_pb2 import AcquireTaskRequest as A
C.from_server_address(server_address='superlink:8000', insecure=True, root_certificates=None, interceptors=[V(component_name='SuperExec')], retry_invoker=r()).AcquireTask(A(supported_task_types=['flwr-serverapp']))"

export FEDSIM_DATA=$place/data
mkdir -p "$FEDSIM_DATA"

say "plain"
up plain 6
connection plain 'insecure = true'
compared plain plain "$scenario"
confined plain supernode-1
confined plain superexec-client-1
check "plain: data cannot be written" "! inside plain superexec-client-1 touch /app/data/x 2>/dev/null"
check "plain: a client reaches its own SuperNode" "reaches plain superexec-client-1 supernode-1 9094"
for there in superlink:8000 supernode-2:9094; do
    check "plain: a client does not reach $there" "! reaches plain superexec-client-1 ${there/:/ }"
done
check "plain: a SuperNode reaches the SuperLink" "reaches plain supernode-1 superlink 8000"
check "plain: a SuperNode does not reach the other one" "! reaches plain supernode-1 supernode-2 9094"
check "plain: a SuperNode is not given the server's tasks" "! python_in plain supernode-1 \"\$acquire\""
secret='import hashlib; print(hashlib.sha256(open("secret/superexec.secret", "rb").read()).hexdigest())'
check "plain: its SuperExec has the SuperLink's secret" \
    "[ \"\$(python_in plain superlink '$secret')\" = \"\$(python_in plain superexec-server '$secret')\" ]"
check "plain: a SuperNode has another one" \
    "[ \"\$(python_in plain superlink '$secret')\" != \"\$(python_in plain supernode-1 '$secret')\" ]"
docker build "${build[@]}" --build-arg FLOWER_VERSION="$flower" --build-arg 'EXTRAS=[metrics]' \
    -t fedsim-superexec:0.1.0-metrics "$project" >"$place/build-metrics.log" 2>&1 \
    || { tail -30 "$place/build-metrics.log"; exit 1; }
stacks+=(watched)
up watched 7
confined watched metrics
check "watched: what is served says that the run has ended" \
    "${at[*]} curl --silent --fail http://127.0.0.1:9464/metrics | grep -q '^fedsim_run_state{.*run=\"plain\".*state=\"completed\".* 1.0'"
check "watched: run folders cannot be written" "! inside watched metrics touch runs/x 2>/dev/null"
down watched

say "tls"
authority=$place/authority
rm -rf "$authority" "$project/deploy/certificates"
(cd "$project" && deploy/certificates.sh --authority "$authority" --gateway && deploy/keys.sh) >/dev/null
trust="root-certificates = \"$project/deploy/certificates/public/ca.crt\""
up tls 6
connection tls "$trust"
compared tls tls "$scenario"
down tls

say "hospital"
rm -rf "$place/sites"
PYTHONPATH=$project "$python" - "$place" "$project/scenarios/of_two_sites.toml" <<'PY'
import shutil, sys
from pathlib import Path
from tests.deployment.sites_apart import SIZES, scenario, written
place, file = Path(sys.argv[1]), Path(sys.argv[2])
files = written(place / "sites", SIZES[:2])
shutil.copy(scenario(place, files, rounds=2), file)
PY
export FEDSIM_BIND=$host FEDSIM_GATEWAY=$host
up server 3
up operator 1
connection hospital "$trust"
for number in 1 2; do
    "${at[@]}" "$flwr" supernode register "$project/deploy/certificates/public/supernode-$number.pub" here \
        >"$place/register-$number.log" 2>&1 || { cat "$place/register-$number.log"; failed=1; }
    up "site-$number" 3
done
compared hospital server scenarios/of_two_sites.toml
for each in server:superlink server:superexec-server server:gateway operator:operator \
    site-1:relay site-1:supernode site-1:superexec-client; do
    stack=${each%%:*} service=${each##*:}
    confined "$stack" "$service"
    check "$stack $service: its own files cannot be written, memory and processes are bounded" \
        "! inside $stack $service touch /usr/x 2>/dev/null && [ \"\$(docker inspect --format \
        '{{.HostConfig.ReadonlyRootfs}} {{gt .HostConfig.Memory 0}}' \$(container $stack $service))\" = 'true true' ]"
done
check "hospital: the SuperLink is published nowhere" "[ -z \"\$(docker port \$(container server superlink))\" ]"
check "hospital: a client sees its own site's file, and cannot write it" \
    "inside site-1 superexec-client cmp -s data/patients.csv - < /dev/null; \
     inside site-1 superexec-client cat data/patients.csv | cmp -s - $place/sites/site_0/patients.csv \
     && ! inside site-1 superexec-client touch data/x 2>/dev/null"
check "hospital: the server sees no site's file" "[ -z \"\$(inside server superexec-server ls data)\" ]"
# the controls first: what a look would see if something could be reached
check "hospital: a client reaches its SuperNode" "reaches site-1 superexec-client supernode-1 9094"
check "hospital: a SuperNode reaches its relay" "reaches site-1 supernode relay-1 8000"
check "hospital: the server's SuperExec reaches the SuperLink" "reaches server superexec-server superlink 8000"
if inside site-1 relay timeout 5 bash -c "exec 3<>/dev/tcp/$world/443" 2>/dev/null; then
    say "ok      hospital: a relay reaches the world outside ($world)"
    for from in "site-1 superexec-client" "site-1 supernode" "server superexec-server" "server superlink"; do
        check "hospital: $from has no way out" "! reaches $from $world 443"
    done
else
    say "NOT SHOWN: that what trains has no way out: not even a relay reaches $world:443 from here"
fi
for service in relay supernode superexec-client; do
    for there in $(address site-2 $service); do
        check "hospital: a client reaches nothing of the other site ($service)" \
            "! reaches site-1 superexec-client $there 9094 && ! reaches site-1 superexec-client $there 8000"
        check "hospital: a SuperNode reaches nothing of the other site ($service)" \
            "! reaches site-1 supernode $there 9094 && ! reaches site-1 supernode $there 8000"
    done
done
asks="import http.client as h, ssl, sys
c = h.HTTPSConnection('relay-1', 8000, context=ssl.create_default_context(cafile='certificates/ca.crt'), timeout=10)
c.request(sys.argv[2], sys.argv[1]); print(c.getresponse().status)"
for asked in "/v1/control/start-run POST 403" "/v1/runtime/acquire-task POST 403" "/health GET 200"; do
    check "hospital: what a SuperNode is answered: $asked" \
        "[ \"\$(inside site-1 supernode timeout 20 python -c \"\$asks\" ${asked% *})\" = ${asked##* } ]"
done
check "hospital: who has no certificate is not let in by the gateway" \
    "! ${at[*]} curl --silent --fail --cacert $project/deploy/certificates/public/ca.crt --connect-to gateway:8443:$host:8443 https://gateway:8443/health >/dev/null"
check "hospital: an operator is" \
    "${at[*]} curl --silent --fail --cacert $project/deploy/certificates/public/ca.crt --cert $project/deploy/certificates/operator/server.pem --key $project/deploy/certificates/operator/server.key --connect-to gateway:8443:$host:8443 https://gateway:8443/health >/dev/null"

say "done, failed=$failed"
exit $failed

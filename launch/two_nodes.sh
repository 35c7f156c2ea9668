#!/usr/bin/env bash
# Two nodes on one machine: the real multi-node launch (hostfile, pdsh, ssh, gloo over a network), for tests and for trying things.
#
#     launch/two_nodes.sh [DEEPSPEED_OPTION...] SCRIPT [ARGUMENT...]
#     launch/two_nodes.sh launch/train.py recipes/tiny.yaml --stage 1 run.dir=runs/two-nodes
#     launch/two_nodes.sh --check                # can this machine do it? exit code 0, or a sentence that says why not
#
# Each node is a network, process, host-name and mount namespace of its own with an sshd in it; a veth pair, called eth0 at both
# ends, joins them. Files are shared, as on a cluster with one file system. SLOTS=2 gives each node two ranks (default: one).
# The exit code is deepspeed's. Ctrl-C ends everything at once. Nothing has to be cleaned up, also after kill -9: everything lives in
# namespaces that the kernel takes away with their first process, and in a tmpfs only they see.
#
# Needs root, and Debian's iproute2, openssh-server, openssh-client, pdsh and hostname.
set -euo pipefail

ADDRESS_1=192.0.2.1 # RFC 5737: a range that no real network uses
ADDRESS_2=192.0.2.2
STATE=/run/two-nodes # in the namespaces' own /run
SELF=$(realpath "$0")
NAMESPACES=(unshare --net --uts --mount --pid --fork --kill-child --mount-proc)

refuse() {
    echo "error: two nodes cannot be made here: $1" >&2
    exit 1
}

check_machine() {
    local tool
    [ "$(id -u)" = 0 ] || refuse "network namespaces and sshd need root. Run it as root."
    for tool in unshare setpriv ip ssh ssh-keygen sshd pdsh hostname; do
        command -v "$tool" >/dev/null || refuse "'$tool' is not installed. On Debian: apt-get install iproute2 openssh-server openssh-client pdsh hostname"
    done
    command -v deepspeed >/dev/null || refuse "'deepspeed' is not on PATH. Run 'make install', then PATH=.venv/bin:\$PATH."
    "${NAMESPACES[@]}" ip link add eth0 type veth peer name eth1 2>/dev/null ||
        refuse "the machine forbids network namespaces or veth devices (a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN)."
}

write_keys() {
    local key
    for key in host user; do
        ssh-keygen -q -t ed25519 -N '' -C '' -f "$STATE/$key"
    done
    echo "node1,node2,$ADDRESS_1,$ADDRESS_2 $(cat "$STATE/host.pub")" >"$STATE/known_hosts"
    printf '%s localhost\n' 127.0.0.1 >"$STATE/hosts"
    printf '%s node1\n' "$ADDRESS_1" "::ffff:$ADDRESS_1" >>"$STATE/hosts" # torch looks peers up in the IPv6 form
    printf '%s node2\n' "$ADDRESS_2" "::ffff:$ADDRESS_2" >>"$STATE/hosts"
    mount --bind "$STATE/hosts" /etc/hosts
}

write_ssh_settings() {
    cat >"$STATE/sshd_config" <<EOF
HostKey $STATE/host
AuthorizedKeysFile $STATE/user.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
LogLevel ERROR
EOF
    cat >"$STATE/ssh_config" <<EOF
IdentityFile $STATE/user
IdentitiesOnly yes
UserKnownHostsFile $STATE/known_hosts
StrictHostKeyChecking yes
BatchMode yes
ServerAliveInterval 5
ServerAliveCountMax 3
LogLevel ERROR
EOF
    # The launcher and pdsh call plain 'ssh'; -F keeps the user's own ssh settings out of it.
    mkdir "$STATE/bin"
    printf '#!/bin/sh\nexec %s -F %s/ssh_config "$@"\n' "$(command -v ssh)" "$STATE" >"$STATE/bin/ssh"
    chmod +x "$STATE/bin/ssh"
}

# What a rank inherits: ssh starts it with an empty environment, and gloo would take the loopback for the network.
write_environment() {
    local name
    {
        echo "GLOO_SOCKET_IFNAME=eth0"
        echo "NCCL_SOCKET_IFNAME=eth0"
        for name in PATH DS_ACCELERATOR $(compgen -e | grep -E '^(VIRTUAL_ENV|LD_LIBRARY_PATH|TMPDIR|(OMP|MKL|HF|DS|DEEPSPEED|TOKENIZERS|TRANSFORMERS|TORCH|XDG)_.*)$'); do
            [ -z "${!name:-}" ] || echo "$name=${!name}" # deepspeed crashes on a blank line, so no line without a value
        done
    } | sort -u >"$STATE/deepspeed_env"
}

write_hostfile() {
    printf 'node1 slots=%s\nnode2 slots=%s\n' "${SLOTS:-1}" "${SLOTS:-1}" >"$STATE/hostfile"
}

wait_for() {
    local tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || refuse "waited 10 s in vain for: $*"
        sleep 0.1
    done
}

start_node() { # NAME ADDRESS, with eth0 there
    ip address add "$2/24" dev eth0
    ip link set eth0 up
    "$(command -v sshd)" -f "$STATE/sshd_config"
}

second_node() {
    hostname node2
    ip link set lo up
    touch "$STATE/second"
    wait_for ip link show eth0
    start_node node2 "$ADDRESS_2"
    exec sleep infinity
}

first_node() {
    mount -t tmpfs tmpfs /run
    mkdir -p "$STATE" /run/sshd
    hostname node1
    ip link set lo up
    write_keys
    write_ssh_settings
    write_environment
    write_hostfile
    "${NAMESPACES[@]}" "$SELF" --second-node &
    wait_for test -e "$STATE/second"
    ip link add eth0 type veth peer name eth0 netns $!
    start_node node1 "$ADDRESS_1"
    export PATH="$STATE/bin:$PATH" DS_ENV_FILE="$STATE/deepspeed_env" # an absolute path: the user's own .deepspeed_env stays out
    wait_for ssh node1 true
    wait_for ssh node2 true
    deepspeed --hostfile "$STATE/hostfile" "$@" </dev/null
}

# unshare itself lets no SIGINT or SIGTERM through, so this shell stays; where it is killed outright, unshare dies with it.
run_until_stopped() {
    setpriv --pdeathsig KILL "${NAMESPACES[@]}" "$SELF" --first-node "$@" &
    trap 'kill -KILL $!; exit 130' INT
    trap 'kill -KILL $!; exit 143' TERM
    wait $!
}

case "${1:-}" in
"" | -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$SELF" ;;
--check) check_machine ;;
--first-node) shift && first_node "$@" ;;
--second-node) second_node ;;
*)
    check_machine
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # two nodes that share one GPU cannot talk to each other by NCCL
    run_until_stopped "$@"
    ;;
esac

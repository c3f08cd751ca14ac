#!/bin/sh
# Install what slurm_cluster.py needs, a C compiler and zsh, on Debian 12, without starting any of its services.
set -eu

packages="slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2 hostname util-linux gcc libc6-dev zsh"

installed() {
    for package in $packages; do
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || return 1
    done
}

if installed; then
    echo "already installed"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "install_packages.sh: run as root" >&2
    exit 1
fi

# dpkg asks this program before it starts a service; 101 forbids it. Containers often have their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086  # a list of words
apt-get -qq install --yes --no-install-recommends $packages >/dev/null

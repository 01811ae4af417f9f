# Sourced by test/servers: other releases of Debian in chroots. Every mount is made in a mount namespace of the command's own, so that
# nothing of this system is ever mounted below a chroot for others to see, or for a removal to reach. The nodes in /dev are mmdebstrap's.

# make_root NAME SUITE PACKAGE…: $cache/NAME, a chroot of that release.
make_root() {
    local root=$cache/$1 suite=$2 base packages source=
    shift 2
    [ -e "$root.made" ] && return
    apt_install mmdebstrap || return
    base=$(debian_mirror)
    grep -q " $root/" /proc/mounts && { echo "error: something is mounted below $root"; return 1; }
    rm -rf --one-file-system "$root"
    packages=$(IFS=,; echo "$*")
    # An old release's security archive may list what it no longer holds; the release itself suffices.
    source="deb $base $suite main"
    mmdebstrap --quiet --variant=apt --mode=root --aptopt='Acquire::Check-Valid-Until "false"' ${packages:+--include="$packages"} \
        "$suite" "$root" "$source" || { echo "error: mmdebstrap $suite failed"; return 1; }
    touch "$root.made"
}

# in_root ROOT COMMAND…: with /proc and /dev/shm of its own, and a copy of the project in /project.
in_root() {
    local root=$1
    shift
    rm -rf --one-file-system "$root/project"
    mkdir -p "$root/project" "$root/dev/shm"
    tar -C "$PROJECT" --exclude=./.git --exclude='*.o' --exclude='*.d' --exclude='*.so' --exclude='*.bc' -cf - . | tar -C "$root/project" -xf - || return
    [ -r "${MIGRATE_CHINOOK:-}" ] && cp "$MIGRATE_CHINOOK" "$root/chinook.sql"
    [ -e "$root/chinook.sql" ] || cp "$PROJECT/../shared/data/chinook.sql" "$root/" 2>/dev/null
    unshare --mount --propagation private bash -c '
        root=$1; shift
        mount -t proc proc "$root/proc" && mount -t tmpfs tmpfs "$root/dev/shm" || exit
        exec chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb MIGRATE_CHINOOK=/chinook.sql "$@"
    ' in_root "$root" "$@"
}

on_packaged() {
    local suite
    case $1 in 13) suite=bullseye ;; 17) suite=trixie ;; 18) suite=forky ;; esac
    make_root "postgresql-$1" "$suite" make g++ "postgresql-$1" "postgresql-server-dev-$1" "postgresql-$1-pgtap" libipc-run-perl libdbd-pg-perl \
        libtap-parser-sourcehandler-pgtap-perl || return
    in_root "$cache/postgresql-$1" env PG_CONFIG="/usr/lib/postgresql/$1/bin/pg_config" bash /project/test/run
}

# A bare release, an ordinary user who may use sudo: test/run installs what it needs, then make, make install and make installcheck
# against a cluster of the user's own (pg_virtualenv).
on_bare() {
    make_root bare "$SOURCE_SUITE" sudo || return
    local root=$cache/bare.used status
    grep -q " $root/" /proc/mounts && { echo "error: something is mounted below $root"; return 1; }
    rm -rf --one-file-system "$root"
    cp -a "$cache/bare" "$root" || return
    cat >"$root/try" <<'SCRIPT'
#!/bin/bash
set -e
echo "127.0.0.1 localhost $(hostname)" >/etc/hosts  # sudo asks for it
useradd --create-home --shell /bin/bash dev
echo 'dev ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/dev
chown -R dev: /project
cat >/try_as_dev <<'AS_DEV'
set -e
cd /project
bash test/run checks regress pgtap
make -s
sudo make -s install
pg_virtualenv make -s installcheck || { head -150 regression.diffs; exit 1; }
AS_DEV
exec su - dev -c 'bash /try_as_dev'
SCRIPT
    in_root "$root" bash /try
    status=$?
    rm -rf --one-file-system "$root"
    return $status
}

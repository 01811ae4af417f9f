# Sourced by test/run and test/demo: from a bare Debian to a private PostgreSQL with this extension in it.
#
#   setup          installs packages that are missing, makes the temporary folder $T with a copy of this tree and of the server,
#                  builds the extension and installs it into that copy. No file of the system's PostgreSQL is touched.
#   as_user CMD…   runs CMD as the unprivileged user who owns $T (servers refuse to run as root).
#
# Afterwards: $PG_CONFIG, $BIN (the private server's programs), $TREE (the copy of the project), $PG_MAJOR.
# At exit, Ctrl-C included, every server under $T is stopped and $T is removed (KEEP=1: both stay).
# Another version of PostgreSQL: PG_CONFIG=/usr/lib/postgresql/17/bin/pg_config bash test/run

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
T=
KEEP=${KEEP:-0}

say() { printf '%s\n' "== $*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# --- packages ---------------------------------------------------------------------------------------------------------

# The major version to use where PG_CONFIG does not say: the newest server that is installed with its headers, else Debian's own.
default_major() {
    local newest
    newest=$(ls -d /usr/lib/postgresql/*/lib/pgxs 2>/dev/null | sed 's|^/usr/lib/postgresql/||; s|/.*||' | sort -n | tail -1)
    [ -n "$newest" ] && { echo "$newest"; return; }
    case $(. /etc/os-release 2>/dev/null && echo "${VERSION_ID:-}") in
        11) echo 13 ;;
        13) echo 17 ;;
        14) echo 18 ;;
        *) echo 15 ;;
    esac
}

# PG_CONFIG as given may be a name in PATH, or Debian's wrapper /usr/bin/pg_config: take the one beside the server.
resolve_pg_config() {
    PG_CONFIG=${PG_CONFIG:-/usr/lib/postgresql/$(default_major)/bin/pg_config}
    local found
    found=$(command -v "$PG_CONFIG" || true)
    if [ -n "$found" ]; then
        PG_CONFIG=$found
        found=$("$PG_CONFIG" --bindir)/pg_config
        [ -x "$found" ] && PG_CONFIG=$found
    fi
    return 0
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Installs those of the packages that are missing.
apt_install() {
    local package missing=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq) output
    for package in "$@"; do installed "$package" || missing+=("$package"); done
    [ ${#missing[@]} = 0 ] && return
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        echo "error: these packages are missing, and installing them needs root or sudo: ${missing[*]}"
        return 1
    fi
    say "installing ${missing[*]}"
    output=$(as_root "${apt[@]}" update 2>&1) || { echo "$output"; echo "error: apt-get update failed"; return 1; }
    output=$(as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" 2>&1) || { echo "$output"; echo "error: apt-get install failed"; return 1; }
}

install_packages() {
    command -v dpkg-query >/dev/null || { say "not a Debian: taking for granted that everything needed is installed"; return; }
    local wanted=(make g++ libipc-run-perl libdbd-pg-perl libtap-parser-sourcehandler-pgtap-perl) version=
    # A server outside Debian's place was built by hand: its packages are its owner's business.
    case $PG_CONFIG in
        /usr/lib/postgresql/*)
            version=${PG_CONFIG#/usr/lib/postgresql/}
            version=${version%%/*}
            wanted+=("postgresql-$version" "postgresql-server-dev-$version" "postgresql-$version-pgtap") ;;
    esac
    # The source is formatted with version 14, which is Debian 12's.
    grep -qs '^VERSION_ID="12"' /etc/os-release && wanted+=(clang-format-14)
    # No cluster of the system's own: the tests bring up private servers.
    if [ -n "$version" ] && ! installed "postgresql-$version" && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }; then
        as_root mkdir -p /etc/postgresql-common/createcluster.d
        echo 'create_main_cluster = false' | as_root tee /etc/postgresql-common/createcluster.d/no-main-cluster.conf >/dev/null
    fi
    apt_install "${wanted[@]}" || die "the packages that the tests need could not be installed"
}

# --- the temporary folder ---------------------------------------------------------------------------------------------

# Words to put before a command: setpriv, unlike runuser, does not stay between us and the command, so $! is the command's.
AS_USER=()
as_user() { "${AS_USER[@]}" "$@"; }

# Who does what root may not.
choose_user() {
    unprivileged=postgres
    id -u postgres >/dev/null 2>&1 || unprivileged=nobody
    AS_USER=(setpriv --reuid="$unprivileged" --regid="$(id -g "$unprivileged")" --init-groups --)
}

# Stops every server whose data folder lies under $T, and waits until it is gone.
stop_servers() {
    local file pid i
    find "$T" -name postmaster.pid 2>/dev/null | while read -r file; do
        pid=$(head -1 "$file" 2>/dev/null) || continue
        [ -n "$pid" ] && kill -QUIT "$pid" 2>/dev/null || continue
        for i in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    done
}

cleanup() {
    local status=$?
    trap '' INT TERM HUP
    if declare -F at_exit >/dev/null; then at_exit; fi
    if [ -n "$T" ] && [ "$KEEP" != 1 ]; then
        local job
        for job in $(jobs -p); do kill "$job" 2>/dev/null; done
        stop_servers
        cd /
        rm -rf "$T" 2>/dev/null || { sleep 1; rm -rf "$T"; }
    fi
    exit "$status"
}

make_folder() {
    T=$(mktemp -d "${TMPDIR:-/tmp}/migrate_ext.XXXXXX")
    TREE=$T/tree
    mkdir "$TREE" "$T/tmp" "$T/home" "$T/log"
    tar -C "$PROJECT" --exclude=./.git --exclude='*.o' --exclude='*.d' --exclude='*.so' --exclude='*.bc' \
        --exclude='./migrate_ext--*.sql' --exclude=./results --exclude=./tmp_check -cf - . | tar -C "$TREE" -xf - ||
        die "cannot copy the tree to $TREE"
    local chinook=${MIGRATE_CHINOOK:-$PROJECT/../shared/data/chinook.sql}
    if [ -r "$chinook" ]; then cp "$chinook" "$T/chinook.sql" && export MIGRATE_CHINOOK=$T/chinook.sql; fi
    if [ "$(id -u)" = 0 ]; then
        choose_user
        chown -R "$unprivileged:" "$T"
        chmod -R u+w "$T/tree"
    fi
    chmod 755 "$T"
    # What the caller's environment says about servers must not reach ours.
    local variable
    for variable in $(compgen -e PG | grep -vx PG_CONFIG); do unset "$variable"; done
    export HOME=$T/home TMPDIR=$T/tmp LC_ALL=C.UTF-8 TZ=UTC
    unset LANG LANGUAGE MAKEFLAGS MAKELEVEL PERL5LIB PERL5OPT PROVE_RC
    cd "$T" || exit 1
}

# --- the private server -----------------------------------------------------------------------------------------------

# The longest folder that holds all the folders given.
common_folder() {
    local prefix=$1 path
    for path in "$@"; do
        while [ "$prefix" != / ] && [ "${path#"$prefix"/}" = "$path" ]; do prefix=$(dirname "$prefix"); done
    done
    echo "${prefix%/}"
}

# Copies the server's programs, libraries and shared files into $T with their places relative to each other kept: PostgreSQL
# finds its files relative to its programs, so the copy lives on its own and the extension is installed there without root.
copy_server() {
    local bindir pkglibdir sharedir includedir prefix folder
    bindir=$("$PG_CONFIG" --bindir) pkglibdir=$("$PG_CONFIG" --pkglibdir)
    sharedir=$("$PG_CONFIG" --sharedir) includedir=$("$PG_CONFIG" --includedir)
    prefix=$(common_folder "$bindir" "$pkglibdir" "$sharedir" "$includedir")
    for folder in "$bindir" "$pkglibdir" "$sharedir"; do
        as_user mkdir -p "$T/pg${folder#"$prefix"}"
        as_user cp -R --preserve=mode,timestamps "$folder/." "$T/pg${folder#"$prefix"}/" || die "cannot copy $folder"
    done
    as_user mkdir -p "$(dirname "$T/pg${includedir#"$prefix"}")"
    as_user ln -s "$includedir" "$T/pg${includedir#"$prefix"}"
    BIN=$T/pg${bindir#"$prefix"}
    # Debian's PostgreSQL 13 relocates like any other, but its pg_config says where the package has put things.
    if [ "$("$BIN/pg_config" --sharedir)" = "$sharedir" ]; then
        as_user mv "$BIN/pg_config" "$BIN/pg_config.package"
        # (Its folders are told by its own place, so that a copy of all this is a server of its own, too.)
        { echo '#!/bin/bash'
          printf 'root=${0%%%s}\n' "${bindir#"$prefix"}/pg_config"
          printf '"$0.package" "$@" | sed -E'
          for folder in "$bindir" "$pkglibdir" "$sharedir" "$includedir"; do
              printf ' -e "s:(^|= )%s(/|\$):\\1$root%s\\2:"' "$folder" "${folder#"$prefix"}"
          done; echo; } | as_user tee "$BIN/pg_config" >/dev/null
        as_user chmod 755 "$BIN/pg_config"
    fi
    PG_CONFIG=$BIN/pg_config
    [ "$("$PG_CONFIG" --sharedir)" = "$T/pg${sharedir#"$prefix"}" ] ||
        die "the copy of the server in $T looks for its files in $("$PG_CONFIG" --sharedir)"
    # A version of this extension in the system's server must not be mistaken for the one under test.
    rm -f "$("$PG_CONFIG" --pkglibdir)"/migrate_ext.so "$("$PG_CONFIG" --sharedir)"/extension/migrate_ext*
    PG_MAJOR=$("$PG_CONFIG" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/')
    # pgTAP is plain SQL: a server built by hand may borrow it.
    if [ ! -e "$("$PG_CONFIG" --sharedir)/extension/pgtap.control" ]; then
        as_user cp /usr/share/postgresql/*/extension/pgtap* "$("$PG_CONFIG" --sharedir)/extension/" 2>/dev/null
    fi
    export PATH=$BIN:$PATH PG_CONFIG
}

# $1: arguments for make (with_llvm=no unless given otherwise: bitcode takes as long again).
build() {
    as_user make -C "$TREE" -j2 PG_CONFIG="$PG_CONFIG" "${1:-with_llvm=no}" all >"$T/log/build.log" 2>&1 &&
        as_user make -C "$TREE" PG_CONFIG="$PG_CONFIG" "${1:-with_llvm=no}" install >>"$T/log/build.log" 2>&1
}

# The pg_config of build_variant's NAME.
variant_pg_config() { echo "$T/pg_$1${PG_CONFIG#"$T/pg"}"; }

# build_variant NAME make-argument…: another private installation, $T/pg_NAME, with the extension built from the same source
# with these arguments (MIGRATE_TEST=1, say). To run something in it: in_variant NAME command….
build_variant() {
    local name=$1 config
    shift
    [ -d "$T/pg_$name" ] && { [ -e "$T/pg_$name/built" ]; return; }
    as_user cp -R --preserve=mode,timestamps,links "$T/pg" "$T/pg_$name" && as_user mkdir "$T/tree_$name" || return
    tar -C "$TREE" --exclude='*.o' --exclude='*.d' --exclude='*.so' --exclude='*.bc' --exclude='./migrate_ext--*.sql' -cf - . |
        as_user tar -C "$T/tree_$name" -xf - || return
    config=$(variant_pg_config "$name")
    as_user make -C "$T/tree_$name" -j2 PG_CONFIG="$config" with_llvm=no "$@" all install >"$T/log/build.$name.log" 2>&1 &&
        as_user touch "$T/pg_$name/built"
}

in_variant() {
    local config
    config=$(variant_pg_config "$1")
    shift
    PATH=$(dirname "$config"):$PATH PG_CONFIG=$config "$@"
}

setup() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    resolve_pg_config
    install_packages
    resolve_pg_config
    [ -x "$PG_CONFIG" ] || die "no such program: PG_CONFIG=$PG_CONFIG"
    [ -e "$("$PG_CONFIG" --pgxs)" ] || die "$("$PG_CONFIG" --pgxs) is missing: install the server's development files"
    make_folder
    copy_server
    say "building for $("$PG_CONFIG" --version) in $T"
    if ! build; then
        tail -50 "$T/log/build.log"
        die "the build failed"
    fi
}

# --- a server by itself (demo, pgTAP) ---------------------------------------------------------------------------------

# start_server NAME [line of postgresql.conf]…: a server in $T/NAME, socket in $T/NAME/socket, superuser postgres.
start_server() {
    local name=$1 line
    shift
    as_user mkdir -p "$T/$name/socket"
    as_user initdb -N -A trust -U postgres -E UTF8 --locale=C.UTF-8 -D "$T/$name/data" >"$T/log/$name.initdb.log" 2>&1 ||
        { cat "$T/log/$name.initdb.log"; return 1; }
    for line in "listen_addresses = ''" "unix_socket_directories = '$T/$name/socket'" "fsync = off" \
        "max_worker_processes = 16" "max_prepared_transactions = 10" "log_line_prefix = '%m [%p] %q%u@%d '" "$@"; do
        echo "$line"
    done | as_user tee -a "$T/$name/data/postgresql.conf" >/dev/null
    as_user pg_ctl -D "$T/$name/data" -l "$T/log/$name.log" -w start >/dev/null || { tail -20 "$T/log/$name.log"; return 1; }
    export PGHOST=$T/$name/socket PGUSER=postgres PGPORT=5432
}

stop_server() {
    as_user pg_ctl -D "$T/$1/data" -m immediate stop >/dev/null 2>&1
    unset PGHOST PGPORT PGUSER
}

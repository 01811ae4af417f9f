# Sourced by test/servers: PostgreSQL 15 built from Debian's source, with assertions and with what valgrind needs to know of its memory.

SOURCE_PACKAGE=postgresql-15 SOURCE_SUITE=bookworm
# Under a checker tests run ten times slower (sanitizers) to a hundred times (valgrind); these reach every layer of src/.
SANITIZED_TESTS=(define dual_write rivals direct bulk_copy place state state_links state_types digest validate cutover swap worker)
VALGRIND_TESTS=(define dual_write direct bulk_copy worker)

# Where this system's own packages come from.
debian_mirror() { echo "${MIGRATE_MIRROR:-$(apt-get indextargets --format '$(SITE)' | grep '/debian/*$' | head -1)}"; }

# The source package's files in $1, by an apt configuration of its own: the system's stays as it is. A mirror may list a version
# whose files it no longer holds: then the one before.
download_source() {
    local apt=$1/apt version suite base
    base=$(debian_mirror)
    mkdir -p "$apt/lists/partial"
    for suite in "$SOURCE_SUITE" "$SOURCE_SUITE-updates"; do echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $base $suite main"; done >"$apt/sources.list"
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $base-security $SOURCE_SUITE-security main" >>"$apt/sources.list"
    printf '%s\n' "Dir::Etc::sourcelist \"$apt/sources.list\";" 'Dir::Etc::sourceparts "-";' "Dir::State::lists \"$apt/lists\";" \
        'APT::Sandbox::User "root";' >"$apt/conf"
    export APT_CONFIG=$apt/conf
    apt-get -qq update || echo "note: not every list of sources could be read"
    for version in $(apt-cache showsrc "$SOURCE_PACKAGE" | sed -n 's/^Version: //p' | sort -Vru); do
        (cd "$1" && apt-get -qq source --download-only "$SOURCE_PACKAGE=$version") && { unset APT_CONFIG; return; }
    done
    unset APT_CONFIG
    echo "error: no version of the source of $SOURCE_PACKAGE can be had"
    return 1
}

# Builds the server once; prints nothing unless it fails.
build_source_server() {
    local home=$cache/source_server archive
    [ -e "$home/built" ] && return
    apt_install make g++ dpkg-dev bzip2 libicu-dev libxml2-dev zlib1g-dev valgrind libipc-run-perl || return
    rm -rf --one-file-system "$home"
    mkdir -p "$home/source" && download_source "$home" || return
    archive=$(ls "$home"/*.orig.tar.*)
    tar -C "$home/source" --strip-components=1 -xf "$archive" || return
    # One assertion is too strict: a subtransaction that is rolled back while the transaction commits (an EXCEPTION block of a deferred
    # trigger, in PL/pgSQL as well as here) is allowed by BeginInternalSubTransaction and trips it at its end.
    sed -i '/^RollbackAndReleaseCurrentSubTransaction/,/^}/s/s->blockState == TBLOCK_STARTED);/s->blockState == TBLOCK_STARTED || s->blockState == TBLOCK_END || s->blockState == TBLOCK_PREPARE);/' \
        "$home/source/src/backend/access/transam/xact.c"
    chown -R "$unprivileged:" "$home"
    (cd "$home/source" && as_user ./configure --prefix="$home/installed" --enable-cassert --enable-debug --enable-tap-tests --with-icu --with-libxml \
        --without-readline CFLAGS='-O1 -g -fno-omit-frame-pointer' CPPFLAGS=-DUSE_VALGRIND &&
        as_user make -s -j2 world-bin && as_user make -s install-world-bin) >"$home/build.log" 2>&1 ||
        { tail -30 "$home/build.log"; echo "error: the build of PostgreSQL failed"; return 1; }
    touch "$home/built"
}

# run_on INSTALLATION test…: test/run with that server.
run_on() {
    local config=$1/bin/pg_config
    shift
    PG_CONFIG=$config bash "$PROJECT/test/run" "$@"
}

on_cassert() { build_source_server && run_on "$cache/source_server/installed"; }

# core_tests FOLDER TARGET: one of the source's own test suites against the server that PGHOST names. Prints its result.
core_tests() {
    local out=$T/log/core.$2
    as_user make -C "$cache/source_server/source/src/test/$1" "$2" NO_LOCALE=1 ENCODING=UTF8 >"$out" 2>&1 || { tail -40 "$out"; echo "error: $1: $2 failed"; return 1; }
    sed -n "s/^ *All \([0-9]* tests passed\).*/$1: all \1/p" "$out"
}

# In a subshell: it makes a private server as test/run does.
on_core() (
    build_source_server || exit
    PG_CONFIG=$cache/source_server/installed/bin/pg_config
    setup || exit
    start_server core "shared_preload_libraries = 'migrate_ext'" 'max_connections = 50' || exit
    core_tests regress installcheck-parallel >"$T/passed" && core_tests isolation installcheck >>"$T/passed" || { cat "$T/passed"; exit 1; }
    paste -sd, "$T/passed"
)

# checked_installation NAME: a copy of the server (hard links) whose `postgres` is started by the script on standard input.
checked_installation() {
    local home=$cache/source_server
    rm -rf --one-file-system "$home/$1"
    as_user cp -al "$home/installed" "$home/$1" && as_user mv "$home/$1/bin/postgres" "$home/$1/bin/postgres.real" &&
        as_user tee "$home/$1/bin/postgres" >/dev/null && as_user chmod 755 "$home/$1/bin/postgres"
}

# under_checker NAME TEST…: those tests on that installation. Every file that the checker writes into $MIGRATE_REPORTS is a failure.
under_checker() {
    local name=$1 reports status
    shift
    reports=$(mktemp -d) && chown "$unprivileged:" "$reports" || return
    MIGRATE_REPORTS=$reports MIGRATE_PATIENCE=3000 run_on "$cache/source_server/$name" "$@"
    status=$?
    find "$reports" -type f -size 0 -delete
    if [ -n "$(ls "$reports")" ]; then
        cat "$reports"/* | head -200
        echo "error: $name has reported $(ls "$reports" | wc -l) processes"
        status=1
    fi
    rm -rf "$reports"
    return $status
}

on_sanitize() {
    build_source_server || return
    checked_installation sanitize <<'SCRIPT' || return
#!/bin/bash
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
# A report ends the process, which ends the test: the server's log has the report.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1
exec "$(dirname "$0")/postgres.real" "$@"
SCRIPT
    EXTRA_CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer' under_checker sanitize "${SANITIZED_TESTS[@]}"
}

on_valgrind() {
    build_source_server && apt_install valgrind || return
    # Making the data folder and asking for a version are no concern of ours.
    checked_installation valgrind <<SCRIPT || return
#!/bin/bash
case " \$* " in *" --boot "* | *" --single "* | *" --check "* | *" -V "* | *" -C "*) exec "\$(dirname "\$0")/postgres.real" "\$@" ;; esac
exec valgrind --quiet --trace-children=yes --leak-check=no --error-markers=VALGRINDERROR-BEGIN,VALGRINDERROR-END --read-var-info=no \\
    --suppressions=$cache/source_server/source/src/tools/valgrind.supp --log-file="\$MIGRATE_REPORTS/%p" "\$(dirname "\$0")/postgres.real" "\$@"
SCRIPT
    under_checker valgrind "${VALGRIND_TESTS[@]}"
}

#!/bin/sh
# libnbd's own test-suite against a server that is not libnbd's: its source from
# the distribution's mirror, built without what the tests do not need, and run
# with stand_in.py in place of nbdkit, qemu-nbd and nbd-server.
#
#   libnbd.sh get FOLDER                 source and build; kept for the next run
#   libnbd.sh run FOLDER TEST… `DIRECTORY/NAME`s; a line each, PASS or FAIL
set -eu

act=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)

get() {
    [ ! -e "$folder/built" ] || return 0
    mkdir -p "$folder"
    sh "$here/source.sh" libnbd "$folder"
    cd "$folder/source"
    # Where the stand-ins are is asked at run time, by PATH.
    mkdir -p "$folder/bin"
    for name in nbdkit qemu-nbd nbd-server; do ln -sf "$here/stand_in.py" "$folder/bin/$name"; done
    export PATH="$folder/bin:$PATH" STAND_IN_SERVER=/bin/false STAND_IN_FOLDER=/tmp
    ./configure --disable-ocaml --disable-python --disable-golang --disable-fuse PYTHON=/usr/bin/python3 \
        QEMU_NBD="$folder/bin/qemu-nbd" NBD_SERVER="$folder/bin/nbd-server" >configure.out 2>&1
    for part in common/utils lib copy info dump; do make -s -C $part >>make.out 2>&1; done
    make -s -C tests pki/stamp-pki >>make.out 2>&1
    touch "$folder/built"
}

run() {
    cd "$folder/source"
    export PATH="$folder/bin:$PATH"
    for test; do
        part=${test%%/*} name=${test#*/}
        case $name in
        aio-parallel* | synch-parallel*) make -s -C "$part" "${name%.sh}" >>make.out 2>&1 ;;
        *.sh) ;;
        *) make -s -C "$part" "$name" >>make.out 2>&1 || { echo "FAIL $test: not built"; continue; } ;;
        esac
        if (cd "$part" && srcdir=. abs_top_builddir="$folder/source" timeout 60 ../run "./$name" >"$name.out" 2>&1); then
            echo "PASS $test"
        else
            echo "FAIL $test: $? $(tail -n 3 "$part/$name.out" | tr '\n' ' ')"
        fi
    done
}

shift 2
case $act in
get) get ;;
run) run "$@" ;;
esac

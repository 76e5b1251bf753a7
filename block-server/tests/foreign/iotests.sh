#!/bin/sh
# QEMU's own block tests (tests/qemu-iotests) on images of the protocol nbd, with
# stand_in.py where they start qemu-nbd. The source comes from the distribution's
# mirror; qemu-img, qemu-io and QEMU are the installed ones, of the same version.
#
#   iotests.sh get FOLDER          the tests' source; kept for the next run
#   iotests.sh run FOLDER TEST…    a line each, PASS or FAIL; SKIP for what does not run here
#
# QEMU_NBD_PROG: a server to be tried instead, for comparison.
set -eu

act=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)

get() {
    [ ! -e "$folder/fetched" ] || return 0
    mkdir -p "$folder/bin"
    sh "$here/source.sh" qemu "$folder" '*/tests/qemu-iotests/*' '*/python/*'
    ln -sf "$here/stand_in.py" "$folder/bin/qemu-nbd"
    touch "$folder/fetched"
}

found() { command -v "$1" || { echo "$1 is not installed" >&2; exit 1; }; }

run() {
    cd "$folder/source/tests/qemu-iotests"
    QEMU_PROG=$(found qemu-system-x86_64) QEMU_IMG_PROG=$(found qemu-img) QEMU_IO_PROG=$(found qemu-io)
    QSD_PROG=$(found qemu-storage-daemon) STAND_IN_QEMU_NBD=$(found qemu-nbd)
    QEMU_NBD_PROG=${QEMU_NBD_PROG:-$folder/bin/qemu-nbd}
    # Paths of sockets are short.
    scratch=$(mktemp -d) && mkdir "$scratch/dir" "$scratch/sock"
    TEST_DIR=$scratch/dir SOCK_DIR=$scratch/sock
    export QEMU_PROG QEMU_IMG_PROG QEMU_IO_PROG QSD_PROG STAND_IN_QEMU_NBD QEMU_NBD_PROG TEST_DIR SOCK_DIR
    timeout 1800 ./check -tap -raw -nbd "$@" >"$scratch/told" 2>&1 || true
    sed -n -e 's/^ok raw \([^ ]*\) # SKIP \(.*\)/SKIP \1: \2/p' -e 's/^ok raw \([^ ]*\).*/PASS \1/p' \
        -e 's/^not ok raw \([^ ]*\).*/FAIL \1/p' "$scratch/told"
    grep -v -e '^ok ' -e '^1\.\.' -e '^# ' "$scratch/told" >&2 || true
    rm -rf "$scratch"
}

shift 2
case $act in
get) get ;;
run) run "$@" ;;
esac

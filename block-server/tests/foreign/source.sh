#!/bin/sh
# source.sh PACKAGE FOLDER [PATTERN…]: a package's upstream source of this distribution,
# or those of its files, unpacked into FOLDER/source. Lists and cache are its own: the machine's apt
# sources are not touched, and need no deb-src line.
set -eu

package=$1 folder=$2
shift 2
. /etc/os-release
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/source"
cd "$folder/apt"
mirror=http://deb.debian.org/debian
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ "$ID" = debian ] || { echo "this is $ID: the source is looked for at Debian's mirror only"; exit 1; }
for suite in $VERSION_CODENAME "$VERSION_CODENAME-updates"; do
    echo "deb-src [signed-by=$key] $mirror $suite main"
done >sources.list
apt() {
    apt-get -qq -o Dir::Etc::SourceList="$PWD/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User=root \
        -o Acquire::Retries=2 -o Acquire::http::Timeout=30 "$@"
}
apt update
apt source --download-only "$package" || { echo "$package: its source is not to be had from $mirror"; exit 1; }
tar xf "$(ls ./*.orig.tar.* | grep -v '\.asc$' | head -n 1)" -C "$folder/source" \
    --strip-components=1 --wildcards "$@"
rm -rf lists cache

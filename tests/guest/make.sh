#!/bin/sh
# make.sh FOLDER INIT "PROGRAM…" "MODULE…": puts `vmlinuz` and `initrd` there, of the
# distribution's own kernel, with busybox, those programs and those modules, and INIT
# as its first process. The kernel's package is fetched once.
set -eu
init=$(realpath "$2")
programs=$3
modules=$4
mkdir -p "$1"
cd "$1"
PATH=/usr/sbin:/sbin:$PATH

image=$(LC_ALL=C apt-cache depends --no-recommends --no-suggests linux-image-cloud-amd64 |
    sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
[ -n "$image" ] || { echo "apt knows no linux-image-cloud-amd64"; exit 1; }
if [ ! -d "kernel-$image" ]; then
    rm -rf fetch && mkdir fetch
    (cd fetch && apt-get -qq -o APT::Sandbox::User=root download "$image" && dpkg-deb -x ./*.deb tree)
    mv fetch/tree "kernel-$image"
    rm -rf fetch
fi
version=${image#linux-image-}
cp "kernel-$image/boot/vmlinuz-$version" vmlinuz
depmod -b "kernel-$image" "$version"

rm -rf root && mkdir -p root/bin root/sbin root/modules
cp "$(command -v busybox)" root/bin/busybox
for program in $programs; do
    path=$(command -v $program) || { echo "$program is not installed"; exit 1; }
    cp -L "$path" root/sbin/
    for library in $(ldd "$path" | grep -o '/[^ ]*\.so[^ ]*'); do
        mkdir -p "root$(dirname "$library")"
        cp -L "$library" "root$library"
    done
done
for module in $modules; do
    modprobe -d "$PWD/kernel-$image" -S "$version" --show-depends "$module" || echo "builtin $module"
done | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }' > modules
: > root/modules/order
while read -r path; do
    name=$(basename "$path"); name=${name%.xz}
    case $path in
    *.xz) xz -dc "$path" > "root/modules/$name" ;;
    *) cp "$path" "root/modules/$name" ;;
    esac
    echo "$name" >> root/modules/order
done < modules
cp "$init" root/init
chmod 755 root/init
(cd root && find . | cpio --quiet -o -H newc) > initrd

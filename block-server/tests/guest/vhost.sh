#!/bin/busybox sh
# The guest of vhost_guest.rs: takes a disk that is plugged in, works on it until it is
# told to stop while its server is killed and replaced, and gives it back.
/bin/busybox mkdir -p /proc /sys /dev /t /mnt
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done < /modules/order
mount -t tmpfs t /t
echo "GUEST booted"
until [ -b /dev/vda ]; do sleep 0.1; done
echo "GUEST disk $(cat /sys/block/vda/serial) $(cat /sys/block/vda/size) ro=$(cat /sys/block/vda/ro)"

# What is written past every cache is read back past every cache, and is the same.
work() {
    n=0
    until [ -e /t/stop ] || [ -e /t/failed ]; do
        dd if=/dev/urandom of="/t/$1" bs=64k count="$2" 2>/dev/null
        a=$(sha256sum < "/t/$1")
        dd if="/t/$1" of="/mnt/$1" bs="$3" oflag=direct conv=fsync 2>"/t/e$1" ||
            { cat "/t/e$1"; touch /t/failed; }
        b=$(dd if="/mnt/$1" bs=32k iflag=direct 2>/dev/null | sha256sum)
        [ "$a" = "$b" ] || { echo "GUEST found $b for $a"; touch /t/failed; }
        n=$((n + 1))
        echo "GUEST went round"
        [ ! -e /t/failed ] || echo "GUEST failed"
    done
}

read_only() {
    a=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)
    blockdev --setrw /dev/vda
    dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null && echo "GUEST failed: wrote"
    mke2fs /dev/vda > /dev/null 2>&1 && echo "GUEST failed: made a file system"
    b=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)
    [ "$a" = "$b" ] && echo "GUEST read ${a%% *} and could not write"
}

if [ "$(cat /sys/block/vda/ro)" = 1 ]; then
    read_only
else
    mke2fs -b 4096 /dev/vda > /dev/null && mount -t ext4 /dev/vda /mnt || echo "GUEST failed: mount"
    work 1 32 64k & work 2 32 64k & work 3 1 4k &
    read -r word
    touch /t/stop
    wait
    umount /mnt
    mount -t ext4 /dev/vda /mnt
    for i in 1 2 3; do cmp "/t/$i" "/mnt/$i" || touch /t/failed; done
    umount /mnt
    dmesg | grep -i 'i/o error\|vda.*error' && touch /t/failed
    [ -e /t/failed ] && echo "GUEST failed" || echo "GUEST found all again"
fi
while [ -b /dev/vda ]; do sleep 0.1; done
echo "GUEST gave the disk back"
poweroff -f

#!/bin/busybox sh
# The guest of vhost_guest.rs: takes a disk that is plugged in, works on it while
# the server is killed, and gives it back.
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for n in 1 2 3 4; do for m in /modules/*.ko; do insmod $m 2>/dev/null; done; done
mkdir /t /mnt; mount -t tmpfs t /t
echo "GUEST booted"
until [ -b /dev/vda ]; do sleep 0.1; done
echo "GUEST disk $(cat /sys/block/vda/serial) $(cat /sys/block/vda/size)"
mke2fs -b 4096 /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt || echo "GUEST cannot mount"
work() {
    n=0
    while [ $n -lt 5 ] && [ ! -e /t/failed ]; do
        dd if=/dev/urandom of=/t/$1 bs=64k count=32 2>/dev/null
        a=$(sha256sum </t/$1)
        dd if=/t/$1 of=/mnt/$1 bs=64k oflag=direct conv=fsync 2>/t/e$1 || { cat /t/e$1; touch /t/failed; }
        b=$(dd if=/mnt/$1 bs=32k iflag=direct 2>/dev/null | sha256sum)
        [ "$a" = "$b" ] || { echo "GUEST found $b for $a"; touch /t/failed; }
        n=$((n + 1))
    done
}
for i in 1 2 3; do work $i & done
wait
umount /mnt
mount -t ext4 /dev/vda /mnt
for i in 1 2 3; do cmp /t/$i /mnt/$i || touch /t/failed; done
umount /mnt
dmesg | grep -i 'i/o error\|vda.*error' && touch /t/failed
[ -e /t/failed ] && echo "GUEST failed" || echo "GUEST found all again"
while [ -b /dev/vda ]; do sleep 0.1; done
echo "GUEST gave the disk back"
poweroff -f

#!/bin/busybox sh
# First and only process of a guest that uses the kernel's own NBD client: a file
# system is made, filled, checked and mounted again over it. The last line tells.
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /run
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done < /modules/order
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up

fail() { echo "guest: FAILED: $*"; poweroff -f; }

fill() {
    dd if=/dev/urandom of=/mnt/random bs=1M count=20 2>/dev/null || fail "write"
    mkdir /mnt/tree || fail "mkdir"
    n=0
    while [ $n -lt 200 ]; do echo "file $n" > "/mnt/tree/$n" || fail "file $n"; n=$((n + 1)); done
    rm /mnt/tree/1?? || fail "remove"
    dd if=/dev/urandom of=/mnt/direct bs=4k count=256 oflag=direct 2>/dev/null || fail "direct write"
    dd if=/dev/urandom of=/mnt/random bs=4k count=64 seek=100 conv=notrunc,fsync 2>/dev/null || fail "fsync"
    (cd /mnt && find . -type f | sort | xargs sha256sum) > /tmp/sums
}

port=$(sed 's/.*port=\([0-9]*\).*/\1/' /proc/cmdline)
/sbin/nbd-client 10.0.2.2 "$port" /dev/nbd0 -N disk -C 2 ||
    fail "nbd-client"
echo "guest: connected: $(cat /sys/block/nbd0/size) sectors, $(cat /sys/block/nbd0/queue/write_cache)"
/sbin/mke2fs -q -t ext4 -E nodiscard /dev/nbd0 || fail "mke2fs"
mount -t ext4 /dev/nbd0 /mnt || fail "mount"
fill
umount /mnt || fail "umount"
/sbin/e2fsck -f -n /dev/nbd0 > /tmp/fsck || { cat /tmp/fsck; fail "fsck"; }
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 /dev/nbd0 /mnt || fail "mount again"
(cd /mnt && sha256sum -c -s /tmp/sums) || fail "what was written differs"
rm /mnt/direct && sync
fstrim -v /mnt || fail "fstrim"
sed -i '/direct/d' /tmp/sums
umount /mnt || fail "umount"
/sbin/nbd-client -d /dev/nbd0 || fail "disconnect"

# And again through a connection of its own, past every cache.
/sbin/nbd-client 10.0.2.2 "$port" /dev/nbd0 -N disk || fail "nbd-client again"
mount -t ext4 -o ro /dev/nbd0 /mnt || fail "mount a third time"
(cd /mnt && sha256sum -c -s /tmp/sums) || fail "what was written differs after a reconnect"
umount /mnt && /sbin/nbd-client -d /dev/nbd0
echo "guest: $(wc -l < /tmp/sums) files HELD"
poweroff -f

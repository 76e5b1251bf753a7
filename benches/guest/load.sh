#!/bin/busybox sh
# First process of the guest of `block --rows guest`: whose disks are loaded as the
# console tells.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done < /modules/order
for disk in /sys/block/vd*; do echo none > "$disk/queue/scheduler"; done
stty -echo < /dev/console
exec guest-load

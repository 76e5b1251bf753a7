#!/bin/busybox sh
# First process of the tiny image: loads what the root disk needs, finds the
# disk by the serial that the command line names, and hands over to it.
bb=/bin/busybox
$bb mkdir -p /proc /sys /dev /root
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb echo "hostplane: initrd up after $($bb cut -d' ' -f1 /proc/uptime) s"
while read -r module; do
    $bb insmod "/lib/modules/$module" || $bb echo "hostplane: cannot load $module"
done < /lib/modules/order

serial=
for word in $($bb cat /proc/cmdline); do
    case $word in
    hostplane.root=*) serial=${word#*=} ;;
    esac
done
root=
tries=0
while [ -z "$root" ] && [ $tries -lt 200 ]; do
    for disk in /sys/block/vd*; do
        [ -e "$disk" ] || continue
        [ -z "$serial" ] || [ "$($bb cat "$disk/serial" 2>/dev/null)" = "$serial" ] || continue
        root=/dev/${disk##*/}
        break
    done
    [ -n "$root" ] || $bb usleep 50000
    tries=$((tries + 1))
done
if [ -z "$root" ]; then
    $bb echo "hostplane: no root disk with serial '$serial' within 10 s"
    $bb poweroff -f
fi
$bb mount -t ext4 "$root" /root || { $bb echo "hostplane: cannot mount $root"; $bb poweroff -f; }
$bb echo "$root" > /dev/.hostplane-root
for place in dev proc sys; do
    $bb mount --move /$place /root/$place
done
exec $bb switch_root /root /sbin/init

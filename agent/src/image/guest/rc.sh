#!/bin/sh
# Run once by init: file systems, host key, network, then what the metadata
# service has to say.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /dev/shm /run /tmp /root/.ssh /etc/dropbear
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
chmod 700 /root /root/.ssh
hostname "$(cat /etc/hostname)"
ip link set lo up
echo "hostplane: init up after $(cut -d' ' -f1 /proc/uptime) s"
key=/etc/dropbear/dropbear_ed25519_host_key
[ -s $key ] || dropbearkey -t ed25519 -f $key > /dev/null 2>&1
echo "hostplane: host key $(dropbearkey -y -f $key | grep Fingerprint)"
(
    for device in /sys/class/net/eth*; do
        [ -e "$device" ] || continue
        name=${device##*/}
        ip link set "$name" up
        udhcpc -i "$name" -s /etc/udhcpc.script -O staticroutes -O mtu -t 20 -T 1 -A 3 -b -S > /dev/null 2>&1
    done
    /etc/metadata
    # The volume may be larger than the image that it began as.
    root=$(cat /dev/.hostplane-root)
    resize2fs "$root" > /dev/null 2>&1
    echo "hostplane: ready after $(cut -d' ' -f1 /proc/uptime) s"
) &

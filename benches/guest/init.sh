#!/bin/busybox sh
# First and only process of a guest that carries bytes: all that comes to port 5000 is
# thrown away, and who connects to port 5001 gets zeros for as long as it likes.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done < /modules/order
word() { sed "s/.*$1=\([^ ]*\).*/\1/" /proc/cmdline; }
ip link set lo up
ip addr add "$(word address)/24" dev eth0
ip link set eth0 up
arp -s "$(word router)" "$(word router_mac)"
ip route add default via "$(word router)"
while :; do nc -l -p 5000 > /dev/null; done &
echo "guest: ready"
while :; do nc -l -p 5001 < /dev/zero; done

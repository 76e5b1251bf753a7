#!/bin/sh
# Asks the metadata service (version 2) for the key, the name and the user's
# data. `nc` asks, because the `wget --header` of busybox 1.35 crashes.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ask() { # method, path, header
    printf '%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\n%s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" "$3" |
        timeout 10 nc -w 3 169.254.169.254 80 > "/run/answer.$$" 2> /dev/null
    head -n 1 "/run/answer.$$" | grep -q ' 200 ' || return 1
    sed '1,/^\r*$/d' "/run/answer.$$"
}
get() {
    ask GET "/latest/$1" "X-aws-ec2-metadata-token: $token"
}
token=
tries=0
while [ -z "$token" ] && [ $tries -lt 30 ]; do
    token=$(ask PUT /latest/api/token 'X-aws-ec2-metadata-token-ttl-seconds: 21600')
    [ -n "$token" ] || sleep 1
    tries=$((tries + 1))
done
if [ -z "$token" ]; then
    echo 'hostplane: no answer from the metadata service'
    exit 0
fi
name=$(get meta-data/local-hostname) && [ -n "$name" ] && {
    echo "$name" > /etc/hostname
    hostname "$name"
}
get meta-data/public-keys/0/openssh-key > /run/key && [ -s /run/key ] && {
    umask 077
    cp /run/key /root/.ssh/authorized_keys
    umask 022
}
id=$(get meta-data/instance-id)
echo "hostplane: instance $id, host name $(hostname)"
# A script in the user's data runs once for each instance.
if [ "$(cat /etc/instance-id 2> /dev/null)" != "$id" ]; then
    echo "$id" > /etc/instance-id
    get user-data > /run/user-data 2> /dev/null
    if [ "$(head -c 2 /run/user-data)" = '#!' ]; then
        chmod 700 /run/user-data
        /run/user-data
        echo "hostplane: user data ended with status $?"
    fi
fi
rm -f /run/answer.*

#!/bin/busybox sh
# The first and only process of the guest's own making: devices, addresses, programs. What it does beyond the counter is
# asked for on the kernel's command line, as ckptd.KEY=VALUE; __init__.py has the list.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sys /sys
ip=10.0.2.15/24 gateway=10.0.2.2 dirty= patterns=0 spin= say= shell=
addresses=
read -r words </proc/cmdline
for word in $words; do
    value=${word#*=}
    case $word in
        ckptd.ip=*) ip=$value ;;
        ckptd.ip[1-9]=*) number=${word#ckptd.ip}; addresses="$addresses ${number%%=*} $value" ;;
        ckptd.gateway=*) gateway=$value ;;
        ckptd.dirty=*) dirty=$value ;;
        ckptd.patterns=*) patterns=$value ;;
        ckptd.spin=*) spin=$value ;;
        ckptd.say=*) say=$value ;;
        ckptd.shell=*) shell=$value ;;
    esac
done

while read -r module; do insmod "/modules/$module"; done </modules/order

address() {  # NUMBER ADDRESS: of one card; a card that is not there is said, and nothing else
    if [ -d "/sys/class/net/eth$1" ]; then
        ip addr add "$2" dev "eth$1"
        ip link set "eth$1" up
    else
        echo "no network card eth$1"
    fi
}
ip link set lo up
address 0 "$ip"
[ "$gateway" = none ] || [ ! -d /sys/class/net/eth0 ] || ip route add default via "$gateway"
# shellcheck disable=SC2086
set -- $addresses
while [ $# -gt 0 ]; do
    address "$1" "$2"
    shift 2
done

# Each of the servers comes back when it can be connected to.
counter
rate=${patterns#*,}
[ "$rate" != "$patterns" ] || rate=10000
patterns "${patterns%,*}" "$rate"
[ "$spin" != 1 ] || spin
[ -z "$dirty" ] || dirty "${dirty%,*}" "${dirty#*,}" &
echo READY
[ -z "$say" ] || say "$say" &
while :; do
    if [ "$shell" = 1 ]; then setsid cttyhack sh; else wait; sleep 3600; fi
done

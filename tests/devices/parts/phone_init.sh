# The first process of the phone's namespaces: makes its file system, and ends when its input does.
set -eu
root=$1 adbd=$2 torch=$3 qemu=$4 space=$5
read -r ids_are_mapped
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
for device in null zero urandom; do mount --bind "/dev/$device" "dev/$device"; done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount --rbind /sys sys # without which ExecuTorch finds no processor
mount --bind "$adbd" opt/adbd
[ -z "$torch" ] || mount --bind "$torch" opt/torch
mount -t tmpfs -o "size=$space,mode=0755" tmpfs data
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p data/local/tmp data/misc/adb
chown 2000:2000 data/local/tmp
mount -o remount,bind,ro "$root"
mount -t binfmt_misc binfmt_misc proc/sys/fs/binfmt_misc
# What the beginning of a file is compared with: a 64-bit little-endian ELF for aarch64.
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf '%s' ":aarch64:M::$magic:$mask:$qemu:PF" >proc/sys/fs/binfmt_misc/register
echo up
# A shell that reads, rather than a process that sleeps, since it also takes leave of orphans.
while read -r _; do :; done

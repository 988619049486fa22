#!/bin/sh
# apt-install.sh PACKAGE...: installs what is missing, where that can be done; else says what is.
# Never fails: the tests that need a package that is not there skip, with that reason.
set -u

missing=
for package in "$@"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null |
        grep -qx installed || missing="$missing $package"
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Some tests will be skipped; for them: apt-get install$missing" >&2
    exit 0
fi

# A package may start its server once it is installed; here none does.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
install() {
    # shellcheck disable=SC2086 - the names of packages, apart
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 $missing >/dev/null 2>&1
}
echo "Installing$missing" >&2
install || { apt-get update --quiet=2 >/dev/null 2>&1; install; } ||
    echo "apt-get install$missing failed; some tests will be skipped" >&2
exit 0

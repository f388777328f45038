# Sourced by scripts that install Debian's packages. Installs those of the array $packages that are missing, and exits:
# at once if there are none.

fail() {
  printf 'ci: %s\n' "$*" >&2
  exit 1
}

command -v apt-get >/dev/null || fail "this is not Debian: install what it calls ${packages[*]}"
missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
    missing+=("$package")
done
((${#missing[@]})) || exit 0
root=(env)
if ((EUID)); then
  command -v sudo >/dev/null || fail "only root can run: apt-get install ${missing[*]}"
  root=(sudo env)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@"; }
install() { apt install --yes --no-install-recommends "${missing[@]}"; }

printf 'ci: installing %s\n' "${missing[*]}" >&2
# The lists of packages may be old or missing. They are fetched if the first attempt fails.
{ install || { apt update && install; }; } >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  fail "could not install ${missing[*]}"
}

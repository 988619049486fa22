"""Debian's packages without installing them: other releases, other machines, and sources.

apt with a state of its own in a folder: nothing of the system's apt is read but the address that it
gets packages from, and nothing is changed.
"""

import os
import subprocess
from pathlib import Path

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Debian:
    """One release for one machine, fetched into a folder."""

    def __init__(self, folder: Path, release: str, machine: str) -> None:
        self.folder = folder
        for name in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        (folder / "status").touch()
        line = f"[signed-by={KEYS}] {mirror()} {release} main\n"
        (folder / "etc/sources.list").write_text(f"deb {line}deb-src {line}")
        (folder / "apt.conf").write_text(
            f"""\
APT::Architecture "{machine}";
APT::Architectures {{ "{machine}"; }};
APT::Sandbox::User "";
Acquire::Languages "none";
Dir::Etc "{folder}/etc";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
"""
        )
        self._run("apt-get", "update", "--quiet=2")

    def unpack(self, packages: list[str], into: Path) -> None:
        """Puts the files of exactly these packages into a folder; their scripts do not run."""
        self._run("apt-get", "download", "--quiet=2", *packages)
        archives = list(self.folder.glob("*.deb"))
        if len(archives) != len(packages):
            raise RuntimeError(f"got {len(archives)} archives for {packages}")
        into.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            self._run("dpkg-deb", "--extract", str(archive), str(into))
            archive.unlink()

    def source(self, package: str, into: Path) -> None:
        """Unpacks a source package, with Debian's patches applied."""
        self._run("apt-get", "source", "--quiet=2", "--download-only", package)
        (description,) = self.folder.glob("*.dsc")
        self._run("dpkg-source", "--extract", str(description), str(into))

    def original(self, package: str, member: str, into: Path) -> None:
        """Takes one file out of a source package as its authors published it."""
        self._run("apt-get", "source", "--quiet=2", "--download-only", "--tar-only", package)
        (archive,) = self.folder.glob("*.orig.tar.*")
        strip = f"--strip-components={1 + member.count('/')}"
        self._run(
            "tar",
            "--extract",
            f"--file={archive}",
            f"--directory={into}",
            strip,
            "--wildcards",
            f"*/{member}",
        )

    def _run(self, *command: str) -> None:
        ran = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | {"APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-2000:]}")


def mirror() -> str:
    """Where this system gets Debian's packages from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        label, _, address = line.partition(" ")
        if label == "Debian":
            return address
    raise RuntimeError("apt-get indextargets names no mirror of Debian")

"""What installing torchfuse installs, and how large it is, from the environment that runs this.

The base package by its largest parts, and then what each extra adds to it.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

SHOWN = 6


def needed(name: str, *extras: str) -> dict[str, Distribution]:
    """Return the package `name` with these extras, and all that it requires."""
    waiting, seen = [(name, frozenset(extras))], set()
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        for text in distribution(package).requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *wanted)):
                waiting.append((requirement.name.lower(), frozenset(requirement.extras)))
    return {package: distribution(package) for package, _ in seen}


def size_bytes(package: Distribution) -> int:
    """Return the size of the files of an installed package."""
    files = (package.locate_file(file) for file in package.files or ())
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Print the largest packages, the sum of all, and the sums with extras."""
    sizes = {n: (p.version, size_bytes(p)) for n, p in needed("torchfuse").items()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1][1])
    for name, (version, size) in ordered[:SHOWN]:
        print(f"{name:14} {version:12} {size / 1e6:6.0f} MB")
    rest = sum(size for _, (_, size) in ordered[SHOWN:])
    print(f"{f'and {len(ordered) - SHOWN} more':27} {rest / 1e6:6.0f} MB")
    print(f"{'together':27} {sum(size for _, size in sizes.values()) / 1e6:6.0f} MB")
    for extra in ("executorch", "onnx", "openvino", "all"):
        line = f"with [{extra}]"
        try:
            packages = needed("torchfuse", extra)
        except PackageNotFoundError as error:
            print(f"{line:27} {error} is not installed here")
            continue
        print(f"{line:27} {sum(map(size_bytes, packages.values())) / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()

"""What installing torchfuse installs, and how large it is, from the environment that runs this."""

from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement

SHOWN = 6


def needed(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Return the package `name` and all that it requires without extras."""
    if name not in found:
        found[name] = distribution(name)
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name.lower(), found)
    return found


def size_bytes(package: Distribution) -> int:
    """Return the size of the files of an installed package."""
    files = (package.locate_file(file) for file in package.files or ())
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Print the largest packages, and the sum of all."""
    sizes = {name: (p.version, size_bytes(p)) for name, p in needed("torchfuse", {}).items()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1][1])
    for name, (version, size) in ordered[:SHOWN]:
        print(f"{name:14} {version:12} {size / 1e6:6.0f} MB")
    rest = sum(size for _, (_, size) in ordered[SHOWN:])
    print(f"{f'and {len(ordered) - SHOWN} more':27} {rest / 1e6:6.0f} MB")
    print(f"{'together':27} {sum(size for _, size in sizes.values()) / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()

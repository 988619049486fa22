"""What is installed beside this script's interpreter, and how large it is."""

from importlib.metadata import Distribution, distributions

SHOWN = 6


def size_bytes(distribution: Distribution) -> int:
    """Return the size of the files of an installed package."""
    files = (distribution.locate_file(file) for file in distribution.files or ())
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Print the largest packages, and the sum of all."""
    sizes = {d.name: (d.version, size_bytes(d)) for d in distributions()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1][1])
    for name, (version, size) in ordered[:SHOWN]:
        print(f"{name:14} {version:12} {size / 1e6:6.0f} MB")
    rest = sum(size for _, (_, size) in ordered[SHOWN:])
    print(f"{f'and {len(ordered) - SHOWN} more':27} {rest / 1e6:6.0f} MB")
    print(f"{'together':27} {sum(size for _, size in sizes.values()) / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()

"""What was measured of the models as text: times, ratios, and what XNNPACK left."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchfuse.stats import Ratio, percentile, ratio_of_medians

__all__ = [
    "OURS",
    "PLAIN",
    "SUFFIXES",
    "block",
    "counting_peers",
    "delegation_table",
    "export_table",
    "fastest_table",
]

Row = Mapping[str, Any]  # of one model in one precision, as it lies in the JSON

SUFFIXES = (".pte", ".onnx", ".xml", ".aoti.pt2")
OURS, PLAIN = "torchfuse ", "plain "
_PYTORCH = ("eager", "torch.compile")
_AS_GOOD_DB, _AS_GOOD_POINTS = 1.0, 1.0  # an int8 file that is worse by more does not count


def block(row: Row) -> Iterator[str]:
    """Yield the lines on one model in one precision, the fastest file first."""
    clock = "CPU time" if row["clock"] == "cpu" else "wall time"
    yield f"{row['model']}, {row['precision']} ({clock}, {row['cpu']}, threads: 1)"
    for key, found in sorted(row["files"].items(), key=lambda item: _median_s(item[1])):
        if "error" in found:
            yield f"  {key:19} {found['error']}"
            continue
        quality = f"{_decibels(found):6.1f} dB"
        if found["agreement"] is not None:
            quality += f" {100 * found['agreement']:6.1f} % of classes"
        made = "" if found["made_s"] is None else f"  made in {found['made_s']:6.1f} s"
        yield f"  {key:19} {_median_s(found) * 1e3:9.2f} ms {quality}{made}"
    pair = _fastest(row)
    if pair is not None:
        ours, peer = pair
        yield f"  {ours} / {peer}: {_shown(_ratio(row, ours, peer))}"
    for suffix in SUFFIXES:
        if (ratio := _of_own_runtime(row, suffix)) is not None:
            yield f"  {OURS}{suffix} / {PLAIN}{suffix}: {_shown(ratio)}"


def fastest_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each model and precision: our fastest file against the fastest plain one.

    Then ours against the plain one of each runtime, and the times of PyTorch itself, in fp32.
    """
    head = f"{'':22} {'':5} {'fastest of ours':>24} {'fastest plain':>24}  {'ratio':18}"
    head += "".join(f"{suffix:>10}" for suffix in SUFFIXES)
    yield head + "".join(f"{name:>15}" for name in _PYTORCH)
    ratios = []
    for row in rows:
        pair = _fastest(row)
        if pair is None:
            continue
        ours, peer = pair
        ratio = _ratio(row, ours, peer)
        ratios.append(ratio.value)
        named = [
            f"{name.split()[-1]} {_median_s(row['files'][name]) * 1e3:8.2f} ms" for name in pair
        ]
        own = [_of_own_runtime(row, suffix) for suffix in SUFFIXES]
        shown = "".join(f"{'-' if each is None else f'{each.value:.2f}':>10}" for each in own)
        for name in _PYTORCH:
            seconds = _median_s(row["files"].get(name, {}))
            shown += f"{f'{seconds * 1e3:.2f} ms' if seconds < math.inf else '-':>15}"
        yield (
            f"{row['model']:22} {row['precision']:5} {named[0]:>24} {named[1]:>24}  "
            f"{_shown(ratio):18}{shown}"
        )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        yield f"geometric mean of the ratios: {mean:.3f}"


def delegation_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what XNNPACK takes of each `.pte` of ours, and each call that it leaves."""
    yield (
        f"{'':22} {'':5} {'MACs':>7} {'values':>7} {'pieces':>6} {'float between int8':>19}  left"
    )
    for row in rows:
        found = row["files"].get(f"{OURS}.pte", {})
        taken = found.get("delegation")
        if taken is None:
            if "error" in found:
                yield f"{row['model']:22} {row['precision']:5} {found['error']:.100}"
            continue
        left = ", ".join(f"{count}× {name}" for name, count in taken["left"].items()) or "nothing"
        plain = row["files"].get(f"{PLAIN}.pte", {})
        macs = "-" if taken["macs_share"] is None else f"{taken['macs_share']:.1%}"
        yield (
            f"{row['model']:22} {row['precision']:5} {macs:>7} {taken['values_share']:>7.1%} "
            f"{taken['pieces']:>6} {taken['conversions']:>19}  {left}"
            f"{'' if 'error' not in plain else '  (no plain file)'}"
        )


def export_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how long making each file took, ours and the plain one, in CPU time, and the ratio."""
    yield f"{'making the file, CPU s':22} {'':5}" + "".join(f"{suffix:>22}" for suffix in SUFFIXES)
    for row in rows:
        cells = [_making(row, suffix) for suffix in SUFFIXES]
        yield f"{row['model']:22} {row['precision']:5}" + "".join(f"{cell:>22}" for cell in cells)


def _making(row: Row, suffix: str) -> str:
    pair = [row["files"].get(f"{whose}{suffix}", {}).get("made_s") for whose in (OURS, PLAIN)]
    if None in pair:
        return "-"
    ours, plain = pair
    return f"{ours:.1f} / {plain:.1f} = {ours / plain:.2f}"


def counting_peers(row: Row, ours: str) -> list[str]:
    """Return the plain files that count beside one of ours: in int8, those about as accurate."""
    files = row["files"]
    peers = [key for key, found in files.items() if key.startswith(PLAIN) and "error" not in found]
    if row["precision"] != "int8":
        return peers
    return [key for key in peers if _as_good(files[key], files[ours])]


def _as_good(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    if _decibels(peer) < _decibels(ours) - _AS_GOOD_DB:
        return False
    if peer["agreement"] is None:
        return True
    return bool(100 * (ours["agreement"] - peer["agreement"]) <= _AS_GOOD_POINTS)


def _decibels(found: Mapping[str, Any]) -> float:
    return math.inf if found["sqnr_db"] is None else float(found["sqnr_db"])


def _fastest(row: Row) -> tuple[str, str] | None:
    """Return the names of our fastest file and of the fastest plain one that counts beside it."""
    files = row["files"]
    ours = [key for key, found in files.items() if key.startswith(OURS) and "error" not in found]
    if not ours:
        return None
    fastest = min(ours, key=lambda key: _median_s(files[key]))
    peers = counting_peers(row, fastest)
    if not peers:
        return None
    return fastest, min(peers, key=lambda key: _median_s(files[key]))


def _of_own_runtime(row: Row, suffix: str) -> Ratio | None:
    names = (f"{OURS}{suffix}", f"{PLAIN}{suffix}")
    if any("error" in row["files"].get(name, {"error": ""}) for name in names):
        return None
    return _ratio(row, *names)


def _ratio(row: Row, above: str, below: str) -> Ratio:
    files = row["files"]
    return ratio_of_medians(
        files[above]["samples_s"], files[below]["samples_s"], round_runs=row["turn_runs"]
    )


def _shown(ratio: Ratio) -> str:
    interval = "" if ratio.low is None else f" ({ratio.low:.2f} … {ratio.high:.2f})"
    return f"{ratio.value:.2f}{interval}"


def _median_s(found: Mapping[str, Any]) -> float:
    return percentile(found["samples_s"], 50) if "samples_s" in found else math.inf

"""A roofline picture (Williams, Waterman & Patterson 2009) of what was measured, with plotly."""

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssah_fast.bench.clock import Clock
from ssah_fast.bench.harness import COPY, DTYPES, PEAKS, READ, Row
from ssah_fast.errors import SsahError

ROUNDS = 5
MOST_SLOWER = 1e-5  # of the highest roof: where the picture ends below


def require() -> None:
    """Look for plotly.

    Raises:
        SsahError: It is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise SsahError("--plot needs plotly, which is not installed; pip install 'ssah_fast[report]'")


def product_rates(clock: Clock) -> dict[str, float]:
    """Measure the FLOP/s of matrix products in bf16 and fp32."""
    rates = {}
    for name in ("bf16", "fp32"):
        call, flops = clock.product(DTYPES[name])
        clock.seconds(call)
        rates[name] = flops / float(np.median([clock.seconds(call) for _ in range(ROUNDS)]))
    return rates


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, str]]]:
    """Return for every op and backend its points: FLOP per byte, FLOP/s, and what the case was."""
    found = defaultdict(list)
    for row in rows:
        if row.backend not in PEAKS and row.unit == "ms" and row.bytes and row.flops:
            label = f"{row.dtype} {row.shape} {row.setting}: {row.median:.4g} ms"
            found[f"{row.op} {row.backend}"].append((row.flops / row.bytes, 1e3 * row.flops / row.median, label))
    return dict(found)


def bandwidth(rows: Sequence[Row], peak: str) -> float | None:
    """Return the median bandwidth of a peak over all cases, in bytes per second."""
    rates = [1e9 * row.gb_per_s for row in rows if row.backend == peak and row.gb_per_s]
    return float(np.median(rates)) if rates else None


def draw(rows: Sequence[Row], rates: dict[str, float], title: str, path: Path) -> None:
    """Write the picture as one HTML file that needs no network.

    Args:
        rows: What was measured, with the rows of stream_read and stream_copy.
        rates: FLOP/s of matrix products by dtype: the flat roofs.
        title: Of the picture.
        path: The file.
    """
    from plotly import graph_objects

    series = points(rows)
    intensities = [x for values in series.values() for x, _, _ in values] or [1.0]
    ends = np.array([min(intensities) / 4, 4 * max(*intensities, 256.0)])
    figure = graph_objects.Figure()
    highest = max(rates.values())
    for peak in (READ, COPY):
        slope = bandwidth(rows, peak)
        if slope is not None:
            x = np.array([ends[0], highest / slope])
            label = f"{peak}: {slope / 1e9:,.0f} GB/s"
            figure.add_scatter(x=x, y=slope * x, mode="lines", name=label, line={"dash": "dash"})
    for dtype, rate in rates.items():
        label = f"matmul {dtype}: {rate / 1e12:,.3g} TFLOP/s"
        figure.add_scatter(x=ends, y=[rate, rate], mode="lines", name=label, line={"dash": "dot"})
    for name, values in series.items():
        xs, ys, labels = zip(*values, strict=True)
        figure.add_scatter(x=xs, y=ys, mode="markers", name=name, text=labels, marker={"size": 10})
    figure.update_layout(title=title, template="plotly_white")
    figure.update_xaxes(type="log", title="FLOP per byte that must be moved")
    figure.update_yaxes(type="log", title="FLOP/s", range=[np.log10(MOST_SLOWER * highest), np.log10(2 * highest)])
    figure.write_html(path, include_plotlyjs=True)

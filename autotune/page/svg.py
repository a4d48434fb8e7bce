"""Small charts without a plotting library: axes and marks as SVG, grids of values as PNG inside it."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

# Of colours that colour-blind people tell apart (Okabe and Ito), those that are dark enough for lines on white.
INK, BLUE, ORANGE, GREEN, GREY = "#1f2933", "#0072b2", "#d55e00", "#007a5a", "#8a94a0"
# From light to dark in one direction, so that it can be read in grey too (ColorBrewer's YlGnBu).
SCALE = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
ABSENT = "#d9dde2"
_CHARACTER = 7.0  # width of a character of 13 pixels, to leave room for labels

Colour = tuple[int, int, int]


def rgb(colour: str) -> Colour:
    """Red, green and blue of ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def shade(value: float) -> Colour:
    """The colour of a share in [0, 1] on SCALE."""
    place = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    lower = min(int(place), len(SCALE) - 2)
    pairs = zip(rgb(SCALE[lower]), rgb(SCALE[lower + 1]), strict=True)
    red, green, blue = (round(a + (b - a) * (place - lower)) for a, b in pairs)
    return red, green, blue


def png(values: Tensor, palette: Sequence[Colour]) -> str:
    """A picture with one pixel for each value, as a data URL.

    Args:
        values: integers ``[rows, columns]``, places in the palette.
        palette: at most 256 colours.
    """
    rows = values.byte().cpu().tolist()
    raw = b"".join(b"\0" + bytes(row) for row in rows)  # 0: no filter
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)),  # 8 bits, palette
        (b"PLTE", bytes(part for colour in palette for part in colour)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    step = (high - low) / count
    base = 10.0 ** math.floor(math.log10(step))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= step * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def whole_ticks(count: int, most: int = 12) -> list[int]:
    """Numbers 0, 1, 2, … below ``count``, at most so many of them, evenly spaced."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 100, 128, 1000) if count / step <= most)
    return list(range(0, count, step))


def text(value: object) -> str:
    """Text as HTML and SVG can hold it."""
    return html.escape(str(value))


def label(x: float, y: float, content: object, *, anchor: str = "middle", more: str = "") -> str:
    """A text at a place; nothing for an empty one."""
    place = "" if anchor == "middle" else f' text-anchor="{anchor}"'
    return "" if content == "" else f'<text x="{x:.1f}" y="{y:.1f}"{place}{more}>{text(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def titled(title: str, *content: str, kind: str = "") -> str:
    """Marks with a text that is shown under the pointer."""
    return f"<g{f' class={kind!r}' if kind else ''}><title>{text(title)}</title>{''.join(content)}</g>"


@dataclass
class Axes:
    """The rectangle of one chart, from data to pixels.

    Attributes:
        x, y: lowest and highest value; those of y may be in descending order, for rows that are counted downwards.
        x_ticks, y_ticks: values and their labels.
        x_label, y_label: what they are.
        width, height: of the whole picture, in pixels at full size.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    x_label: str
    y_label: str
    width: float = 400
    height: float = 280
    grid: bool = True

    def __post_init__(self) -> None:
        longest = max((len(name) for _, name in self.y_ticks), default=0)
        self.left = 32.0 + _CHARACTER * longest
        self.right, self.top, self.bottom = self.width - 20.0, 12.0, self.height - 40.0

    def px(self, x: float) -> float:
        """Place of a value from the left."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        """Place of a value from the top."""
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def path(self, points: Iterable[tuple[float, float]], colour: str, more: str = "") -> str:
        """A line through points; those that would stand less than 3 pixels from the last one are left out."""
        places = [(self.px(x), self.py(y)) for x, y in points]
        kept = places[:1]
        for place in places[1:-1]:
            if math.dist(place, kept[-1]) >= 3:
                kept.append(place)
        kept += places[1:][-1:]
        drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)
        return f'<path d="M{drawn}" fill="none" stroke="{colour}"{more}/>'

    def dot(self, x: float, y: float, colour: str, radius: float = 4, more: str = "") -> str:
        """A disc."""
        return f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius:g}" fill="{colour}"{more}/>'

    def across(self, y: float, colour: str, name: str) -> str:
        """A dashed line at a value of y, with its name above its right end."""
        at = self.py(y)
        drawn = line(self.left, at, self.right, at, colour, ' stroke-width="1.5" stroke-dasharray="6 4"')
        return drawn + label(self.right - 2, at - 5, name, anchor="end", more=' class="halo"')

    def picture(self, url: str, more: str = "") -> str:
        """A PNG over the whole rectangle, its pixels as sharp squares."""
        return (
            f'<image href="{url}" x="{self.left:.1f}" y="{self.top:.1f}" width="{self.right - self.left:.1f}" '
            f'height="{self.bottom - self.top:.1f}" preserveAspectRatio="none" class="pixels"{more}/>'
        )

    def svg(self, alt: str, *content: str) -> str:
        """The chart with its frame, ticks and labels.

        Args:
            alt: what it shows, for those who cannot see it.
        """
        frame = []
        lines = []
        for value, name in self.x_ticks:
            at = self.px(value)
            lines.append(f"M{at:.1f} {self.top:.1f}V{self.bottom:.1f}")
            frame += [label(at, self.bottom + 15, name)]
        for value, name in self.y_ticks:
            at = self.py(value)
            lines.append(f"M{self.left:.1f} {at:.1f}H{self.right:.1f}")
            frame += [label(self.left - 6, at + 4, name, anchor="end")]
        if self.grid:
            frame.insert(0, f'<path d="{"".join(lines)}" stroke="#e6e9ed"/>')
        middle = (self.top + self.bottom) / 2
        frame += [
            label((self.left + self.right) / 2, self.height - 6, self.x_label),
            label(11, middle, self.y_label, more=f' transform="rotate(-90 11 {middle:.1f})"'),
        ]
        size = f"{self.right - self.left:.1f}", f"{self.bottom - self.top:.1f}"
        box = f'<rect x="{self.left:.1f}" y="{self.top:.1f}" width="{size[0]}" height="{size[1]}" fill="none" '
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{text(alt)}" '
            f'style="max-width:{1.2 * self.width:.0f}px">{"".join(frame)}{"".join(content)}{box}stroke="{GREY}"/></svg>'
        )

"""Colors and lines that the figures of concept shift share: legible on white, and to the color-blind."""

from typing import Any

# Okabe and Ito's colors without their yellow, which white swallows; shapes as well, as no color is safe for everybody.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<P"
INK, SOFT, GRAY, PALE = "#1d1f23", "#5c6169", "#8b9199", "#c4c7cc"
BLUE = PALETTE[0]
SIGNIFICANT = 0.05
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9}

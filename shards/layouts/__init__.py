"""How data sets lie on disk: each layout finds the pairs in a folder, by their names and never by sorted order."""

from shards.layouts import blur, noise, rain
from shards.layouts.generic import pairs
from shards.layouts.layout import Layout, Pair, pictures_below, select
from shards.layouts.rain import rain100l

LAYOUTS: dict[str, Layout] = {
    "pairs": Layout(pairs, "any", {}, ("lq_dir", "gt_dir", "lq", "gt", "map")),
    **rain.LAYOUTS,
    **blur.LAYOUTS,
    **noise.LAYOUTS,
}

__all__ = ["LAYOUTS", "Layout", "Pair", "pairs", "pictures_below", "rain100l", "select"]

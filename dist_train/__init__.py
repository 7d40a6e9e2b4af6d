"""Restill: distils Segment Anything's semantics into image-restoration networks.

The path of the data, and the reading order: `data` -> `tasks` (student, prior, teacher, losses) -> `engine` ->
`checkpoint` -> `evaluate`, `export`, `restore`; `trainer` is the loop over it.

Letters in shapes: B batch, C channels, H W image pixels, h w feature pixels, K masks.
Images are (B,3,H,W) float32 RGB in [0,1] everywhere; uint8 (H,W,3) RGB is called `rgb_u8`.
"""

__version__ = "0.1.0"

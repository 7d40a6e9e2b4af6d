"""The smallest of each net, as a configuration would name it."""

from typing import Any

TINY_NETS: dict[str, dict[str, Any]] = {
    "nafnet": {"name": "nafnet", "width": 4, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "rcdnet": {"name": "rcdnet", "num_stages": 3, "num_m": 4, "num_z": 3},
    "rcdnet_simple": {
        "name": "rcdnet", "layout": "simple", "num_stages": 3, "num_m": 4, "num_z": 3, "num_res_blocks": 1,
    },
    "efficientderain": {"name": "efficientderain", "base_width": 4},
    "uformer": {
        "name": "uformer", "embed_dim": 4, "depths": [2] * 9, "num_heads": [1, 2, 2, 2, 4, 4, 2, 2, 2],
        "win_size": 2, "img_size": 32,
    },
}  # fmt: skip

"""A page on which to drop a picture: `python -m launch.page WEIGHTS` and open the address it prints."""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command import program
from launch.console import add_net_option, device_of, run_main, set_up_logging

if TYPE_CHECKING:
    import gradio
    from numpy.typing import NDArray

    from dist_train.inference import Inference
    from dist_train.nets.stages import RestorationNet

MOST_MB = 200
"""Largest file that is taken."""


def main(argv: list[str] | None = None) -> int:
    """Parse and serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.page"),
        description="Serve a page on which a dropped picture is restored: before and after under a slider, and a file "
        "to keep, with grey, alpha, 16 bit, profile and file format as they were. It can be called by programs too.",
    )
    parser.add_argument("weights", type=Path, help=".safetensors of an export, or a .pth of a net's official release")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to other machines (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--tlc", type=int, default=0, metavar="PX", help="NAFNet: pool as over training crops of that side"
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: serve(args))


def serve(args: argparse.Namespace) -> int:
    """Load, then serve."""
    import logging

    from dist_train.inference import Inference
    from dist_train.load import load_net

    device = device_of(args.device)
    net, card = load_net(args.weights, dict(args.net))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio looks whether it is there itself, and tells
    options = Inference(tlc_px=args.tlc, precision=args.precision)
    title = f"{args.weights.name}: {card['net']['name']}, {card['parameters']:,} parameters"
    with tempfile.TemporaryDirectory() as results:
        page = build(net, options, title=title, results=Path(results), device=device)
        page.launch(server_name=args.host, server_port=args.port, share=False, max_file_size=f"{MOST_MB}mb")
    return 0


def build(
    net: "RestorationNet", options: "Inference", *, title: str, results: Path, device: str = "cpu"
) -> "gradio.Blocks":
    """The page, not yet served; its programs' interface has one call, /restore.

    Args:
        net: restores pictures.
        options: how; of pictures that memory has no room for, tiles are made.
        title: what the page is headed by.
        results: folder for restored files; whoever serves the page removes it.
        device: where to restore.

    Raises:
        ValueError: as `dist_train.inference.restorer`.
    """
    from time import perf_counter

    import gradio

    from dist_train.inference import fitting_restorer
    from dist_train.picture_files import SUFFIXES, read_picture, write_picture
    from dist_train.restore import restore_image

    once, eight_times = (
        fitting_restorer(net, replace(options, ensemble=ensemble), device=device) for ensemble in (False, True)
    )

    def restore(file: str | None, ensemble: bool) -> tuple[Any, str, str]:
        if file is None:
            raise gradio.Error("there is no picture yet: drop one")
        try:
            picture = read_picture(Path(file))
            start = perf_counter()
            restored = restore_image(eight_times if ensemble else once, picture.rgb)
            seconds = perf_counter() - start
            name = Path(file).name if Path(file).suffix.lower() in SUFFIXES else f"{Path(file).stem}.png"
            target = Path(tempfile.mkdtemp(dir=results)) / name
            write_picture(target, picture._replace(rgb=restored))
        except (ValueError, OSError, RuntimeError) as error:  # a RuntimeError: no memory for this one
            raise gradio.Error(f"not restored: {error}") from None
        before, after = (_u8(image) for image in (picture.rgb, restored))
        height, width = before.shape[:2]
        return (before, after), str(target), f"{width} x {height} px in {seconds:.1f} s on {device}"

    # Without analytics and with fonts that are there, nothing is asked of the network.
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"## {title}")
        with gradio.Row():
            with gradio.Column(scale=1):
                dropped = gradio.Image(
                    label="degraded", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280
                )
                ensemble = gradio.Checkbox(label="mean over eight flips and turns (8 times as long)")
                again = gradio.Button("Restore", variant="primary")
            with gradio.Column(scale=2):
                slider = gradio.ImageSlider(label="before and after", format="png", max_height=640)
                note = gradio.Markdown()
                kept = gradio.File(label="restored")
        gradio.on(
            [dropped.upload, again.click],
            restore,
            inputs=[dropped, ensemble],
            outputs=[slider, kept, note],
            api_name="restore",
        )
    return page


def _u8(rgb: "NDArray[Any]") -> "NDArray[Any]":
    """What a browser can show."""
    return rgb if rgb.dtype == "uint8" else (rgb >> 8).astype("uint8")


if __name__ == "__main__":
    sys.exit(main())

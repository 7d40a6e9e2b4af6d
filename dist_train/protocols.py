"""Names of the protocols by which PSNR and SSIM are taken, and what each name means. Their code is in `metrics`."""

PROTOCOLS_SAY = {
    "rgb": "PSNR of RGB, peak 255; SSIM v1 (11 px Gaussian of sigma 1.5, inside the picture only), mean of the three "
    "channels; outputs rounded to uint8: what most libraries mean",
    "rain200": "PSNR and SSIM v1 of the luma (MATLAB's rgb2ycbcr) of uint8, itself rounded to whole grey levels; "
    "outputs rounded to uint8: evaluation of Restormer and MPRNet, tables of Rain200L and Rain200H",
    "did_ddn": "PSNR and SSIM v1 of the luma (MATLAB's rgb2ycbcr) as a double, not rounded, SSIM after shrinking by "
    "round(shorter side / 256); outputs rounded to uint8: evaluation of PReNet and RCDNet, tables of DID and DDN",
    "gopro": "PSNR of RGB, peak 255; SSIM over three dimensions, colour being the third, edges replicated (MATLAB's "
    "ssim of RGB); outputs rounded to uint8: evaluation of NAFNet, HINet and SAM-Deblur, tables of GoPro",
    "awgn": "PSNR and SSIM v1 of RGB, or of the one channel of grey pictures; the degraded picture is the clean one "
    "plus Gaussian noise of the sigma that is named (of 255), not clipped nor rounded, drawn by numpy's MT19937 with "
    "seed 0 for each picture; outputs rounded to uint8: evaluation of KAIR and FFDNet, tables of DnCNN",
}
"""Protocol -> colours, PSNR, SSIM and rounding, in one sentence. None crops a border."""

ALIASES = {"y_uint8": "rain200", "y_double": "did_ddn"}
"""Former name -> name."""


def present_name(name: str) -> str:
    """The name that a protocol has now; any other word as it is."""
    return ALIASES.get(name, name)


def protocol_name(name: str) -> str:
    """The present name of a protocol.

    Raises:
        ValueError: there is no such protocol.
    """
    if present_name(name) not in PROTOCOLS_SAY:
        raise ValueError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS_SAY)}")
    return present_name(name)

"""A small Segment Anything that was trained, so that its masks mean something, and its sureness is earned.

Published classes (TinyViT, prompt encoder, two-way transformer), 0.4 M parameters, pictures of 128 px. It learned as
SAM did: a point is asked, three masks are given, the best of them is drawn to what the point may mean (an object, its
part, what is around it), and the sureness of each to the IoU that it reaches. What is to be found are shapes laid over
photographs. The weights in tests/golden were made by

    python -m tests.helpers.trained_sam tests/golden/small_sam.safetensors --steps 4000 --pictures PHOTOGRAPHS...

in half an hour on one core of a CPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

SIZE_PX = 128
WEIGHTS = Path(__file__).parents[1] / "golden" / "small_sam.safetensors"

Scene = tuple[np.ndarray, np.ndarray]
"""(S,S,3) uint8 RGB, and what is in it, (N,S,S) bool: what lies around the objects, the objects, their parts."""


def trained_sam() -> Any:
    """The small SAM with its weights."""
    sam = small_sam()
    sam.load_state_dict(load_file(WEIGHTS))
    return sam.requires_grad_(False).eval()


def small_sam() -> Any:
    """Untrained; the same weights every time."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    from dist_train.priors.tiny_vit import TinyVitEncoder

    width, grid = 64, SIZE_PX // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sam(
            image_encoder=TinyVitEncoder(
                SIZE_PX, embed_dims=(24, 48, 64, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), out_chans=width
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=width, image_embedding_size=(grid, grid), input_image_size=(SIZE_PX, SIZE_PX), mask_in_chans=4
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=width,
                transformer=TwoWayTransformer(depth=2, embedding_dim=width, num_heads=4, mlp_dim=128),
                iou_head_hidden_dim=width,
            ),
        )


def scenes(photos: list[np.ndarray], seed: int = 0) -> Iterator[Scene]:
    """Without end: two to six shapes, some with a part of another colour, on crops of photographs (H,W,3) uint8."""
    rng = np.random.default_rng(seed)

    def crop() -> np.ndarray:
        whole = photos[rng.integers(len(photos))]
        size = int(min(whole.shape[:2]) * rng.uniform(0.33, 1))
        top, left = (int(rng.integers(length - size + 1)) for length in whole.shape[:2])
        small = cv2.resize(
            whole[top : top + size, left : left + size], (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA
        )
        return small[:, ::-1] if rng.random() < 0.5 else small

    while True:
        yield _scene(rng, crop)


def _scene(rng: np.random.Generator, photo: Callable[[], np.ndarray]) -> Scene:
    picture = photo().copy()
    found, around = list[np.ndarray](), np.ones(picture.shape[:2], bool)
    for _ in range(rng.integers(2, 7)):
        centre, reach = rng.uniform(0.1, 0.9, 2) * SIZE_PX, rng.uniform(0.1, 0.33) * SIZE_PX
        whole = _shape(rng, centre, reach)
        part = _shape(rng, centre + rng.uniform(-0.3, 0.3, 2) * reach, reach * rng.uniform(0.3, 0.6)) & whole
        _fill(rng, picture, whole, photo)
        found = [mask & ~whole for mask in found] + [whole]
        if rng.random() < 0.5:
            _fill(rng, picture, part, photo)
            found += [part, whole & ~part]
        around &= ~whole
    return picture, np.array([mask for mask in [around, *found] if mask.sum() > 0.002 * mask.size])


def _shape(rng: np.random.Generator, centre: np.ndarray, reach: float) -> np.ndarray:
    """A star-shaped polygon, or an ellipse."""
    if rng.random() < 0.6:
        num = int(rng.integers(3, 9))
        angle, far = np.sort(rng.uniform(0, 2 * np.pi, num)), reach * rng.uniform(0.6, 1.0, num)
    else:
        angle, far = np.linspace(0, 2 * np.pi, 40), np.full(40, reach)
    x, y = far * np.cos(angle), far * np.sin(angle) * rng.uniform(0.5, 1.0)
    turn = rng.uniform(0, np.pi)
    outline = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1) + centre
    return cv2.fillPoly(np.zeros((SIZE_PX, SIZE_PX), np.uint8), [outline.round().astype(np.int32)], 1).astype(bool)


def _fill(rng: np.random.Generator, picture: np.ndarray, where: np.ndarray, photo: Callable[[], np.ndarray]) -> None:
    """Paint, with a colour or a photograph, a little noisy."""
    colour = rng.uniform(0, 255, 3)
    plain = rng.random() < 0.8
    paint = np.broadcast_to(colour, picture.shape) if plain else rng.uniform(0.3, 1) * photo() + 0.4 * (colour - 128)
    noisy = paint + rng.normal(0, rng.uniform(0, 8), picture.shape)
    picture[where] = noisy.clip(0, 255).astype(np.uint8)[where]


def _loss(sam: Any, group: list[Scene], num_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of some scenes, with random points on each: the loss, and the mean IoU that the best masks reach."""
    pictures = torch.from_numpy(np.stack([picture for picture, _ in group])).permute(0, 3, 1, 2).float()
    embeddings = sam.image_encoder(sam.preprocess(pictures))
    losses, reached = [], []
    for embedding, (_, truth) in zip(embeddings, group, strict=True):
        masks = torch.from_numpy(truth)
        meant = masks[torch.randint(len(masks), (num_points,), generator=generator)]  # (P,S,S)
        places = torch.multinomial(meant.flatten(1).float(), 1, generator=generator)[:, 0]
        points = torch.stack([places % SIZE_PX, places // SIZE_PX], 1).float()[:, None]
        sparse, dense = sam.prompt_encoder((points, torch.ones(num_points, 1)), None, None)
        logits, quality = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        logits, quality = logits.float(), quality.float()  # (P,3,h,w), (P,3)
        small = F.interpolate(masks[None].float(), logits.shape[-2:], mode="area")[0]
        wanted = F.interpolate(meant[None].float(), logits.shape[-2:], mode="area")[0][:, None].expand_as(logits)
        shown = logits.sigmoid()
        dice = 1 - (2 * (shown * wanted).sum((2, 3)) + 1) / ((shown + wanted).sum((2, 3)) + 1)
        cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
        # How good each of the three is: by whatever there is that holds the point.
        hard, holds = (logits > 0).float().flatten(2), masks.flatten(1)[:, places].T  # (P,3,hw), (P,N)
        both = hard @ small.flatten(1).T
        iou = both / (hard.sum(2)[..., None] + small.flatten(1).sum(1) - both).clamp(min=1)
        iou = iou.masked_fill(~holds[:, None], 0).amax(2)
        losses.append(((4 * cross + dice).amin(1) + (quality - iou).square().mean(1)).mean())
        reached.append(iou.amax(1).mean())
    return torch.stack(losses).mean(), torch.stack(reached).mean().detach()


def train(sam: Any, photos: list[np.ndarray], *, steps: int, lr: float = 2e-3) -> None:
    """In place, telling how it goes."""
    sam.requires_grad_(True).train()
    sam.prompt_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    stream, generator, start = scenes(photos), torch.Generator().manual_seed(0), time.monotonic()
    seen = list[tuple[float, float]]()
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss, iou = _loss(sam, [next(stream) for _ in range(8)], 16, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append((loss.item(), iou.item()))
        if step % 50 == 0 or step == steps:
            means = np.mean(seen[-50:], 0)
            print(
                f"{step}/{steps}  {time.monotonic() - start:.0f} s  loss {means[0]:.3f}  IoU {means[1]:.3f}", flush=True
            )


def main() -> None:
    """Train and write; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    sam = small_sam()
    train(sam, [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in args.pictures], steps=args.steps)
    state = {name: value.half() if value.is_floating_point() else value for name, value in sam.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, args.out)


if __name__ == "__main__":
    main()

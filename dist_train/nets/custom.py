"""Any net from elsewhere as student or teacher: its stages are named submodules, reached by hooks."""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.nets.stages import AfterStage, Padding, RestorationNet, Stage, Trace, next_multiple


class CustomNet(RestorationNet):
    """A net that a function of the user's makes, behind the border and the stages of ours; see `CustomConfig`.

    Its weights keep their names, under `net.`.

    Args:
        factory: `module:function`; the function returns a module that maps (B,3,H,W) RGB in [0,1] to the same.
        args: its keyword arguments.
        stages: names of submodules in the order they run, each run once in a pass, with maps (B,C,h,w) as outputs.
        multiple: what sides must be a multiple of.

    Raises:
        ValueError: the function is not to be found, or a stage is not as said; the message names it.
    """

    def __init__(self, *, factory: str, args: Mapping[str, Any], stages: Sequence[str], multiple: int):
        super().__init__()
        try:
            self.net = _find(factory)(**args)
        except TypeError as error:
            raise ValueError(f"{factory}: {error}; its arguments are args={dict(args)}") from error
        if not isinstance(self.net, nn.Module):
            raise ValueError(f"{factory} gave {type(self.net).__name__}, not a torch.nn.Module")
        self.multiple = multiple
        modules = dict(self.net.named_modules())
        for name in stages:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3) or [key for key in modules if "." not in key][1:]
                raise ValueError(f"{factory} has no submodule {name!r} to be a stage; there are {', '.join(near)}")
        self._hooked = [modules[name] for name in stages]
        self.stages = self._probe(stages)

    def padding(self, height: int, width: int) -> Padding:
        """Zeros on the right and below."""
        return (0, next_multiple(width, self.multiple) - width, 0, next_multiple(height, self.multiple) - height)

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`."""

        def hook(index: int) -> Any:
            return lambda module, inputs, output: after_stage(index, output)

        handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(self._hooked)]
        try:
            return self.net(padded)
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, names: Sequence[str]) -> tuple[Stage, ...]:
        """What the stages give, from one pass of zeros."""
        side = -(-64 // self.multiple) * self.multiple
        seen: list[tuple[int, Tensor]] = []

        def watch(index: int, features: Tensor) -> Tensor:
            seen.append((index, features))
            return features

        weight = next(self.net.parameters(), torch.empty(0))
        with torch.no_grad():
            out = self.eval().restore(torch.zeros(1, 3, side, side, device=weight.device), watch, None)
        self.train()  # as any new net; loaders hand theirs out in evaluation mode
        if out.shape != (1, 3, side, side):
            raise ValueError(
                f"a net from elsewhere must map (1,3,{side},{side}) to the same, not to {tuple(out.shape)}"
            )
        if (ran := [index for index, _ in seen]) != list(range(len(names))):
            raise ValueError(
                f"stages must run once each in the order they are named in; they ran as {[names[i] for i in ran]}"
            )
        for index, features in seen:
            if not isinstance(features, Tensor) or features.ndim != 4 or side % features.shape[-1]:
                found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"stage {names[index]} gives {found}; wanted a map (B,C,h,w), h and w dividing {side}")
        return tuple(Stage(names[i], features.shape[1], side // features.shape[-1]) for i, features in seen)


def _find(factory: str) -> Any:
    module, _, function = factory.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"net factory {factory}: {error}. The module must be importable where the run starts: put its folder on "
            "PYTHONPATH"
        ) from None

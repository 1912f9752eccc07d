"""Whether a model still is what it was at the last look, told in a fraction of a millisecond.

Every call with a memory asks. So what was found by walking through the model is kept, and only this is looked at: that
the modules hold the same modules, parameters and buffers, how often each tensor was written to, where it lies, and a
few of its numbers, since what is written by way of ``.data`` counts no version. Nor does what fused optimizers write:
so a version is counted here after each step of any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_NOTED = 8  # numbers of each tensor that are looked at again
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_version = attrgetter("_version")


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_step)


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that is shared out over processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def few_numbers(tensor: Tensor) -> Tensor:
    """A few numbers of a tensor, evenly spread, (n,) float32."""
    flat = own_part(tensor.detach()).reshape(-1)
    return flat[:: _step(flat)].to(torch.float32)


def numbers_of(tensors: Sequence[Tensor]) -> Tensor:
    """A few numbers of each tensor, one after the other, (n,) float32 on the CPU."""
    with torch.no_grad():
        few = [few_numbers(tensor) for tensor in tensors]
        if not few:
            return torch.empty(0, dtype=torch.float32)
        # One copy from each device: every copy waits for it.
        devices = {part.device for part in few}
        if len(devices) == 1:
            return torch.cat(few).cpu()
        return torch.cat([part.cpu() for part in few])


class Watch:
    """What a model looked like at one moment.

    Args:
        modules: Whose children, parameters and buffers must stay the same.
        tensors: That must not be written to.
        follows: Tells of a module's buffer whether it is exchanged as texts are read.
        more: What else must stay the same, a value that can be compared; asked for at each look.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        tensors: Iterable[Tensor],
        follows: Callable[[nn.Module, str], bool],
        more: Callable[[], Any],
    ) -> None:
        kept = list(modules)
        # A module without tensors that is given one does not read it.
        self._holders: list[dict[str, Any]] = [module._modules for module in kept]
        self._holders += [
            part
            for module in kept
            for part in (module._parameters, module._buffers)
            if part and not any(follows(module, name) for name in part)
        ]
        self._tensors = list(tensors)
        # Tensors made in inference mode count no versions.
        self._counting = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._more = more
        # Numbers in main memory are looked at where they lie. Elsewhere a view would keep what a device should be free
        # to forget, and where numbers do not lie one after the other there is none.
        self._here: dict[Any, list[np.ndarray[Any, Any]]] = {}
        self._elsewhere = []
        for tensor in self._tensors:
            if not isinstance(tensor, DTensor) and _lies_here(tensor):
                flat = tensor.detach().view(-1)[:: _step(tensor)]
                self._here.setdefault(tensor.dtype, []).append(flat.view(_BITS[tensor.element_size()]).numpy())
            else:
                self._elsewhere.append(tensor)
        self._slots, self._seen, self._numbers = self._held(), self._look(), self._look_at_numbers()

    def same(self) -> bool:
        """Whether nothing tells that it looks otherwise now."""
        slots = self._held()
        return (
            len(slots) == len(self._slots)
            and all(map(is_, slots, self._slots))
            # Only now: what is held elsewhere than it was may lie nowhere any more.
            and self._look() == self._seen
            and self._look_at_numbers() == self._numbers
        )

    def _held(self) -> list[Any]:
        """Modules, parameters and buffers, to be compared one by one."""
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _look(self) -> tuple[Any, ...]:
        return list(map(_version, self._counting)), list(map(Tensor.data_ptr, self._tensors)), self._more()

    def _look_at_numbers(self) -> bytes:
        # As bytes: what is no number equals itself.
        here = b"".join(np.concatenate(parts).tobytes() for parts in self._here.values())
        return here + numbers_of(self._elsewhere).numpy().tobytes() if self._elsewhere else here


def _step(tensor: Tensor) -> int:
    return max(1, -(-tensor.numel() // _NOTED))


def _lies_here(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_complex()
    return tensor.device.type == "cpu" and plain and tensor.element_size() in _BITS

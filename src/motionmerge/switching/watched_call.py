"""A module that is called through a function of ours, hooks and all, until it is let go."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_STANDS_IN = "_compiled_call_impl"


class WatchedCall:
    """A module that is called through a function of ours.

    torch asks `_compiled_call_impl` of a module for what stands in for a call, hooks and all. A
    `forward` in its place would be lost: offloading puts back the old one after every video.

    Args:
        module: The module.
        run: What is called instead.

    Attributes:
        is_replaced: Whether `remove` found something else there, as `module.compile()` puts it.
    """

    is_replaced = False

    def __init__(self, module: nn.Module, run: Callable[..., object]) -> None:
        self._module, self._run = module, run
        own = vars(module).get(_STANDS_IN)
        self.plain: Callable[..., object] = own or module._call_impl
        self._own = own
        vars(module)[_STANDS_IN] = run

    def remove(self) -> None:
        """Restore the way in which the module is called."""
        if vars(self._module).get(_STANDS_IN) is self._run:
            if self._own is None:
                del vars(self._module)[_STANDS_IN]
            else:
                vars(self._module)[_STANDS_IN] = self._own
        else:
            self.is_replaced = True

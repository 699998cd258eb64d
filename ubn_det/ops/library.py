"""The namespace ``torch.ops.ubn_det``: operators that torch.compile and export see whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

_library = Library('ubn_det', 'DEF')


class Operator:
    """An operator for CPU and CUDA.

    ``torch.library.custom_op`` would do the same and take 20 microseconds more of every call.

    Args:
        schema (str): Name, arguments and results, as in ``torch.library.define``.
        implementation (Callable): Runs below autograd.
        fake (Callable): Returns results of the right shapes and types without values.
        function (type, optional): Subclass of ``torch.autograd.Function`` that gives the results a
            gradient; its first argument is the operator. None for results without one.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        function: type[torch.autograd.Function] | None = None,
    ) -> None:
        name = schema.split('(')[0]
        _library.define(schema)
        self.overload = getattr(torch.ops.ubn_det, name).default
        self._function = function
        for key in ('CPU', 'CUDA'):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f'ubn_det::{name}', fake, lib=_library)
        _library.impl(name, self._with_autograd, 'Autograd')

    def __call__(self, *args: Any) -> Any:
        """Run on tensors and numbers in the order of the schema."""
        return self.overload(*args)

    def below_autograd(self, *args: Any) -> Any:
        """Run without a gradient."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _with_autograd(self, *args: Any) -> Any:
        if (
            self._function is not None
            and torch.is_grad_enabled()
            and torch._C._any_requires_grad(*args)
        ):
            return self._function.apply(self, *args)
        return self.below_autograd(*args)

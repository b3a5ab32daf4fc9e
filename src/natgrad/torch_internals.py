"""What natgrad uses of torch that torch does not promise, of its engine, hooks and modules: see to it in new versions.

There is no public way to ask any of it. The tests of :mod:`natgrad.forward`, :mod:`natgrad.passes`,
:mod:`natgrad.exchange` and the layers run all of it, so that a version in which something is not there, or means
something else, fails them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo as not_compiled
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as KeepsStatistics
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "BatchNorm",
    "KeepsStatistics",
    "forward_hooks",
    "is_in_backward",
    "is_recorded",
    "is_transformed",
    "not_compiled",
    "will_run",
    "wrapper_at_work",
]


def is_transformed() -> bool:
    """Whether this is run by a transform of ``torch.func``, whose tensors are not what they seem."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_in_backward() -> bool:
    """Whether this is run by a backward pass, as a hook is, or what is checkpointed."""
    return torch._C._current_graph_task_id() != -1


def is_recorded() -> bool:
    """Whether the model runs to be written down, by ``torch.jit.trace`` or, hooks and all, by ``model.compile()``."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def wrapper_at_work() -> DistributedDataParallel | None:
    """What averages gradients over processes, and calls its model at this moment."""
    return DistributedDataParallel._active_ddp_module


def will_run(node: Node) -> bool:
    """Whether the backward pass under way comes to a node; a ``RuntimeError`` where it cannot tell."""
    return torch._C._will_engine_execute_node(node)


def forward_hooks(module: nn.Module, before: bool = False) -> dict[int, Callable[..., Any]]:
    """The hooks of a module's forward pass, those after it or ``before``, by the ids of their handles."""
    return module._forward_pre_hooks if before else module._forward_hooks

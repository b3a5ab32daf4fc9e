"""K-FAC for PyTorch: curvature-aware training as easy to switch on as AdamW.

- :class:`KFAC`: a whole optimizer; the training loop stays as it is.
- :class:`Preconditioner`: natural gradients for an optimizer that you already have.
- :func:`curvature`: the blocks themselves, to look at, multiply by and solve with.
- :func:`verify`: how far they are from the exact ones, on your own network.
- :func:`describe`: which layers are preconditioned, and why the others are not.
- :class:`Distributed`: who holds what, where several processes train one model.
- :mod:`natgrad.likelihoods`: losses that have no name of their own.
"""

from natgrad import likelihoods
from natgrad.blocks import curvature
from natgrad.distributed import Distributed
from natgrad.optimizer import KFAC
from natgrad.preconditioner import Preconditioner
from natgrad.report import describe
from natgrad.verification import verify

__version__ = "0.1.0"

__all__ = ["KFAC", "Distributed", "Preconditioner", "curvature", "describe", "likelihoods", "verify"]

"""Stage 2: layer kinds. Each turns a module's tensors into rows, and its parameters into one matrix.

Read :class:`~natgrad.layers.base.Layer` first and :mod:`natgrad.layers.linear` second; every other kind is then
familiar.
"""

from natgrad.layers.base import Layer, register, registered
from natgrad.layers.linear import LinearLayer
from natgrad.layers.partition import Partition, partition

__all__ = ["Layer", "LinearLayer", "Partition", "partition", "register", "registered"]

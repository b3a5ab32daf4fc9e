"""Stage 2: layer kinds. Each turns a module's tensors into rows, and its parameters into one matrix.

Read :class:`~natgrad.layers.base.Layer` first and :mod:`natgrad.layers.linear` second; every other kind is then
familiar. Importing this package registers them all.
"""

from natgrad.layers import attention, convolution, embedding, linear, normalization, recurrent
from natgrad.layers.base import Layer, Recorder, WeightLayer, register, registered
from natgrad.layers.derivative import DerivativeUse
from natgrad.layers.moments import Moment, Sharing, at_least_float32
from natgrad.layers.normalization import statistics_left_alone, uses_batch_statistics
from natgrad.layers.partition import Partition, entry, partition, uncompiled, unwrap
from natgrad.layers.spectrum import Bases

__all__ = [
    "Bases",
    "DerivativeUse",
    "Layer",
    "Moment",
    "Partition",
    "Recorder",
    "Sharing",
    "WeightLayer",
    "at_least_float32",
    "attention",
    "convolution",
    "embedding",
    "entry",
    "linear",
    "normalization",
    "partition",
    "recurrent",
    "register",
    "registered",
    "statistics_left_alone",
    "uncompiled",
    "unwrap",
    "uses_batch_statistics",
]

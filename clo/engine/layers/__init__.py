"""The KV cache of one layer: pages on the host, what of it is on the device, and the operations on both.

Three kinds, by what the design does with the layer: everything on the device (dense), everything copied in every step
(streamed), or a budget of pages fetched per KV head (offloaded). Two that no design changes: a sliding window's tokens
(windowed), and the states of linear attention (linear). An operation here is what the schedule's operation of the same
name does; this knows nothing about their order, threads or time.
"""

from clo.engine.layers.dense import DenseLayer
from clo.engine.layers.linear import LinearLayer
from clo.engine.layers.offloaded import OffloadedLayer
from clo.engine.layers.shape import NEVER, HeadSettings, LayerShape
from clo.engine.layers.streamed import StreamedLayer
from clo.engine.layers.windowed import WindowedLayer

AttendedLayer = DenseLayer | StreamedLayer | OffloadedLayer | WindowedLayer
"""With keys and values."""
Layer = AttendedLayer | LinearLayer

__all__ = [
    "NEVER",
    "AttendedLayer",
    "DenseLayer",
    "HeadSettings",
    "Layer",
    "LayerShape",
    "LinearLayer",
    "OffloadedLayer",
    "StreamedLayer",
    "WindowedLayer",
]

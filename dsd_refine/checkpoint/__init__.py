"""Released checkpoints: their files, their models, and writing them back in the same shape."""

from dsd_refine.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_shapes
from dsd_refine.checkpoint.layout import Layout
from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source, find_source
from dsd_refine.checkpoint.verify import verify

__all__ = ["Checkpoint", "Layout", "Library", "Source", "find_source", "open_checkpoint", "open_shapes", "verify"]

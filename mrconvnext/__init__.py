"""MRConvNeXt for timm: ConvNeXt with global multi-resolution convolutions. Importing it registers the models."""

from .engines import engine
from .global_kernels import reparameterize, resample, with_global_kernels
from .hub import push_to_hub, save
from .longconv import long_conv, long_conv_reference
from .mrconv import MRConv1d, MRConv2d
from .mrconvnext import MRConvNeXt, from_convnext
from .sequence import MRConvSequence

__all__ = [
    "MRConv1d",
    "MRConv2d",
    "MRConvNeXt",
    "MRConvSequence",
    "engine",
    "from_convnext",
    "long_conv",
    "long_conv_reference",
    "push_to_hub",
    "reparameterize",
    "resample",
    "save",
    "with_global_kernels",
]
__version__ = "0.1.0"

"""The Inception network of FID, IS and KID: `network` as a pure function, `file` its published weights."""

from functional_sd3.metrics.inception.file import FILE, SHA256, UnknownWeights, load
from functional_sd3.metrics.inception.network import CLASSES, SIZE, TAPS, apply, fingerprint, init, spec, unbiased

__all__ = [
    "CLASSES",
    "FILE",
    "SHA256",
    "SIZE",
    "TAPS",
    "UnknownWeights",
    "apply",
    "fingerprint",
    "init",
    "load",
    "spec",
    "unbiased",
]

"""The fused loss and the packer inside other trainers: one module each, none of which does anything when imported.

``seams.py`` names the places of other packages that are used, holds them against what is expected, and replaces and
restores them. :func:`unpatch` restores everything that any integration has replaced.
"""

from revisual_fast.integrations.seams import SUPPORTED, SeamError, unpatch

__all__ = ["SUPPORTED", "SeamError", "unpatch"]

"""The fused head and the packer inside TRL.

:func:`patch_trl` replaces one function, the log-probs of every TRL trainer that scores tokens. :class:`FastGRPOTrainer`
is TRL's ``GRPOTrainer`` with all its passes packed and its loss fused. docs/integrations/trl.md says what is covered.
"""

from revisual_fast.integrations.seams import check_version, unpatch

check_version("trl")

from revisual_fast.integrations.trl.kernel import patch_trl  # noqa: E402
from revisual_fast.integrations.trl.trainer import FastGRPOTrainer  # noqa: E402

__all__ = ["FastGRPOTrainer", "patch_trl", "unpatch"]

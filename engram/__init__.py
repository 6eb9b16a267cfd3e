"""The rooms that the scripts share. None is run by itself: the scripts at the top of the repository are."""

import logging

# transformers imports torchao where it is installed, and it remarks on kernels for other machines.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

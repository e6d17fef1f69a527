"""The one door to Megatron-Core, Transformer Engine and apex."""

import warnings

# Megatron-Core warns at import about every optional GPU package; mcore.cpu and mcore.attention say once what is used.
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
# Its loading of checkpoints makes torch warn about a class of torch's own.
warnings.filterwarnings("ignore", message="Please use DTensor instead")

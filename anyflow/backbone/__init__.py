"""diffusers' networks behind one protocol: loading, export, adapters, roles, sharding, the codec."""

import logging

# diffusers imports PEFT, which imports bitsandbytes wherever it is installed, which complains of kernels for text
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

"""Entry points: pre-training, supervised fine-tuning and ESPO on Megatron's training stack."""

from megatron_espo.device import import_megatron

import_megatron()

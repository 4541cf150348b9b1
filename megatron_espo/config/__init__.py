"""The project's settings: documented dataclasses that are the only source of defaults.

Each becomes a group of command-line flags (see arguments.py); what Megatron has a flag for is not
repeated here. ``validate`` raises UserError with one sentence that names the flag to change.
"""

from megatron_espo.config.espo import MOST_REFILLS as MOST_REFILLS
from megatron_espo.config.espo import REFERENCE_MIX_INTERVAL as REFERENCE_MIX_INTERVAL
from megatron_espo.config.espo import EspoConfig as EspoConfig
from megatron_espo.config.launch import LaunchConfig as LaunchConfig
from megatron_espo.config.launch import SimulateConfig as SimulateConfig
from megatron_espo.config.model import DiffusionConfig as DiffusionConfig
from megatron_espo.config.model import LoraConfig as LoraConfig
from megatron_espo.config.reporting import CheckpointConfig as CheckpointConfig
from megatron_espo.config.reporting import MonitorConfig as MonitorConfig
from megatron_espo.config.supervised import DpoConfig as DpoConfig
from megatron_espo.config.supervised import PromptConfig as PromptConfig
from megatron_espo.config.supervised import SftConfig as SftConfig
from megatron_espo.config.supervised import SpelledTokens as SpelledTokens
from megatron_espo.rollout_config import RolloutConfig as RolloutConfig

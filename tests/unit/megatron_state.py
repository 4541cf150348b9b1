"""What Megatron keeps for a whole process, which tests that build models share."""

from megatron.core import mpu


def new_groups() -> None:
    """Make the groups of one rank, whatever a test or a conversion before has left."""
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel()

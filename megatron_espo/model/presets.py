"""Model shapes as plain Megatron flags: ``--preset NAME`` stands for the flags listed here.

A flag given on the command line wins over the preset's. The published shapes are those of the
models' config.json.
"""

from megatron_espo.errors import UserError
from megatron_espo.recipes import last_value

_COMMON = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0"
)

_QWEN3_8B = (
    "--num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --qk-layernorm --rotary-base 1000000 "
    "--norm-epsilon 1e-6 --vocab-size 151936 --mask-token-id 151669 "
    f"--stop-token-ids 151643 151645 {_COMMON}"
)

_BLOCKS_OF_4 = "--attention-mask block-causal --block-size 4"

PRESETS: dict[str, str] = {
    # For demonstrations and tests on CPUs.
    "tiny": (
        "--num-layers 3 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 "
        "--max-position-embeddings 4096 --rotary-base 10000 --norm-epsilon 1e-5 "
        f"--init-method-std 0.02 {_COMMON}"
    ),
    # GSAI-ML/LLaDA-8B-Base, -Instruct and LLaDA-1.5.
    "llada_8b": (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 "
        "--max-position-embeddings 4096 --rotary-base 500000 --norm-epsilon 1e-5 "
        f"--vocab-size 126464 --mask-token-id 126336 --stop-token-ids 126081 126348 {_COMMON}"
    ),
    # Dream-org/Dream-v0-Base-7B and -Instruct-7B.
    "dream_7b": (
        "--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28 "
        "--group-query-attention --num-query-groups 4 --add-qkv-bias "
        "--max-position-embeddings 131072 --rotary-base 1000000 --norm-epsilon 1e-6 "
        "--vocab-size 152064 --mask-token-id 151666 --stop-token-ids 151643 151645 "
        f"--logit-shift {_COMMON}"
    ),
    # JetLM/SDAR-8B-Chat: Qwen3-8B's layers, trained to predict in place.
    "sdar_8b": f"{_QWEN3_8B} --max-position-embeddings 32768 {_BLOCKS_OF_4}",
    # Gen-Verse/TraDo-8B-Instruct and -Thinking, trained from it.
    "trado_8b": f"{_QWEN3_8B} --max-position-embeddings 32768 {_BLOCKS_OF_4}",
    # Autoregressive models to start from, which predict the next position; the mask token is the
    # first row of the vocabulary without a token, or one that no text uses.
    "qwen3_8b": f"{_QWEN3_8B} --max-position-embeddings 40960 --logit-shift",
    "qwen2_7b": (
        "--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28 "
        "--group-query-attention --num-query-groups 4 --add-qkv-bias "
        "--max-position-embeddings 131072 --rotary-base 1000000 --norm-epsilon 1e-6 "
        "--vocab-size 152064 --mask-token-id 151665 --stop-token-ids 151643 151645 "
        f"--logit-shift {_COMMON}"
    ),
    "llama3_8b": (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--group-query-attention --num-query-groups 8 --use-rope-scaling --rope-scaling-factor 8 "
        "--max-position-embeddings 131072 --rotary-base 500000 --norm-epsilon 1e-5 "
        "--vocab-size 128256 --mask-token-id 128002 --stop-token-ids 128001 128009 "
        f"--logit-shift {_COMMON}"
    ),
}


def expand_preset(argv: list[str]) -> list[str]:
    """Put a preset's flags in front of the command line that names it.

    Args:
        argv: command-line arguments without the program name; ``--preset NAME`` is kept, and the
            last one counts.

    Returns:
        The preset's flags followed by ``argv``.

    Raises:
        UserError: for an unknown preset.
    """
    if not any(argument.partition("=")[0] == "--preset" for argument in argv):
        return argv
    name = last_value(argv, "--preset") or ""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}.")
    return [*PRESETS[name].split(), *argv]

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

_MIXTURE = (
    "--hidden-size 2048 --num-attention-heads 16 --qk-layernorm --moe-router-topk 8 "
    "--vocab-size 157184 --mask-token-id 156895 --stop-token-ids 156892 "
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
    # inclusionAI/LLaDA2.0-mini and LLaDA2.1-mini: 16 billion weights, of which a token passes 1.4.
    "llada2_mini": (
        f"{_MIXTURE} --num-layers 20 --ffn-hidden-size 5120 --group-query-attention "
        "--num-query-groups 4 --max-position-embeddings 32768 "
        "--rotary-base 600000 --rotary-percent 0.5 --norm-epsilon 1e-6 --num-experts 256 "
        "--moe-layer-freq [0]+[1]*19 --moe-ffn-hidden-size 512 "
        "--moe-shared-expert-intermediate-size 512 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-num-groups 8 --moe-router-group-topk 4 "
        "--moe-router-topk-scaling-factor 2.5 --attention-mask block-causal --block-size 32 "
        f"{_COMMON}"
    ),
    # inclusionAI/LLaDA-MoE-7B-A1B-Base and -Instruct: full attention, a mixture in every layer.
    "llada_moe_7b": (
        f"{_MIXTURE} --num-layers 16 --ffn-hidden-size 8192 --max-position-embeddings 8192 "
        "--rotary-base 50000 --norm-epsilon 1e-5 --num-experts 64 --moe-layer-freq [1]*16 "
        "--moe-ffn-hidden-size 1024 --moe-router-score-function softmax --moe-router-pre-softmax "
        f"{_COMMON}"
    ),
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

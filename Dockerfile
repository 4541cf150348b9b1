# NVIDIA's PyTorch image brings CUDA, NCCL, PyTorch, Transformer Engine and apex, built for each other.
# Of the images, one whose Transformer Engine is 2.8 or newer.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# For the sandbox of generated code (--espo-task code).
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 espo
WORKDIR /opt/megatron_espo
COPY --chown=espo:espo . .
# The image's torch, Transformer Engine and apex stay: only what is missing is installed.
RUN pip install --no-cache-dir --no-build-isolation "megatron-core==0.19.*" \
        "transformers>=5.0" "tokenizers>=0.21" "safetensors>=0.4" "math-verify[antlr4_13_2]==0.9.*" \
        "tensorboard>=2.16" "nvidia-ml-py>=12.535" "matplotlib>=3.8" "pillow>=10" "rich>=13" \
        "huggingface_hub>=0.30" "pyarrow>=17" \
        omegaconf flask-restful sentencepiece tiktoken wandb accelerate \
    && pip install --no-cache-dir --no-build-isolation --no-deps -e . \
    && python -c "import megatron.core, megatron.training, transformer_engine, megatron_espo" \
    && chown espo:espo .
USER espo
# NVIDIA's entry point sets up CUDA's compatibility libraries; then the machine is checked, and the
# command runs if nothing is wrong.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "python", "-m", "megatron_espo.doctor", "--then"]
CMD ["bash"]

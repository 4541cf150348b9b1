"""The bidirectional masked-diffusion GPT: layer specs, presets and construction."""

"""Files into models: CogVideoX checkpoints and LoRAs, safetensors only; every error is a sentence."""

"""From files to models: CogVideoX checkpoints and LoRAs, safetensors only. Every error is a sentence."""

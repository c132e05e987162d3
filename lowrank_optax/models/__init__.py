"""A decoder of the Llama family, for the examples and the planner; a vision transformer."""

from lowrank_optax.models.block_sharing import share_blocks, unshare_blocks
from lowrank_optax.models.decoder import Decoder
from lowrank_optax.models.decoder_config import PRESETS, DecoderConfig, decoder_config
from lowrank_optax.models.generation import generate
from lowrank_optax.models.huggingface import load_huggingface, save_huggingface
from lowrank_optax.models.rotary import RopeScaling
from lowrank_optax.models.vision import WideNetViT
from lowrank_optax.storage.safetensors_files import CheckpointMismatchError

__all__ = [
    "PRESETS",
    "CheckpointMismatchError",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "WideNetViT",
    "decoder_config",
    "generate",
    "load_huggingface",
    "save_huggingface",
    "share_blocks",
    "unshare_blocks",
]

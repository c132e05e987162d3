"""What Hugging Face calls the modules of the Llama family's decoder."""

OUTER_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
BLOCK_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

# By path, `{}` standing for the number of a layer: what `adapters.save_peft` reads.
MODULE_NAMES = OUTER_MODULES | {
    f"blocks/{{}}/{ours.replace('.', '/')}": f"model.layers.{{}}.{theirs}"
    for ours, theirs in BLOCK_MODULES.items()
}

"""Folders of the peft package, folded here: weights and outputs are those of the package."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import cli
from lowrank_optax.models import load_huggingface

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOKENS = np.arange(12).reshape(2, 6) * 5 % 32
# Square with a bias, wide with a bias, tall and wide without.
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Qwen2 in a folder: biases on query, key and value."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                x.normal_()
    model.save_pretrained(folder)
    return folder


def torch_base(base):
    return transformers.Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


CASES = {
    "adalora": ("AdaLoraConfig", {"init_r": 3, "lora_alpha": 5, "total_step": 9, "bias": "all"}),
    "loha": (
        "LoHaConfig",
        {"r": 2, "alpha": 5, "rank_pattern": {r"0\.self_attn\.q_proj": 3, "up_proj": 4}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5, "alpha_pattern": {"v_proj": 3}}),
    "lokr_both": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr_factor": ("LoKrConfig", {"r": 3, "alpha": 2, "decompose_factor": 3}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "bias": "oft_only"}),
    "oft_nearest": ("OFTConfig", {"oft_block_size": 7, "num_cayley_neumann_terms": 3}),
    "oft_exact": ("OFTConfig", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft_shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "oft_coft": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    "miss": ("MissConfig", {"r": 3, "bias": "all"}),
    "miss_mini": ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "miss_bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "vera": ("VeraConfig", {"r": 5, "modules_to_save": ["norm", "lm_head"]}),
    "vera_head": (
        "VeraConfig",
        {"r": 5, "target_modules": ["q_proj", "lm_head"], "bias": "vera_only"},
    ),
    "randlora": ("RandLoraConfig", {"r": 3, "randlora_alpha": 7}),
    "randlora_sparse": ("RandLoraConfig", {"r": 16, "randlora_alpha": 4, "sparse": True}),
}


def adapted(base, case):
    """A model of PEFT whose every trained tensor has moved."""
    kind, options = CASES[case]
    theirs = peft.get_peft_model(torch_base(base), getattr(peft, kind)(**(SOME | options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in theirs.parameters():
            if x.requires_grad:
                x.add_(0.3 * torch.randn(x.shape, generator=generator))
    if case == "adalora":
        prune(theirs)
    return theirs.eval()


def prune(theirs):
    """Directions of AdaLoRA go, all of one layer; the file has those that are left."""
    pattern = {}
    for number, (name, x) in enumerate(theirs.base_model.model.named_parameters()):
        if "lora_E" in name:
            kept = [False] * 3 if not pattern else [number % 2 == 0, True, False]
            pattern[name] = kept
            x.data[~torch.tensor(kept)] = 0
    theirs.peft_config["default"].rank_pattern = pattern


def tensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_command_and_fold_peft_give_the_weights_and_outputs_of_peft(base, tmp_path, case):
    theirs = adapted(base, case)
    theirs.save_pretrained(tmp_path / "a")
    expected = torch_logits(theirs)
    model = load_huggingface(base)
    assert abs(model(TOKENS) - expected).max() > 1e-2  # the adapter does something
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(base)]
    assert cli.main([*arguments, "--merge"]) == 0
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, merged = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == merged.keys()
    for name, x in merged.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-5, err_msg=name)
    lro.adapters.fold_peft(model, tmp_path / "a")
    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["ia3", "randlora", "vera"])
def test_layers_that_are_not_stacked_are_folded_the_same(base, tmp_path, case):
    theirs = adapted(base, case)
    theirs.save_pretrained(tmp_path / "a")
    model = load_huggingface(base, scan_layers=False)
    lro.adapters.fold_peft(model, tmp_path / "a")
    np.testing.assert_allclose(model(TOKENS), torch_logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["adalora", "miss", "miss_mini", "vera", "vera_head"])
def test_kinds_of_low_rank_become_plain_loras(base, tmp_path, case):
    theirs = adapted(base, case)
    theirs.save_pretrained(tmp_path / "a")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--plain-lora"]
    without = cli.main(arguments)
    assert without == (0 if case == "adalora" else 1)
    assert cli.main([*arguments, "--base", str(base)]) == 0
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "b").eval()
    np.testing.assert_allclose(torch_logits(again), torch_logits(theirs), rtol=0, atol=1e-4)
    model = lro.adapters.load_peft(load_huggingface(base), tmp_path / "b")
    np.testing.assert_allclose(model(TOKENS), torch_logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", ["vera", "vera_head"])
def test_vera_of_peft_is_attached_and_written_again(base, tmp_path, case, scan_layers):
    theirs = adapted(base, case)
    theirs.save_pretrained(tmp_path / "a")
    expected = torch_logits(theirs)
    model = load_huggingface(base, scan_layers=scan_layers)
    lro.adapters.load_peft(model, tmp_path / "a")
    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=1e-4)
    lro.adapters.save_peft(model, tmp_path / "b", as_lora=False)
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "b").eval()
    np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=1e-4)


def test_vera_of_one_shape_is_vera_in_peft(base, tmp_path):
    model = load_huggingface(base)
    lro.adapters.attach(model, lro.adapters.VeRA(rank=6, dropout=0.1), "query", rngs=0)
    vectors = model.blocks.attention.query.adapters["default"].arrays
    for name in "db":
        values = np.random.default_rng(0).normal(size=vectors[name].shape)
        vectors[name].set_value(jnp.asarray(values, jnp.float32))
    model.eval()
    lro.adapters.save_peft(model, tmp_path / "a", base_model=str(base))
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "a").eval()
    assert again.peft_config["default"].peft_type == "VERA"
    assert again.peft_config["default"].vera_dropout == 0.1
    assert abs(model(TOKENS) - load_huggingface(base)(TOKENS)).max() > 1e-2
    np.testing.assert_allclose(torch_logits(again), model(TOKENS), rtol=0, atol=1e-4)

"""Files of the peft package load here and give its outputs, and the other way round."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import cli
from lowrank_optax.adapters.peft.loading import load_peft
from lowrank_optax.adapters.peft.saving import save_peft
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
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama in a folder; grouped heads, an MLP that is not square."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def torch_base(base):
    return transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(base, scan_layers=True):
    return load_huggingface(base, scan_layers=scan_layers)


def agree(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


def randomize(model):
    """Every trained tensor moves: factors at random, others a little."""
    generator = torch.Generator().manual_seed(1)
    for name, x in model.named_parameters():
        if not x.requires_grad:
            continue
        noise = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            if "lora_A" in name or "lora_B" in name or "embedding_" in name:
                x.copy_(0.3 * noise + (0 if "pissa" not in str(model.peft_config) else x))
            else:
                x.add_(0.2 * noise)


PEFT_CASES = {
    "list": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
    "regex_and_patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r"model\.layers\.\d+\.(self_attn\.(q|o)_proj|mlp\.down_proj)",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4, "down_proj": 3},
        "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 7, "o_proj": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "pissa": {"r": 2, "lora_alpha": 5, "init_lora_weights": "pissa", "target_modules": ["v_proj"]},
    "embedding": {"r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "o_proj"]},
    "modules_to_save": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["k_proj"],
        "modules_to_save": ["lm_head", "model.norm"],
    },
    "embedding_to_save": {
        "r": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "some_layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 2],
    },
    "excluded": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["v_proj"],
    },
}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_of_peft_gives_its_outputs(base, tmp_path, case, scan_layers):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])
    theirs = peft.get_peft_model(torch_base(base), config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    expected = torch_logits(theirs)
    model = ours(base, scan_layers)
    assert abs(model(TOKENS) - expected).max() > 1e-2  # the adapter does something
    load_peft(model, tmp_path / "a")
    agree(model(TOKENS), expected)


@pytest.mark.parametrize("case", ["regex_and_patterns", "rslora", "dora", "pissa", "some_layers"])
def test_saved_again_an_adapter_of_peft_is_what_it_was(base, tmp_path, case):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])
    theirs = peft.get_peft_model(torch_base(base), config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    model = ours(base)
    load_peft(model, tmp_path / "a")
    save_peft(model, tmp_path / "b", as_lora=False, base_model=str(base))
    from safetensors.numpy import load_file

    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "b").eval()
    agree(torch_logits(again), torch_logits(theirs))


OUR_CASES = {
    "lora": ("LoRA", {}, {}),
    "rslora": ("LoRA", {"rank_stabilized": True}, {}),
    "lora_as_lora": ("LoRA", {}, {"as_lora": True}),
    "lora_fa": ("LoRAFA", {}, {}),
    "dora": ("DoRA", {}, {}),
    "lotr": ("LoTR", {}, {}),
    "lamda": ("LaMDA", {}, {}),
    "aflora": ("AFLoRA", {}, {}),
    "svfit": ("SVFit", {"alpha": None}, {}),
    "sora": ("SoRA", {}, {}),
    "prilora": ("PRILoRA", {}, {}),
    "pissa": ("PiSSA", {}, {}),
    "pissa_without_residual": ("PiSSA", {"residual": False}, {}),
    "pissa_as_pissa": ("PiSSA", {}, {"as_lora": False}),
}


def disturb(model):
    """Trained arrays move, as if they had been trained."""
    state = nnx.state(model, lro.adapters.trainable)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(treedef, moved))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", OUR_CASES)
def test_an_adapter_of_ours_gives_its_outputs_in_peft(base, tmp_path, case, scan_layers):
    name, options, how = OUR_CASES[case]
    method = getattr(lro.adapters, name)(**({"rank": 2, "alpha": 5} | options))
    model = ours(base, scan_layers)
    lro.adapters.attach(model, method, "query|value|down", rngs=3)
    disturb(model)
    assert abs(model(TOKENS) - ours(base)(TOKENS)).max() > 1e-3
    save_peft(model, tmp_path / "a", base_model=str(base), **how)
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "a").eval()
    agree(torch_logits(theirs), model(TOKENS))
    again = load_peft(ours(base, not scan_layers), tmp_path / "a")
    agree(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("where", ["query|embed", "output|lm_head"])
def test_ranks_embeddings_and_trained_parameters_of_ours_are_in_peft(base, tmp_path, where):
    model = ours(base)
    method = lro.adapters.LoRA(rank=2, alpha=5, initial="random")
    ranks = {"query|output": (1, 4, 2)}
    lro.adapters.attach(model, method, where, rngs=3, rank_pattern=ranks)
    trained = "norm/scale" if "lm_head" in where else "norm/scale|lm_head"
    lro.adapters.also_train(model, trained)
    disturb(model)
    save_peft(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "a").eval()
    agree(torch_logits(theirs), model(TOKENS))
    agree(load_peft(ours(base), tmp_path / "a")(TOKENS), model(TOKENS))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_compacted_adapter_has_ranks_of_its_own_in_peft(base, tmp_path, scan_layers):
    model = ours(base, scan_layers)
    lro.adapters.attach(model, lro.adapters.SoRA(rank=4, alpha=5), "query|value", rngs=3)
    disturb(model)
    thresholded = lambda path, x: jnp.where(abs(x) < 1, 0, x) if "gate" in str(path) else x
    state = nnx.state(model, lro.adapters.trainable)
    nnx.update(model, jax.tree_util.tree_map_with_path(thresholded, state))
    expected = model(TOKENS)
    assert abs(expected - ours(base)(TOKENS)).max() > 1e-3
    rows = lro.adapters.compact(model).rows
    ranks = [rank for row in rows for rank in row.ranks]
    assert len(ranks) == 2 * LAYERS
    assert min(ranks) < max(ranks)
    save_peft(model, tmp_path / "a", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "a").eval()
    agree(torch_logits(theirs), expected)
    numbers = sum(x.numel() for name, x in theirs.named_parameters() if "lora_" in name)
    sizes = {"query": 16 + 16, "value": 16 + 8}
    assert numbers == sum(sizes[row.path.rpartition("/")[2]] * sum(row.ranks) for row in rows)


@pytest.mark.parametrize("case", ["regex_and_patterns", "dora", "pissa", "modules_to_save"])
def test_the_command_merges_as_peft_does(base, tmp_path, case, capsys):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])
    theirs = peft.get_peft_model(torch_base(base), config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    expected = torch_logits(theirs)
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(base)]
    assert cli.main([*arguments, "--merge"]) == 0, capsys.readouterr().err
    agree(torch_logits(torch_base(tmp_path / "m")), expected)
    agree(ours(tmp_path / "m")(TOKENS), expected)


@pytest.mark.parametrize("case", ["regex_and_patterns", "rslora", "pissa", "embedding"])
def test_the_command_writes_plain_loras(base, tmp_path, case):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])
    theirs = peft.get_peft_model(torch_base(base), config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--plain-lora"]
    assert cli.main([*arguments, "--base", str(base)]) == 0
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "b").eval()
    agree(torch_logits(again), torch_logits(theirs))


def test_a_bfloat16_file_loads(base, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES["list"])
    theirs = peft.get_peft_model(torch_base(base), config)
    randomize(theirs)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    model = load_peft(ours(base), tmp_path / "a")
    arrays = model.blocks.attention.query.adapters["default"].arrays
    assert arrays["A"].dtype == jnp.float32
    weight = theirs.base_model.model.model.layers[1].self_attn.q_proj.lora_A.default.weight
    assert (np.asarray(arrays["A"][1]) == weight.float().detach().numpy().T).all()


class Torch(torch.nn.Module):
    """A convolution and one of GPT-2's layers, whose weight is stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, (2, 3))
        self.fc = transformers.pytorch_utils.Conv1D(6, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Flax(nnx.Module):
    def __init__(self, like):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (2, 3), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(4, 6, rngs=rngs)
        array = lambda x: jnp.asarray(x.detach().numpy())
        self.conv.kernel.set_value(array(like.conv.weight).transpose(2, 3, 1, 0))
        self.conv.bias.set_value(array(like.conv.bias))
        self.fc.kernel.set_value(array(like.fc.weight))
        self.fc.bias.set_value(array(like.fc.bias))

    def __call__(self, x):
        return self.fc(self.conv(x).mean((1, 2)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_and_gpt2s_layers_of_peft_give_its_outputs(tmp_path, use_dora):
    torch.manual_seed(0)
    model = Torch()
    ours = Flax(model)
    names = {"conv": "conv", "fc": "fc"}
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["conv", "fc"], use_dora=use_dora, bias="all"
    )
    theirs = peft.get_peft_model(model, config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 6)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    load_peft(ours, tmp_path / "a", names=names)
    agree(ours(x.transpose(0, 2, 3, 1)), expected)
    save_peft(ours, tmp_path / "b", names=names, task_type=None)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Torch(), tmp_path / "b").eval()
    with torch.no_grad():
        agree(again(torch.tensor(x)).numpy(), expected)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A Llama whose head is its embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, initializer_range=0.3, tie_word_embeddings=True
    )
    folder = tmp_path_factory.mktemp("tied")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", ["embed_tokens", "lm_head", "target"])
def test_adapters_of_tied_embeddings_give_pefts_outputs_or_are_refused(tied, tmp_path, what):
    fields = {"target_modules": ["q_proj"], "modules_to_save": [what]}
    if what == "target":
        fields = {"target_modules": ["q_proj", "embed_tokens"]}
    for ensure in (False, True):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=5, ensure_weight_tying=ensure, **fields
        )
        theirs = peft.get_peft_model(torch_base(tied), config)
        randomize(theirs)
        folder = tmp_path / str(ensure)
        theirs.eval().save_pretrained(folder)
        arguments = ["convert", str(folder), str(tmp_path / f"m{ensure}"), "--base", str(tied)]
        if ensure is (what == "target"):
            with pytest.raises(lro.adapters.UnsupportedConfigError, match=r"ensure_weight_tying"):
                load_peft(ours(tied), folder)
            assert cli.main([*arguments, "--merge"]) == 1
            continue
        model = load_peft(ours(tied), folder)
        agree(model(TOKENS), torch_logits(theirs))
        save_peft(model, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(torch_base(tied), tmp_path / "again").eval()
        agree(torch_logits(again), torch_logits(theirs))
        # A LoRA of the table alone has no place in a model with one table.
        assert cli.main([*arguments, "--merge"]) == int(what == "target")
        if what != "target":
            agree(torch_logits(torch_base(tmp_path / f"m{ensure}")), torch_logits(theirs))
        lro.adapters.detach(model)
        agree(model(TOKENS), ours(tied)(TOKENS))


def test_a_trained_tied_embedding_of_ours_is_in_peft(tied, tmp_path):
    model = ours(tied)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), "query", rngs=3)
    lro.adapters.also_train(model, "embed")
    disturb(model)
    save_peft(model, tmp_path / "a", base_model=str(tied))
    theirs = peft.PeftModel.from_pretrained(torch_base(tied), tmp_path / "a").eval()
    agree(torch_logits(theirs), model(TOKENS))


def test_two_adapters_with_heads_of_their_own_are_switched_as_in_peft(base, tmp_path):
    theirs = None
    for name in "ab":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        if theirs is None:
            theirs = peft.get_peft_model(torch_base(base), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        theirs.set_adapter(name)
        randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = ours(base)
    for name in "ab":
        load_peft(model, tmp_path / name, name=name)
    for name in "aba":
        lro.adapters.activate(model, name)
        theirs.set_adapter(name)
        agree(model(TOKENS), torch_logits(theirs))
    with lro.adapters.disabled(model), theirs.disable_adapter():
        agree(model(TOKENS), torch_logits(theirs))


@pytest.mark.parametrize("other_head", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_head_of_peft_gives_its_outputs(base, tmp_path, use_dora, other_head):
    targets = ["lm_head", "q_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, use_dora=use_dora)
    model = torch_base(base)
    if other_head:
        model.lm_head.weight.data = 0.3 - 2 * model.lm_head.weight.data
    theirs = peft.get_peft_model(model, config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    # What PEFT makes of the folder: its DoRA keeps no norms of another base.
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "a").eval()
    agree(load_peft(ours(base), tmp_path / "a")(TOKENS), torch_logits(theirs))
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(base)]
    assert cli.main([*arguments, "--merge"]) == 0
    agree(torch_logits(torch_base(tmp_path / "m")), torch_logits(theirs))


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_command_merges_gpt2_as_peft_does(tmp_path, use_dora):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=12, initializer_range=0.3
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=5, use_dora=use_dora, bias="all",
        target_modules=["c_attn", "c_proj", "c_fc"],
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    expected = torch_logits(theirs)
    arguments = [str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(tmp_path / "base")]
    assert cli.main(["convert", *arguments, "--merge"]) == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    agree(torch_logits(merged), expected)
    if use_dora:
        return
    arguments = [str(tmp_path / "a"), str(tmp_path / "p"), "--base", str(tmp_path / "base")]
    assert cli.main(["convert", *arguments, "--plain-lora"]) == 0
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "p").eval()
    agree(torch_logits(plain), expected)

"""LoRA of stacks of experts (``target_parameters``) agrees with the peft package."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import fold_peft, load_peft, save_peft
from tests.adapters.expert_layers import INPUTS, NAMES, SIDES, Model, adapted, kernels, output
from tests.adapters.peft_files import read

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PEFT says of patterns that mean parameters that they are ignored, and applies them.
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
EXPERT_NAMES = [f"experts.{name}_proj" for name in SIDES]


class Experts(torch.nn.Module):
    """The experts' parameters, ``[experts, in, out]`` where PEFT is told so, as of gpt-oss."""

    def __init__(self, layer, weights, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        for name in SIDES:
            weight = torch.tensor(weights[name][layer])
            weight = weight if is_transposed else weight.transpose(1, 2).contiguous()
            setattr(self, f"{name}_proj", torch.nn.Parameter(weight))

    def forward(self, x):
        weight = lambda w: w if self.is_transposed else w.transpose(1, 2)
        gate = torch.tanh(x @ weight(self.gate_proj))
        return (gate * (x @ weight(self.up_proj)) @ weight(self.down_proj)).sum(0)


class Layer(torch.nn.Module):
    def __init__(self, ours, layer, weights, is_transposed):
        super().__init__()
        self.experts = Experts(layer, weights, is_transposed)
        kernel = ours.layers[layer].mix.kernel[...]
        self.mix = torch.nn.Linear(*kernel.shape, bias=False)
        self.mix.weight.data = torch.tensor(np.asarray(kernel).T)

    def forward(self, x):
        return x + self.mix(self.experts(x))


class Torch(torch.nn.Module):
    """PyTorch's model with the weights of ours."""

    def __init__(self, is_transposed=False):
        super().__init__()
        ours = Model(False)
        layers = [Layer(ours, i, kernels(ours), is_transposed) for i in range(len(ours.layers))]
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    def forward(self, x):
        for layer in self.model["layers"]:
            x = layer(x)
        return x


def torch_output(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(INPUTS)).numpy()


def agree(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5)


def of_peft(folder, is_transposed=False, **fields):
    """A random adapter of PEFT in a folder."""
    fields = {"r": 2, "lora_alpha": 5, "target_modules": [], **fields}
    theirs = peft.get_peft_model(Torch(is_transposed), peft.LoraConfig(**fields))
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def randomize(theirs):
    generator = torch.Generator().manual_seed(1)
    for x in theirs.parameters():
        if x.requires_grad:
            x.data = 0.3 * torch.randn(x.shape, generator=generator)


CASES = {
    "all": {"target_parameters": EXPERT_NAMES},
    "one": {"target_parameters": ["experts.up_proj"]},
    "two_in_another_order": {"target_parameters": ["down_proj", "gate_proj"]},
    "layers_of_their_own": {
        "target_parameters": ["model.layers.0.experts.down_proj", "layers.1.experts.up_proj"],
        "use_rslora": True,
    },
    "ranks": {
        "target_parameters": EXPERT_NAMES,
        "target_modules": ["mix"],
        "rank_pattern": {r"layers\.1\.experts\.gate_proj": 3, "down_proj": 1},
        "alpha_pattern": {r"layers\.0\.experts\.up_proj": 7, "mix": 4},
    },
}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_experts_of_peft_give_its_outputs_and_its_file_again(tmp_path, case, is_transposed):
    theirs = of_peft(tmp_path / "a", is_transposed, **CASES[case])
    expected = torch_output(theirs)
    assert abs(output(Model(False)) - expected).max() > 1e-2  # the adapter does something
    for stacked in (False, True):
        model = load_peft(Model(stacked), tmp_path / "a", names=NAMES)
        agree(output(model), expected)
        agree(output(fold_peft(Model(stacked), tmp_path / "a", names=NAMES)), expected)
        save_peft(model, tmp_path / "b", names=NAMES, task_type=None)
        (_, first), (_, second) = read(tmp_path / "a"), read(tmp_path / "b")
        assert first.keys() == second.keys()
        assert all((first[k] == second[k]).all() for k in first)
    again = peft.PeftModel.from_pretrained(Torch(is_transposed), tmp_path / "b")
    agree(torch_output(again), expected)
    agree(torch_output(again.merge_and_unload()), expected)


def with_inner_layer():
    """`Torch`, with the linear layer inside the module whose parameters are adapted."""
    model = Torch()
    for layer in model.model["layers"]:
        layer.experts.inner, layer.mix = layer.mix, torch.nn.Identity()
        layer.experts.register_forward_hook(lambda experts, _, y: experts.inner(y))
    return model


def test_layers_inside_a_module_of_parameters_have_pefts_names(tmp_path):
    names = NAMES | {"layers/{}/mix": "model.layers.{}.experts.inner"}
    fields = {"target_parameters": EXPERT_NAMES, "target_modules": ["inner"], "r": 2}
    theirs = peft.get_peft_model(with_inner_layer(), peft.LoraConfig(**fields))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = load_peft(Model(False), tmp_path / "a", names=names)
    agree(output(model), torch_output(theirs))
    save_peft(model, tmp_path / "b", names=names, task_type=None)
    again = peft.PeftModel.from_pretrained(with_inner_layer(), tmp_path / "b")
    agree(torch_output(again), torch_output(theirs))


OURS = {
    "lora": (lro.adapters.LoRA(rank=2, alpha=5, initial="random"), "experts", {}),
    "some": (lro.adapters.LoRA(rank=2, alpha=5, rank_stabilized=True), "up|down|mix", {}),
    "as_lora": (lro.adapters.PiSSA(rank=2), "experts", {}),
    "ranks": (
        lro.adapters.LoRA(rank=2, alpha=5),
        "experts",
        {"rank_pattern": {"gate": (1, 1, 1, 3, 3, 3), "down": (1, 3, 2, 4, 1, 1)}},
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_experts_of_ours_give_their_outputs_in_peft(tmp_path, case):
    method, where, options = OURS[case]
    model = adapted(True, method, where, **options)
    expected = output(model)
    assert abs(output(Model(True)) - expected).max() > 1e-2
    save_peft(model, tmp_path, names=NAMES, task_type=None)
    for is_transposed in (False, True):
        theirs = peft.PeftModel.from_pretrained(Torch(is_transposed), tmp_path)
        agree(torch_output(theirs), expected)
    agree(output(load_peft(Model(False), tmp_path, names=NAMES)), expected)


def test_the_expert_is_the_slow_index_of_pefts_a_and_the_fast_one_of_its_b(tmp_path):
    theirs = of_peft(tmp_path, target_parameters=["experts.down_proj", "experts.gate_proj"])
    config, tensors = read(tmp_path)
    assert config["target_modules"] == []
    expert_module = "base_model.model.model.layers.0.experts"
    outer, inner = (
        [tensors[f"{expert_module}{at}.lora_{x}.weight"] for x in "AB"]
        for at in ("", ".base_layer")
    )
    before = Torch().model["layers"][0].experts
    after = theirs.merge_and_unload().model["layers"][0].experts
    for (a, b), name in ((inner, "gate_proj"), (outer, "down_proj")):
        a, b = a.reshape(3, 2, -1), b.reshape(len(b), 2, 3)
        change = 2.5 * np.einsum("ore,eri->eoi", b.astype(np.float64), a)
        own = (getattr(after, name) - getattr(before, name)).detach().numpy()
        np.testing.assert_allclose(own, change, rtol=0, atol=3e-6)


@pytest.mark.parametrize("targets", [EXPERT_NAMES, EXPERT_NAMES[::-1]])
def test_wrappers_of_peft_are_nested_by_registration(targets):
    config = peft.LoraConfig(target_modules=[], target_parameters=targets)
    module = peft.get_peft_model(Torch(), config).base_model.model.model["layers"][0].experts
    found = []
    while hasattr(module, "parameter_name"):
        found.append(module.parameter_name)
        module = module.base_layer
    assert found == ["down_proj", "up_proj", "gate_proj"]  # from the outermost


class Stack(nnx.Module):
    """The experts of one layer of transformers' models; what reads them is not here."""

    def __init__(self, gate_up, down):
        layer = lambda w: nnx.Einsum("ebd,edf->ebf", w.shape, rngs=nnx.Rngs(0))
        self.gate_up, self.down = layer(gate_up), layer(down)
        self.gate_up.kernel.set_value(jnp.asarray(gate_up))
        self.down.kernel.set_value(jnp.asarray(down))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_of_transformers_models_are_folded_as_peft_does(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 6}}.get(kind, {})
    sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "vocab_size": 16}
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    is_transposed = kind == "gpt_oss"

    def weights(model):
        experts = model.model.layers[0].mlp.experts
        found = (experts.gate_up_proj, experts.down_proj)
        return [(x if is_transposed else x.mT).detach().numpy().copy() for x in found]

    before = weights(base)
    assert [x.shape for x in before] == [(3, 8, 12), (3, 6, 8)]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=MOE)
    theirs = peft.get_peft_model(base, config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    expected = weights(theirs.merge_and_unload())
    names = {f"layers/{{}}/{ours}": f"model.layers.{{}}.mlp.{n}" for ours, n in OURS_OF_MOE}
    ours = fold_peft(nnx.Dict(layers=nnx.List([Stack(*before)])), tmp_path, names=names)
    stack = ours["layers"][0]
    for layer, old, new in zip((stack.gate_up, stack.down), before, expected, strict=True):
        assert abs(new - old).max() > 0.1
        np.testing.assert_allclose(layer.kernel[...], new, rtol=0, atol=3e-6)


MOE = ["experts.down_proj", "experts.gate_up_proj"]
OURS_OF_MOE = [("gate_up", "experts.gate_up_proj"), ("down", "experts.down_proj")]

"""CLIP, T5 and the conditioning of SD3 against transformers and diffusers, with random weights."""

from types import SimpleNamespace

import pytest
import torch

from bench import peers
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.formats.notes import Note
from functional_sd3.text import bpe, clip, conditioning, t5, unigram

transformers = pytest.importorskip("transformers")


def our_clip(model) -> dict[str, torch.Tensor]:
    theirs = dict(model.named_parameters())
    ours = {f"{name}_embedding.weight": theirs[f"text_model.embeddings.{name}_embedding.weight"]
            for name in ("token", "position")}  # fmt: skip
    for i in range(model.config.num_hidden_layers):
        old, new = f"text_model.encoder.layers.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            ours[f"{new}.norm1.{kind}"] = theirs[f"{old}.layer_norm1.{kind}"]
            parts = [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{new}.attention.qkv.{kind}"] = torch.cat(parts)
            ours[f"{new}.attention.out.{kind}"] = theirs[f"{old}.self_attn.out_proj.{kind}"]
            ours[f"{new}.norm2.{kind}"] = theirs[f"{old}.layer_norm2.{kind}"]
            ours[f"{new}.mlp.in.{kind}"] = theirs[f"{old}.mlp.fc1.{kind}"]
            ours[f"{new}.mlp.out.{kind}"] = theirs[f"{old}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
    return ours | {"projection.weight": theirs["text_projection.weight"]}


def our_t5(model) -> dict[str, torch.Tensor]:
    theirs = dict(model.named_parameters())
    bias = theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    ours = {"embedding.weight": theirs["shared.weight"], "relative_bias.weight": bias}
    for i in range(model.config.num_layers):
        old, new = f"encoder.block.{i}.layer", f"blocks.{i}"
        ours[f"{new}.norm1.weight"] = theirs[f"{old}.0.layer_norm.weight"]
        parts = [theirs[f"{old}.0.SelfAttention.{part}.weight"] for part in "qkv"]
        ours[f"{new}.attention.qkv.weight"] = torch.cat(parts)
        ours[f"{new}.attention.out.weight"] = theirs[f"{old}.0.SelfAttention.o.weight"]
        ours[f"{new}.norm2.weight"] = theirs[f"{old}.1.layer_norm.weight"]
        gates = [theirs[f"{old}.1.DenseReluDense.wi_{part}.weight"] for part in (0, 1)]
        ours[f"{new}.mlp.in.weight"] = torch.cat(gates)
        ours[f"{new}.mlp.out.weight"] = theirs[f"{old}.1.DenseReluDense.wo.weight"]
    return ours | {"final_norm.weight": theirs["encoder.final_layer_norm.weight"]}


@torch.no_grad()
def randomise(model):
    """Weights as transformers draws them; norms and biases, which it starts at ones and zeros, made to matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def params_of(flat: dict[str, torch.Tensor]):
    return tree.unflatten_paths({path: tensor.detach() for path, tensor in flat.items()})


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def texts(vocab: int, eos: int, length: int = 77) -> torch.Tensor:
    """Four rows of ids: the end token early, twice, last, and followed by padding with itself."""
    ids = torch.randint(0, vocab - 2, (4, length), generator=torch.Generator().manual_seed(1))
    ids[0, 9], ids[1, 5], ids[1, 15], ids[2, -1] = eos, eos, eos, eos
    ids[3, 12:] = eos
    return ids


CLIPS = {
    "clip_l": (clip.Config(vocab=1000, layers=2, eos_id=2), 999),
    "clip_g": (clip.Config(1000, 77, 1280, 2, 20, 5120, "gelu", 1280, eos_id=2), 999),
    "small, first end token": (clip.Config(300, 77, 48, 4, 3, 100, "gelu", 40, eos_id=250), 250),
    "small, highest id": (clip.Config(300, 77, 48, 4, 3, 100, "quick_gelu", 40, eos_id=2), 299),
}
T5S = {
    "true width": t5.Config(vocab=300, width=4096, layers=1),
    "small": t5.Config(300, 96, 4, 5, 16, 160),
    "other buckets": t5.Config(300, 64, 2, 4, 16, 96, buckets=16, max_distance=40),
}


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_all_four_clip_outputs_equal_transformers(name):
    config, eos = CLIPS[name]
    model = randomise(peers.clip_module(config))
    ids = texts(config.vocab, eos)
    theirs = model(ids, output_hidden_states=True)
    pooled = model.text_model(ids).pooler_output
    ours = clip.apply(params_of(our_clip(model)), config, ids)
    assert error(ours.last, theirs.last_hidden_state) <= 1e-5
    assert error(ours.penultimate, theirs.hidden_states[-2]) <= 1e-5
    assert error(ours.pooled, pooled) <= 1e-5
    assert error(ours.projected, theirs.text_embeds) <= 1e-5


@pytest.mark.parametrize("skip", [0, 1, 3])
@torch.no_grad()
def test_clip_skip_chooses_transformers_hidden_states(skip):
    config, eos = CLIPS["small, highest id"]
    model = randomise(peers.clip_module(config))
    ids = texts(config.vocab, eos, length=20)
    theirs = model(ids, output_hidden_states=True).hidden_states[-(skip + 2)]
    assert error(clip.apply(params_of(our_clip(model)), config, ids, skip=skip).penultimate, theirs) <= 1e-5


@pytest.mark.parametrize("name", T5S)
@torch.no_grad()
def test_t5_equals_transformers_with_and_without_a_mask(name):
    config = T5S[name]
    model = randomise(peers.t5_module(config))
    params = params_of(our_t5(model))
    # The distances beyond the last bucket are those of the small ones; at true width every token is 0.4 GFLOP.
    length = 40 if name == "true width" else 200
    ids = torch.randint(0, config.vocab, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(length)[None, :] < torch.tensor([[length], [13], [1]])
    assert error(t5.apply(params, config, ids), model(ids).last_hidden_state) <= 1e-5
    masked = model(ids, attention_mask=mask.long()).last_hidden_state
    assert error(t5.apply(params, config, ids, mask=mask), masked) <= 1e-5
    assert error(t5.apply(params, config, ids, mask=mask.long()), masked) <= 1e-5


def test_relative_buckets_equal_transformers_at_every_distance():
    distances = torch.arange(-600, 601)
    attention = transformers.models.t5.modeling_t5.T5Attention
    for buckets, max_distance in ((32, 128), (16, 40), (64, 512), (4, 20)):
        theirs = attention._relative_position_bucket(distances, True, buckets, max_distance)
        assert torch.equal(t5.relative_bucket(distances, buckets, max_distance), theirs)


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_clip_in_bfloat16_stays_near_float32(name):
    config, eos = CLIPS[name]
    params = params_of(our_clip(randomise(peers.clip_module(config))))
    ids = texts(config.vocab, eos)
    wide, narrow = (clip.apply(cast, config, ids) for cast in (params, tree.cast(params, torch.bfloat16)))
    for ours, exact in zip(narrow, wide, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, exact) <= 2e-2


@pytest.mark.parametrize("name", T5S)
@torch.no_grad()
def test_t5_in_bfloat16_stays_near_float32(name):
    config = T5S[name]
    params = params_of(our_t5(randomise(peers.t5_module(config))))
    ids = torch.randint(0, config.vocab, (2, 40), generator=torch.Generator().manual_seed(3))
    narrow = t5.apply(tree.cast(params, torch.bfloat16), config, ids)
    assert narrow.dtype == torch.bfloat16
    assert error(narrow, t5.apply(params, config, ids)) <= 2e-2


@pytest.mark.parametrize(
    ("module", "config", "build", "rename", "tensors", "parameters"),
    [
        (clip, clip.CLIP_L, peers.clip_module, our_clip, 197, 123_650_304),
        (clip, clip.CLIP_G, peers.clip_module, our_clip, 517, 694_659_840),
        (t5, t5.T5_XXL, peers.t5_module, our_t5, 219, 4_762_310_656),
    ],
    ids=["clip_l", "clip_g", "t5_xxl"],
)
def test_the_released_encoders_have_exactly_the_leaves_of_their_specs(
    module, config, build, rename, tensors, parameters
):
    with torch.device("meta"):
        model = build(config)
    assert len(list(model.parameters())) == tensors
    assert specs.check(module.spec(config), rename(model)) == []
    assert specs.count(module.spec(config)) == parameters == sum(leaf.numel() for leaf in model.parameters())
    assert tree.count(module.init(torch.zeros(2, dtype=torch.int64), config, device="meta")) == parameters


CLIP_L_CONFIG = clip.Config(49408, 77, 32, 3, 2, 64, "quick_gelu", 32, eos_id=2)
CLIP_G_CONFIG = clip.Config(49408, 77, 48, 4, 3, 96, "gelu", 48, eos_id=2)
T5_CONFIG = t5.Config(32128, 96, 2, 3, 16, 128)
TRANSFORMER = SimpleNamespace(context_width=96, pooled_width=80)
PROMPTS = ["a photo of a cat", "ein sehr langer Satz, " * 60, ""]


@pytest.fixture(scope="module")
def sd3(shared_data):
    """diffusers' pipeline of tiny random encoders, and our (params, config, tokenizers) of the same."""
    diffusers = pytest.importorskip("diffusers")
    folder = shared_data / "tokenizers"
    models = {
        "clip_l": randomise(peers.clip_module(CLIP_L_CONFIG)),
        "clip_g": randomise(peers.clip_module(CLIP_G_CONFIG)),
        "t5": randomise(peers.t5_module(T5_CONFIG)),
    }
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=96, caption_projection_dim=16,
        pooled_projection_dim=80, sample_size=8, pos_embed_max_size=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=models["clip_l"],
        text_encoder_2=models["clip_g"],
        text_encoder_3=models["t5"],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3"),
    )
    rename = {"clip_l": our_clip, "clip_g": our_clip, "t5": our_t5}
    params = {name: params_of(rename[name](model)) for name, model in models.items()}
    config = SimpleNamespace(clip_l=CLIP_L_CONFIG, clip_g=CLIP_G_CONFIG, t5=T5_CONFIG, transformer=TRANSFORMER)
    tokenizers = SimpleNamespace(
        clip_l=bpe.init(folder / "tokenizer"),
        clip_g=bpe.init(folder / "tokenizer_2"),
        t5=unigram.init(folder / "tokenizer_3" / "tokenizer.json"),
    )
    return pipe, (params, config, tokenizers)


@torch.no_grad()
def theirs_of(pipe, prompt, prompt_2=None, prompt_3=None, **options):
    context, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt_2, prompt_3, device="cpu", do_classifier_free_guidance=False, **options
    )
    return context, pooled


@pytest.mark.parametrize("length", [77, 256, 30])
def test_conditioning_equals_diffusers(sd3, length):
    pipe, (params, config, tokenizers) = sd3
    context, pooled = theirs_of(pipe, PROMPTS, max_sequence_length=length)
    ours = conditioning.apply(params, config, tokenizers, PROMPTS, t5_length=length)
    assert ours.context.shape == (3, 77 + length, 96)
    assert error(ours.context, context) <= 1e-5
    assert error(ours.pooled, pooled) <= 1e-5


def test_prompts_of_each_encoder_equal_diffusers(sd3):
    pipe, (params, config, tokenizers) = sd3
    second, third = ["one", "two", "three"], ["red", "green", "blue"]
    context, pooled = theirs_of(pipe, PROMPTS, second, third)
    ours = conditioning.apply(params, config, tokenizers, PROMPTS, prompts_2=second, prompts_3=third)
    assert error(ours.context, context) <= 1e-5
    assert error(ours.pooled, pooled) <= 1e-5


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_of_the_conditioning_equals_diffusers(sd3, skip):
    pipe, (params, config, tokenizers) = sd3
    context, pooled = theirs_of(pipe, PROMPTS, clip_skip=skip)
    ours = conditioning.apply(params, config, tokenizers, PROMPTS, clip_skip=skip)
    assert error(ours.context, context) <= 1e-5
    assert error(ours.pooled, pooled) <= 1e-5


def test_conditioning_without_t5_equals_diffusers(sd3, monkeypatch):
    pipe, (params, config, tokenizers) = sd3
    monkeypatch.setattr(pipe, "text_encoder_3", None)
    context, pooled = theirs_of(pipe, PROMPTS, max_sequence_length=40)
    without = {name: params[name] for name in ("clip_l", "clip_g")}
    with pytest.warns(Note, match="the text encoder T5 is missing"):
        ours = conditioning.apply(without, config, tokenizers, PROMPTS, t5_length=40)
    assert error(ours.context, context) <= 1e-5
    assert error(ours.pooled, pooled) <= 1e-5

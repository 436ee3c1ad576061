"""Masked loss, prior preservation, ControlNet and textual inversion as objectives; validation at fixed times."""

from functools import partial

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.flow import loss_weights, path
from functional_sd3.text import conditioning
from functional_sd3.training import flow_learners, objectives, validation
from functional_sd3.transformer import controlnet, mmdit
from functional_sd3.weights.model import Model
from tests import models

KEYS = prng.split(prng.key(3), 4)


def encoded(tiny) -> dict:
    """`tiny.batch` with its context and pooled, so that no encoder is read."""
    context, pooled = conditioning.encode(tiny.params, tiny.config, tiny.batch["ids"])
    return {"latents": tiny.batch["latents"], "context": context, "pooled": pooled}


def test_a_mask_of_ones_is_the_plain_loss_to_the_bit(tiny):
    loss = objectives.flow_loss(tiny.config)
    plain, metrics = loss(tiny.params, tiny.batch, KEYS)
    masked, same = loss(tiny.params, {**tiny.batch, "mask": torch.ones(4, 1, 4, 4)}, KEYS)
    assert torch.equal(plain, masked) and torch.equal(metrics["bin_loss"], same["bin_loss"])


def test_a_mask_weighs_the_squared_error_of_each_latent(tiny):
    batch = encoded(tiny)
    mask = prng.uniform(prng.key(9), (4, 1, 4, 4))
    value, _ = objectives.flow_loss(tiny.config)(tiny.params, {**batch, "mask": mask, "t": torch.full((4,), 0.3)}, KEYS)
    noise = prng.normal(prng.split(KEYS, 3)[:, 1], (16, 4, 4))
    x = path.interpolate(batch["latents"], noise, 0.3)
    velocity = mmdit.apply(
        tiny.params["transformer"], tiny.config.transformer, x, torch.full((4,), 0.3), batch["context"], batch["pooled"]
    )
    torch.testing.assert_close(value, (mask * (velocity - (noise - batch["latents"])).square()).mean())
    # What lies outside of a mask of zeros has no gradient.
    outside = {**batch, "mask": torch.zeros(4, 1, 4, 4)}
    grads = torch.func.grad(lambda p: objectives.flow_loss(tiny.config)(p, outside, KEYS)[0])(tiny.params)
    assert all(not leaf.any() for leaf in tree.leaves(grads))


def test_the_weight_of_times_and_of_samples_multiply(tiny):
    batch = {**encoded(tiny), "t": torch.tensor([0.2, 0.4, 0.6, 0.9]), "weight": torch.tensor([1.0, 0.0, 2.0, 0.5])}
    value, metrics = objectives.flow_loss(tiny.config, weight=loss_weights.min_snr)(tiny.params, batch, KEYS)
    alone = [
        objectives.flow_loss(tiny.config)(
            tiny.params,
            tree.map(lambda leaf, i=i: leaf[i : i + 1], {**batch, "weight": torch.ones(4)}),
            KEYS[i : i + 1],
        )[0]
        for i in range(4)
    ]
    expected = (torch.stack(alone) * batch["weight"] * loss_weights.min_snr(batch["t"])).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(metrics["bin_loss"].sum(), torch.stack(alone).mean())


def test_the_prior_is_added_to_the_subject_with_its_weight(tiny):
    batch = {**encoded(tiny), "prior": torch.tensor([0, 1, 0, 1])}
    loss = objectives.prior_loss(tiny.config, prior_weight=0.3, weight=loss_weights.data)
    value, metrics = loss(tiny.params, batch, KEYS)
    plain = objectives.flow_loss(tiny.config, weight=loss_weights.data)

    def mean_of(rows: list[int]):
        del batch["prior"]
        part, keys = tree.map(lambda leaf: leaf[rows], batch), KEYS[rows]
        batch["prior"] = torch.tensor([0, 1, 0, 1])
        return plain(tiny.params, part, keys)[0], objectives.flow_loss(tiny.config)(tiny.params, part, keys)[0]

    (subject, bare_subject), (prior, bare_prior) = mean_of([0, 2]), mean_of([1, 3])
    torch.testing.assert_close(value, subject + 0.3 * prior)
    torch.testing.assert_close(metrics["subject_loss"], bare_subject)
    torch.testing.assert_close(metrics["prior_loss"], bare_prior)
    halves = [loss(tiny.params, tree.map(lambda leaf, part=part: leaf[part], batch), KEYS[part])[0]
              for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
    torch.testing.assert_close(torch.stack(halves).mean(), value)
    for options in ({"prior_weight": 0.0}, {"prior_weight": float("inf")}, {"share": 1.0}, {"share": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            objectives.prior_loss(tiny.config, **options)


@pytest.fixture
def net(tiny):
    sizes = tiny.config.transformer
    config = controlnet.Config(
        depth=1, heads=sizes.heads, head_dim=sizes.head_dim, patch_size=1, context_width=32, pooled_width=32,
        position_size=4, sample_size=4, qk_norm=True,
    )  # fmt: skip
    return config, controlnet.from_transformer(prng.key(5), config, tiny.params["transformer"], sizes)


def test_a_fresh_controlnet_leaves_the_loss_and_learns(tiny, net):
    config, params = net
    batch = {**encoded(tiny), "control": prng.normal(prng.key(6), (4, 16, 4, 4))}
    loss = objectives.controlnet_loss(tiny.config, config)
    whole = {**tiny.params, "controlnet": params}
    plain, _ = objectives.flow_loss(tiny.config)(tiny.params, batch, KEYS)
    torch.testing.assert_close(loss(whole, batch, KEYS)[0], plain)
    grads = torch.func.grad(lambda own: loss({**tiny.params, "controlnet": own}, batch, KEYS)[0])(params)
    assert grads["residuals"][0]["weight"].abs().sum() > 0
    # The control image reaches the loss once the residuals are not zero.
    moved = {**params, "residuals": tree.map(lambda leaf: leaf + 0.1, params["residuals"])}
    grads = torch.func.grad(lambda own: loss({**tiny.params, "controlnet": own}, batch, KEYS)[0])(moved)
    assert grads["control_patch"]["weight"].abs().sum() > 0
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), moved)
    loss({**tiny.params, "controlnet": leaves}, batch, KEYS)[0].backward()
    torch.testing.assert_close(leaves["control_patch"]["weight"].grad, grads["control_patch"]["weight"])


def test_the_controlnets_loss_is_that_of_the_velocity_with_its_residuals(tiny, net):
    config, params = net
    params = tree.map(lambda leaf: leaf + 0.3 * prng.normal(prng.key(1), leaf.shape), params)
    pooled = prng.normal(prng.key(2), (4, 32))
    control = prng.normal(prng.key(6), (4, 16, 4, 4))
    batch = {**encoded(tiny), "pooled": pooled, "control": control, "t": torch.full((4,), 0.6)}
    value, _ = objectives.controlnet_loss(tiny.config, config)({**tiny.params, "controlnet": params}, batch, KEYS)
    noise = prng.normal(prng.split(KEYS, 3)[:, 1], (16, 4, 4))
    x = path.interpolate(batch["latents"], noise, 0.6)
    # A zero pooled embedding: `zero_pooled` of the config.
    inputs = x, batch["t"], batch["context"]
    residuals = controlnet.apply(params, config, *inputs, torch.zeros(4, 32), batch["control"])
    velocity = mmdit.apply(
        tiny.params["transformer"], tiny.config.transformer, *inputs, batch["pooled"], residuals=residuals
    )
    torch.testing.assert_close(value, (velocity - (noise - batch["latents"])).square().mean())


def test_the_loss_of_a_words_vectors_is_that_of_the_model_with_the_word(tiny):
    # The ids 38 and 39 are of the vectors: tables of 40 rows of which 38 have tokens.
    vectors = {name: prng.normal(prng.key(7), (2, getattr(tiny.config, name).width)) for name in ("clip_l", "t5")}
    loss = objectives.inversion_loss(tiny.config, tiny.params, {"clip_l": 38, "t5": 38})
    value, _ = loss(vectors, tiny.batch, KEYS)

    def replaced(vectors):
        params = dict(tiny.params)
        for name, table in (("clip_l", "token_embedding"), ("t5", "embedding")):
            weight = torch.cat([params[name][table]["weight"][:38], vectors[name]])
            params[name] = {**params[name], table: {"weight": weight}}
        return params

    plain = objectives.flow_loss(tiny.config)
    torch.testing.assert_close(value, plain(replaced(vectors), tiny.batch, KEYS)[0])
    ours = torch.func.grad(lambda own: loss(own, tiny.batch, KEYS)[0])(vectors)
    theirs = torch.func.grad(lambda own: plain(replaced(own), tiny.batch, KEYS)[0])(vectors)
    torch.testing.assert_close(ours, theirs)
    assert any(leaf.abs().sum() > 0 for leaf in tree.leaves(ours))
    stacked = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), vectors)
    both = torch.func.vmap(lambda own: loss(own, tiny.batch, KEYS)[0])(stacked)
    torch.testing.assert_close(both[0], value)


def test_a_lora_and_a_word_have_the_gradients_that_each_has_alone():
    model, inversion = models.random_model(), flow_learners.Inversion("<x>", "red", 1, ("clip_l", "t5"))
    reader = flow_learners.with_tokens(model, inversion)
    ids = conditioning.tokenize(reader.config, reader.tokenizers, ["a <x> circle", "a circle"], t5_length=8)
    batch = {"latents": prng.normal(prng.key(2), (2, 16, 4, 4)), "ids": ids}
    both = flow_learners.adapter_and_word(prng.key(1), model, 2, ["transformer"], inversion)
    grads = tree.flatten_paths(
        torch.func.grad(lambda p: both.loss(objectives.flow_loss)(p, batch, KEYS[:2])[0])(both.params)
    )
    word = flow_learners.word(model, inversion)
    of_word = torch.func.grad(lambda p: word.loss(objectives.flow_loss)(p, batch, KEYS[:2])[0])(word.params)
    adapter = flow_learners.adapter(prng.key(1), word.model(word.params), 2, ["transformer"])
    of_lora = torch.func.grad(lambda p: adapter.loss(objectives.flow_loss)(p, batch, KEYS[:2])[0])(adapter.params)
    alone = tree.flatten_paths({**of_lora, **of_word})
    assert grads.keys() == alone.keys() and grads["word.clip_l"].abs().max() > 0
    for path_of_leaf, expected in alone.items():
        torch.testing.assert_close(grads[path_of_leaf], expected, rtol=1e-4, atol=1e-6, msg=path_of_leaf)
    drawn = both.model(both.params)
    assert not tree.diff(drawn.params["clip_l"], word.model(word.params).params["clip_l"])


def test_objectives_compose(tiny, net):
    """A ControlNet with prior preservation, masks and weights is one call, and its gradient is in the ControlNet."""
    config, params = net
    batch = {
        **encoded(tiny), "control": torch.ones(4, 16, 4, 4), "mask": torch.ones(4, 1, 4, 4),
        "prior": torch.tensor([0, 1, 0, 1]),
    }  # fmt: skip
    objective = partial(objectives.prior_loss, prior_weight=1.0)
    loss = objectives.controlnet_loss(tiny.config, config, objective=objective, weight=loss_weights.cosine_map)
    value, metrics = loss({**tiny.params, "controlnet": params}, batch, KEYS)
    plain = objectives.flow_loss(tiny.config, weight=loss_weights.cosine_map)
    torch.testing.assert_close(value, 2 * plain(tiny.params, batch, KEYS)[0])
    assert {"subject_loss", "prior_loss", "bin_loss"} <= set(metrics)


def test_validation_is_the_loss_of_each_row_at_fixed_times_whatever_the_batch(tiny):
    data, key = encoded(tiny), prng.key(8)
    loss = objectives.flow_loss(tiny.config)
    rows_of = lambda rows: tree.map(lambda leaf: leaf[rows], data)  # noqa: E731
    buckets = ((0, 0, 0, 0), (0, 1, 1, 0))
    measured = [validation.validator(loss, rows_of, buckets[0], batch, key)(tiny.params) for batch in (4, 3)]
    measured.append(validation.validator(loss, rows_of, buckets[1], 4, key)(tiny.params))
    assert tuple(measured[0]) == validation.NAMES
    for name in validation.NAMES:
        for other in measured[1:]:
            torch.testing.assert_close(measured[0][name], other[name])
    noise = torch.stack([prng.normal(prng.split(prng.fold_in(prng.fold_in(key, 2), row), 3)[1], (16, 4, 4))
                         for row in range(4)])  # fmt: skip
    x = path.interpolate(data["latents"], noise, 0.25)
    velocity = mmdit.apply(
        tiny.params["transformer"], tiny.config.transformer, x, torch.full((4,), 0.25), data["context"], data["pooled"]
    )
    torch.testing.assert_close(measured[0]["validation_2"], (velocity - (noise - data["latents"])).square().mean())
    mean = torch.stack([measured[0][f"validation_{index}"] for index in range(10)]).mean()
    torch.testing.assert_close(measured[0]["validation"], mean)


def test_a_controlnet_is_copied_from_the_transformers_first_blocks(tiny):
    model = Model(tiny.params, tiny.config)
    net = flow_learners.control_config(model.config, "canny")
    learner = flow_learners.control(prng.key(0), model, net)
    copied, source = learner.params["controlnet"], tiny.params["transformer"]
    assert net.depth == 1 and not tree.diff(copied["blocks"], source["blocks"][:1])
    assert not any(leaf.any() for leaf in tree.leaves([copied["residuals"], copied["control_patch"]]))
    for depth in (0, 2):
        with pytest.raises(
            ValueError, match=f"a ControlNet of {depth} blocks .--control-depth. cannot be copied .* give 1 to 1"
        ):
            flow_learners.control_config(model.config, "canny", depth)


def test_added_rows_of_an_embedding_follow_its_table():
    from functional_sd3.core import layers

    table, added = torch.arange(6.0).reshape(3, 2), torch.tensor([[10.0, 11.0], [12.0, 13.0]])
    ids = torch.tensor([[0, 4], [3, 2]])
    expected = torch.cat([table, added])[ids]
    torch.testing.assert_close(layers.embedding({"weight": table, "added": added}, ids), expected)
